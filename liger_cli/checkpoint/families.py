"""What differs between model families, as data: one row a family. Read by the command line, so no torch here.

How a family's attention differs when it runs is in `templates/liger_families.py`, one short class each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from liger_cli.checkpoint import family_tensors as tensors


def no_local_layers(config: dict) -> list[bool]:
    """Every layer attends to the whole text."""
    return [False] * config["num_hidden_layers"]


def layer_types_or_full(config: dict) -> list[bool]:
    """Layers named `sliding_attention` in `layer_types` are local; without the field none is."""
    layer_types = config.get("layer_types")
    if not layer_types:
        return no_local_layers(config)
    return [kind != "full_attention" for kind in layer_types]


def pattern(default: int, config: dict) -> list[bool]:
    """`layer_types`, else all layers but every `sliding_window_pattern`-th are local."""
    if config.get("layer_types") or config.get("sliding_window") is None:
        return layer_types_or_full(config)
    step = config.get("sliding_window_pattern") or default
    if isinstance(step, str):  # EXAONE 4: "LLLG"
        return [step[index % len(step)] == "L" for index in range(config["num_hidden_layers"])]
    return [(index + 1) % step != 0 for index in range(config["num_hidden_layers"])]


def qwen_local_layers(config: dict) -> list[bool]:
    """Qwen2/3: `layer_types`, else the layers from `max_window_layers` on where `use_sliding_window` is set."""
    if config.get("layer_types") or not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return layer_types_or_full(config)
    first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
    return [index >= first for index in range(config["num_hidden_layers"])]


def qwen2_moe_local_layers(config: dict) -> list[bool]:
    """Qwen2-MoE: `layer_types`, else half of the first `max_window_layers` where `use_sliding_window` is set."""
    if config.get("layer_types") or not config.get("use_sliding_window"):
        return layer_types_or_full(config)
    first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
    return [index % 2 == 0 and index < first for index in range(config["num_hidden_layers"])]


def all_local_if_sliding(config: dict) -> list[bool]:
    """Mistral: one `sliding_window` for all layers, or none."""
    return [config.get("sliding_window") is not None] * config["num_hidden_layers"]


def all_local_if_used(config: dict) -> list[bool]:
    """Qwen3-MoE: one `sliding_window` for all layers, where `use_sliding_window` is set."""
    local = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    return [local] * config["num_hidden_layers"]


def ministral_local_layers(config: dict) -> list[bool]:
    """`layer_types`, else all layers are local where there is a `sliding_window`."""
    return layer_types_or_full(config) if config.get("layer_types") else all_local_if_sliding(config)


def smollm3_local_layers(config: dict) -> list[bool]:
    """`layer_types`, else, where `use_sliding_window` is set, the layers without rotary embedding."""
    if config.get("layer_types") or not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return layer_types_or_full(config)
    count, step = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    rotary = config.get("no_rope_layers") or [(index + 1) % step for index in range(count)]
    return [not rotary[index] for index in range(count)]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: the base's `model_type`.
        prefix: of the transformers classes: `<prefix>ForCausalLM`, `<prefix>Attention`, ...
        find_local: config.json -> for each layer, whether it is already local in the base.
        note: what is special about it, for `liger families`.
        config_prefix: of `<prefix>Config` and `<prefix>Model`, where it is not `prefix`.
        package: of `transformers.models`, where it is not `model_type`.
        attention: the class of `liger_families` for the family's attention layers; `LigerAttention` where these are
            Llama's, but for what their projections and norms are called.
        renames_weights: tensors have other names in memory than in files: experts, and where nothing is known.
        defaults: what the config class takes for fields that config.json does not have.
        lora_targets: the projections of queries, keys and values, as PEFT's `target_modules`.
        output_projection: name of the attention's output projection.
        fused_qkv: queries, keys and values come from one `qkv_proj`.
        qkv_bias, output_bias: whether the projections have a bias, or the field of config.json that says so.
        qk_norm, feed_forward: layouts of `family_tensors`.
        norms, final_norm: names of a layer's norms and of the last one; "" for norms without weights.
        norm_bias, head_bias: whether the norms and the language-model head have biases.
        sink_logits: whether each query head has a learned sink logit.
        identity_tolerance: largest difference of logits in the identity check; anything but 0 needs a reason.
        identity_reason: that reason.
    """

    model_type: str
    prefix: str
    find_local: Callable[[dict], list[bool]] = layer_types_or_full
    note: str = ""
    config_prefix: str = ""
    package: str = ""
    attention: str = "LigerAttention"
    renames_weights: bool = False
    defaults: dict = field(default_factory=dict)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output_projection: str = "o_proj"
    fused_qkv: bool = False
    qkv_bias: str | bool = "attention_bias"
    output_bias: str | bool = "attention_bias"
    qk_norm: Callable = tensors.no_norm
    feed_forward: Callable = tensors.gated
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    final_norm: str = "norm"
    norm_bias: bool = False
    head_bias: bool = False
    sink_logits: bool = False
    identity_tolerance: float = 0.0
    identity_reason: str = ""

    @property
    def config_class(self) -> str:
        """Name of the family's config class in transformers."""
        return f"{self.config_prefix or self.prefix}Config"

    @property
    def decoder_class(self) -> str:
        """Name of the family's decoder in transformers, the model without a language-model head."""
        return f"{self.config_prefix or self.prefix}Model"

    def with_defaults(self, config: dict) -> dict:
        """config.json with the config class's defaults for the fields that it does not have."""
        return {**self.defaults, **config}

    def local_layers(self, config: dict) -> list[bool]:
        """For each layer, whether it is already local in the base."""
        return self.find_local(self.with_defaults(config))

    def expected_tensors(self, config: dict, sizes) -> dict[str, tuple[int, ...]]:
        """Names and shapes that the weights have to have; `sizes` is a `checkpoint.Geometry`."""
        return dict(tensors.decoder_tensors(self, self.with_defaults(config), sizes))


