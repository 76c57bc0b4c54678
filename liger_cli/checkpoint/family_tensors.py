"""Names and shapes of the tensors in a family's checkpoint, as its row of `families.FAMILIES` describes them. No torch.

A feed-forward layout is a function (config, sizes, layer index) -> name within the layer -> shape. Names are those of
the files, which for mixtures of experts are not those of the module in memory.
"""

from collections.abc import Iterator


def decoder_tensors(family, config: dict, sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint of the family has to have, one layer after the other.

    Args:
        family: a `families.Family`.
        config: config.json with the family's defaults.
        sizes: its checked sizes, a `checkpoint.Geometry`.
    """
    hidden = (sizes.hidden_size,)
    tensors = {"model.embed_tokens.weight": (sizes.vocab_size, sizes.hidden_size)}
    if family.final_norm:
        tensors |= _norm(f"model.{family.final_norm}", hidden, family.norm_bias)
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = (sizes.vocab_size, sizes.hidden_size)
        if family.head_bias:
            tensors["lm_head.bias"] = (sizes.vocab_size,)
    yield from tensors.items()
    attention = _attention(family, config, sizes)
    for index in range(sizes.num_hidden_layers):
        layer = {name: shape for norm in family.norms for name, shape in _norm(norm, hidden, family.norm_bias).items()}
        if config.get("use_parallel_residual"):
            layer = {name: shape for name, shape in layer.items() if not name.startswith("post_attention_layernorm")}
        layer |= attention | family.feed_forward(config, sizes, index)
        yield from ((f"model.layers.{index}.{name}", shape) for name, shape in layer.items())


def _attention(family, config: dict, sizes) -> dict:
    q_width, kv_width = (heads * sizes.head_dim for heads in (sizes.num_attention_heads, sizes.num_key_value_heads))
    widths = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    if family.fused_qkv:
        widths = {"qkv_proj": q_width + 2 * kv_width}
    qkv_bias, output_bias = (_flag(config, flag) for flag in (family.qkv_bias, family.output_bias))
    tensors = {}
    for name, width in widths.items():
        tensors |= _linear(name, width, sizes.hidden_size, qkv_bias)
    tensors |= _linear(family.output_projection, sizes.hidden_size, q_width, output_bias)
    tensors |= family.qk_norm(config, sizes)
    if family.sink_logits:
        tensors["sinks"] = (sizes.num_attention_heads,)
    return {f"self_attn.{name}": shape for name, shape in tensors.items()}


def no_norm(config, sizes):
    """Queries and keys are used as they are projected."""
    return {}


def head_norm(config, sizes):
    """One weight a channel of the head (Qwen3)."""
    return {f"{name}.weight": (sizes.head_dim,) for name in ("q_norm", "k_norm")}


def late_head_norm(config, sizes):
    """As `head_norm`, under HunYuan's names."""
    return {f"{name}.weight": (sizes.head_dim,) for name in ("query_layernorm", "key_layernorm")}


def full_norm(config, sizes):
    """One weight a channel of all heads together (OLMo 2)."""
    heads = {"q_norm": sizes.num_attention_heads, "k_norm": sizes.num_key_value_heads}
    return {f"{name}.weight": (count * sizes.head_dim,) for name, count in heads.items()}


def cohere_norm(config, sizes):
    """One weight a head and channel, where `use_qk_norm` asks for it (Command R+)."""
    if not config.get("use_qk_norm"):
        return {}
    heads = {"q_norm": sizes.num_attention_heads, "k_norm": sizes.num_key_value_heads}
    return {f"{name}.weight": (count, sizes.head_dim) for name, count in heads.items()}


def phi_norm(config, sizes):
    """A layer norm over the head, where `qk_layernorm` asks for it."""
    if not config.get("qk_layernorm"):
        return {}
    return {f"{n}_layernorm.{part}": (sizes.head_dim,) for n in ("q", "k") for part in ("weight", "bias")}


def stablelm_norm(config, sizes):
    """A layer norm for each head, where `qk_layernorm` asks for it."""
    if not config.get("qk_layernorm"):
        return {}
    heads = {"q": sizes.num_attention_heads, "k": sizes.num_key_value_heads}
    return {f"{n}_layernorm.norms.{i}.weight": (sizes.head_dim,) for n, count in heads.items() for i in range(count)}


def gated(config, sizes, index, prefix="mlp", width=None):
    """gate_proj, up_proj and down_proj; biases where `mlp_bias` (Ernie: `use_bias`) is set."""
    hidden, inner = sizes.hidden_size, width or config.get("intermediate_size")
    bias = bool(config.get("mlp_bias") or config.get("use_bias"))
    return (
        _linear(f"{prefix}.gate_proj", inner, hidden, bias)
        | _linear(f"{prefix}.up_proj", inner, hidden, bias)
        | _linear(f"{prefix}.down_proj", hidden, inner, bias)
    )


def gated_fused(config, sizes, index):
    """gate and up in one matrix."""
    hidden, inner = sizes.hidden_size, _number(config, "intermediate_size")
    return {"mlp.gate_up_proj.weight": (2 * inner, hidden), "mlp.down_proj.weight": (hidden, inner)}


def plain(config, sizes, index, up="up_proj", down="down_proj", bias="mlp_bias"):
    """Two matrices and a pointwise function between them."""
    hidden, inner = sizes.hidden_size, config.get("intermediate_size")
    bias = _flag(config, bias)
    return _linear(f"mlp.{up}", inner, hidden, bias) | _linear(f"mlp.{down}", hidden, inner, bias)


def starcoder2(config, sizes, index):
    """`plain` under GPT-2's names."""
    return plain(config, sizes, index, "c_fc", "c_proj", "use_bias")


def phi(config, sizes, index):
    """`plain` with biases, under Phi's names."""
    return plain(config, sizes, index, "fc1", "fc2", True)


def apertus(config, sizes, index):
    """`plain` with the learned xIELU function."""
    learned = {f"mlp.act_fn.{name}": (1,) for name in ("alpha_n", "alpha_p")}
    return plain(config, sizes, index) | (learned if config.get("hidden_act", "xielu") == "xielu" else {})


def mixtral(config, sizes, index):
    """`num_local_experts` gated experts, one file entry a matrix."""
    hidden, inner, count = sizes.hidden_size, _number(config, "intermediate_size"), _number(config, "num_local_experts")
    shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    experts = {f"experts.{i}.{name}.weight": shape for i in range(count) for name, shape in shapes.items()}
    return {f"block_sparse_moe.{name}": shape for name, shape in experts.items()} | {
        "block_sparse_moe.gate.weight": (count, hidden)
    }


def experts(config, sizes, index):
    """`num_experts` gated experts, in every `decoder_sparse_step`-th layer not in `mlp_only_layers` (Qwen, OLMoE)."""
    # transformers 5 writes Qwen3-MoE's number under Mixtral's name.
    count = _number(config, "num_experts" if config.get("num_local_experts") is None else "num_local_experts")
    step = config.get("decoder_sparse_step") or 1
    if index in (config.get("mlp_only_layers") or ()) or (index + 1) % step or not count:
        return gated(config, sizes, index)
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size")
    tensors = {"mlp.gate.weight": (count, sizes.hidden_size)}
    for expert in range(count):
        tensors |= gated(config, sizes, index, f"mlp.experts.{expert}", inner)
    return tensors


def experts_and_shared(config, sizes, index):
    """`experts` and one that every token passes through (Qwen2-MoE)."""
    tensors = experts(config, sizes, index)
    if "mlp.gate.weight" in tensors:
        tensors |= gated(config, sizes, index, "mlp.shared_expert", config.get("shared_expert_intermediate_size"))
        tensors["mlp.shared_expert_gate.weight"] = (1, sizes.hidden_size)
    return tensors


def granite_experts(config, sizes, index):
    """All experts in two tensors."""
    hidden, inner, count = sizes.hidden_size, _number(config, "intermediate_size"), _number(config, "num_local_experts")
    return {
        "block_sparse_moe.input_linear.weight": (count, 2 * inner, hidden),
        "block_sparse_moe.output_linear.weight": (count, hidden, inner),
        "block_sparse_moe.router.layer.weight": (count, hidden),
    }


def gpt_oss_experts(config, sizes, index):
    """All experts in two tensors with biases, inputs before outputs."""
    hidden, inner, count = sizes.hidden_size, _number(config, "intermediate_size"), _number(config, "num_local_experts")
    return {
        "mlp.experts.gate_up_proj": (count, hidden, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
        "mlp.experts.down_proj": (count, inner, hidden),
        "mlp.experts.down_proj_bias": (count, hidden),
        "mlp.router.weight": (count, hidden),
        "mlp.router.bias": (count,),
    }


def anything(config, sizes, index):
    """Nothing is known of the feed-forward layers (`--experimental`)."""
    return {}


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> dict:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, shape: tuple[int, ...], bias: bool) -> dict:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape} if bias else {})


def _number(config: dict, name: str) -> int:
    """A size, or 0 where config.json leaves it out, which no tensor fits."""
    return config.get(name) or 0


def _flag(config: dict, flag: str | bool) -> bool:
    """A fixed truth, or the value of a field of config.json."""
    return flag if isinstance(flag, bool) else bool(config.get(flag))
