"""What differs between model families, as data: one row a family. Read by the command line, so no torch here."""

from collections.abc import Callable
from dataclasses import dataclass


def no_local_layers(config: dict) -> list[bool]:
    """Every layer attends to the whole text."""
    return [False] * config["num_hidden_layers"]


def layer_types_or_full(config: dict) -> list[bool]:
    """Layers named `sliding_attention` in `layer_types` are local; without the field none is."""
    layer_types = config.get("layer_types")
    if not layer_types:
        return no_local_layers(config)
    return [kind != "full_attention" for kind in layer_types]


def qwen_local_layers(config: dict) -> list[bool]:
    """Qwen2/3: `layer_types`, else the layers from `max_window_layers` on where `use_sliding_window` is set."""
    if config.get("layer_types") or not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return layer_types_or_full(config)
    first = config.get("max_window_layers", 28)
    return [index >= first for index in range(config["num_hidden_layers"])]


def all_local_if_sliding(config: dict) -> list[bool]:
    """Mistral: one `sliding_window` for all layers, or none."""
    return [config.get("sliding_window") is not None] * config["num_hidden_layers"]


def decoder_tensors(config: dict, sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-like decoder's tensors.

    Args:
        config: config.json as a dict.
        sizes: its checked sizes, a `checkpoint.Geometry`.
    """
    hidden, inner = sizes.hidden_size, config.get("intermediate_size")
    q_width, kv_width = (heads * sizes.head_dim for heads in (sizes.num_attention_heads, sizes.num_key_value_heads))
    tensors = {"model.embed_tokens.weight": (sizes.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (sizes.vocab_size, hidden)
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, q_width),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    return tensors | _every_layer(sizes, layer)


def qwen2_tensors(config: dict, sizes) -> dict[str, tuple[int, ...]]:
    """Llama's, and biases on queries, keys and values."""
    q_width, kv_width = (heads * sizes.head_dim for heads in (sizes.num_attention_heads, sizes.num_key_value_heads))
    biases = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
    layer = {f"self_attn.{name}.bias": (width,) for name, width in biases.items()}
    return decoder_tensors(config, sizes) | _every_layer(sizes, layer)


def qwen3_tensors(config: dict, sizes) -> dict[str, tuple[int, ...]]:
    """Llama's, and norms over the head dimension of queries and keys."""
    layer = {f"self_attn.{name}.weight": (sizes.head_dim,) for name in ("q_norm", "k_norm")}
    return decoder_tensors(config, sizes) | _every_layer(sizes, layer)


def _every_layer(sizes, layer: dict) -> dict:
    return {f"model.layers.{i}.{name}": shape for i in range(sizes.num_hidden_layers) for name, shape in layer.items()}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: the base's `model_type`.
        prefix: of the transformers classes: `<prefix>Config`, `<prefix>ForCausalLM`.
        local_layers: config.json (as a dict) -> for each layer, whether it is already local in the base.
        note: what is special about it, for `liger families`.
        expected_tensors: (config.json, checked sizes) -> names and shapes that the weights have to have.
    """

    model_type: str
    prefix: str
    local_layers: Callable[[dict], list[bool]] = layer_types_or_full
    note: str = ""
    expected_tensors: Callable[..., dict[str, tuple[int, ...]]] = decoder_tensors


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", no_local_layers),
        Family("mistral", "Mistral", all_local_if_sliding, "sliding window in v0.1 only"),
        Family("qwen2", "Qwen2", qwen_local_layers, "biases on q, k, v", qwen2_tensors),
        Family("qwen3", "Qwen3", qwen_local_layers, "norms on q and k", qwen3_tensors),
    )
}