ATTENTION_AND_MLP_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
NO_BIAS = {"qkv_bias": False, "output_bias": False}
QKV_BIAS = {"qkv_bias": True, "output_bias": False}
TIED = {"tie_word_embeddings": True}
QWEN_WINDOW = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", no_local_layers, "every rope scaling, Llama 3.x's included"),
        Family(
            "mistral", "Mistral", all_local_if_sliding, "sliding window in v0.1 only",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096}, **NO_BIAS,
        ),
        Family(
            "ministral", "Ministral", ministral_local_layers, "local and global layers",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096}, **NO_BIAS,
        ),
        Family(
            "ministral3", "Ministral3", all_local_if_sliding, "queries scaled by position beyond the trained length",
            defaults={"num_key_value_heads": 8, "head_dim": 128}, **NO_BIAS,
            attention="PositionScaledQueries",
        ),
        Family(
            "mixtral", "Mixtral", all_local_if_sliding, "mixture of experts",
            defaults={"num_key_value_heads": 8, "num_local_experts": 8}, feed_forward=tensors.mixtral,
            renames_weights=True, **NO_BIAS,
        ),
        Family(
            "qwen2", "Qwen2", qwen_local_layers, "biases on q, k, v",
            defaults={"num_key_value_heads": 32, **QWEN_WINDOW}, **QKV_BIAS,
        ),
        Family(
            "qwen2_moe", "Qwen2Moe", qwen2_moe_local_layers, "mixture of experts with a shared one; biases on q, k, v",
            defaults={
                "num_key_value_heads": 16, **QWEN_WINDOW, "qkv_bias": True, "num_experts": 60,
                "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
            },
            qkv_bias="qkv_bias", output_bias=False, feed_forward=tensors.experts_and_shared,
            renames_weights=True,
        ),
        Family(
            "qwen3", "Qwen3", qwen_local_layers, "norms on q and k",
            defaults={"num_key_value_heads": 32, "head_dim": 128, **QWEN_WINDOW}, qk_norm=tensors.head_norm,
        ),
        Family(
            "qwen3_moe", "Qwen3Moe", all_local_if_used, "mixture of experts; norms on q and k",
            defaults={
                "num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False, "num_experts": 128,
                "moe_intermediate_size": 768, "decoder_sparse_step": 1,
            },
            qk_norm=tensors.head_norm, feed_forward=tensors.experts,
            renames_weights=True,
        ),
        Family(
            "gemma", "Gemma", no_local_layers, "heads wider than hidden size / heads; tied embeddings",
            defaults={"num_key_value_heads": 16, "head_dim": 256, **TIED},
        ),
        Family(
            "gemma2", "Gemma2", partial(pattern, 2), "every second layer local; scores soft-capped; own score scale",
            defaults={"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, **TIED},
            norms=ATTENTION_AND_MLP_NORMS,
        ),
        Family(
            "gemma3_text", "Gemma3", partial(pattern, 6),
            "5 of 6 layers local, with a rotary base of their own; norms on q and k; text models only",
            config_prefix="Gemma3Text", package="gemma3",
            defaults={"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, **TIED},
            qk_norm=tensors.head_norm, norms=ATTENTION_AND_MLP_NORMS,
        ),
        Family(
            "phi3", "Phi3", all_local_if_sliding, "Phi-3 and Phi-4; q, k, v in one matrix; Phi-4-mini: partial rotary",
            lora_targets=("qkv_proj",), fused_qkv=True, feed_forward=tensors.gated_fused, **NO_BIAS,
            attention="FusedProjection",
        ),
        Family(
            "olmo", "Olmo", no_local_layers, "q, k, v clipped; norms without weights", norms=(), final_norm="",
            attention="ClippedProjection",
        ),
        Family(
            "olmo2", "Olmo2", no_local_layers, "norms over all heads of q and k together; norms after the blocks",
            qk_norm=tensors.full_norm, norms=POST_NORMS,
            attention="FullWidthNorm",
        ),
        Family(
            "olmo3", "Olmo3", partial(pattern, 4), "3 of 4 layers local; norms over all heads of q and k together",
            defaults={"sliding_window": 4096}, qk_norm=tensors.full_norm, norms=POST_NORMS,
            attention="FullWidthNorm",
        ),
        Family(
            "olmoe", "Olmoe", no_local_layers, "mixture of experts; norms over all heads; q, k, v clipped",
            defaults={"num_experts": 64}, qk_norm=tensors.full_norm, feed_forward=tensors.experts,
            renames_weights=True, attention="FullWidthNorm",
        ),
        Family("granite", "Granite", no_local_layers, "own score scale (attention_multiplier)"),
        Family(
            "granitemoe", "GraniteMoe", no_local_layers, "mixture of experts; own score scale (attention_multiplier)",
            defaults={"num_local_experts": 8}, feed_forward=tensors.granite_experts,
            renames_weights=True,
        ),
        Family(
            "smollm3", "SmolLM3", smollm3_local_layers, "every fourth layer without rotary embedding",
            defaults={"num_key_value_heads": 4, "no_rope_layer_interval": 4, **TIED},
            attention="RotaryWhereAsked",
        ),
        Family(
            "glm", "Glm", no_local_layers, "glm-4-9b; interleaved rotary on half of each head",
            defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
            output_bias=False, feed_forward=tensors.gated_fused,
        ),
        Family(
            "glm4", "Glm4", no_local_layers, "GLM-4-0414; interleaved rotary on half of each head; four norms a layer",
            defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
            output_bias=False, feed_forward=tensors.gated_fused,
            norms=("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
        Family(
            "cohere", "Cohere", no_local_layers, "interleaved rotary; attention beside the MLP; norms in Command R+",
            defaults=TIED, qk_norm=tensors.cohere_norm, norms=("input_layernorm",),
        ),
        Family(
            "cohere2", "Cohere2", partial(pattern, 4), "3 of 4 layers local; global layers without rotary embedding",
            defaults={"sliding_window": 4096, **TIED}, norms=("input_layernorm",),
            attention="RotaryInLocalLayers",
        ),
        Family(
            "starcoder2", "Starcoder2", all_local_if_sliding, "biases everywhere; sliding window of 4096 as published",
            defaults={"num_key_value_heads": 2, "use_bias": True, **TIED},
            qkv_bias="use_bias", output_bias="use_bias", feed_forward=tensors.starcoder2, norm_bias=True,
            attention="OutputDropout",
        ),
        Family(
            "gpt_oss", "GptOss", partial(pattern, 2), "mixture of experts; every second layer local; sink logits",
            defaults={
                "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "attention_bias": True,
                "num_local_experts": 128,
            },
            feed_forward=tensors.gpt_oss_experts, sink_logits=True,
        ),
        Family(
            "ernie4_5", "Ernie4_5", no_local_layers, "interleaved rotary; tied embeddings",
            defaults={"num_key_value_heads": 2, "head_dim": 128, **TIED},
            qkv_bias="use_bias", output_bias="use_bias",
        ),
        Family(
            "seed_oss", "SeedOss", no_local_layers, "biases on q, k, v",
            defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
            output_bias="attention_out_bias",
            attention="OutputDropout",
        ),
        Family("arcee", "Arcee", no_local_layers, "squared ReLU without a gate", feed_forward=tensors.plain),
        Family(
            "apertus", "Apertus", no_local_layers, "norms on q and k; learned xIELU without a gate",
            qk_norm=tensors.head_norm, feed_forward=tensors.apertus,
            norms=("attention_layernorm", "feedforward_layernorm"),
        ),
        Family(
            "nemotron", "Nemotron", no_local_layers, "rotary on half of each head; squared ReLU without a gate",
            feed_forward=tensors.plain, norm_bias=True,
        ),
        Family(
            "stablelm", "StableLm", no_local_layers, "rotary on a quarter of each head; a norm for each head in 12B",
            defaults={"num_key_value_heads": 32}, qkv_bias="use_qkv_bias", output_bias=False,
            qk_norm=tensors.stablelm_norm, norm_bias=True,
            attention="PartialRotary",
        ),
        Family(
            "phi", "Phi", no_local_layers, "Phi-1 to Phi-2; rotary on a part of each head; biases everywhere",
            output_projection="dense", qkv_bias=True, output_bias=True, qk_norm=tensors.phi_norm,
            feed_forward=tensors.phi, norms=("input_layernorm",), final_norm="final_layernorm", norm_bias=True,
            head_bias=True,
            attention="DenseOutput",
        ),
        Family(
            "exaone4", "Exaone4", partial(pattern, 4),
            "32B: 3 of 4 layers local, global layers without rotary embedding; norms on q and k",
            defaults={"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
            qk_norm=tensors.head_norm, norms=POST_NORMS, **NO_BIAS,
            attention="RotaryUnlessGlobal",
        ),
        Family(
            "hunyuan_v1_dense", "HunYuanDenseV1", no_local_layers, "norms on q and k after the rotary embedding",
            qk_norm=tensors.late_head_norm,
            attention="NormAfterRotary",
        ),
    )
}  # fmt: skip
