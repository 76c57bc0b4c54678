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


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: the base's `model_type`.
        prefix: of the transformers classes: `<prefix>Config`, `<prefix>ForCausalLM`.
        local_layers: config.json (as a dict) -> for each layer, whether it is already local in the base.
        note: what is special about it, for `liger families`.
    """

    model_type: str
    prefix: str
    local_layers: Callable[[dict], list[bool]] = layer_types_or_full
    note: str = ""


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", no_local_layers),
        Family("mistral", "Mistral", all_local_if_sliding, "sliding window in v0.1 only"),
        Family("qwen2", "Qwen2", qwen_local_layers, "biases on q, k, v"),
        Family("qwen3", "Qwen3", qwen_local_layers, "norms on q and k"),
    )
}
