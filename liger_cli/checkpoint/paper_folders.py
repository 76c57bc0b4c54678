"""Folders of the paper's own code (OpenSparseLLMs/Linearization): a base's weights under their own names, beside a
config.json whose `model_type` and `architectures` name one of its seven models. A LoRA adapter lies in a folder apart.
"""

import re

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.system.errors import UsageError
from liger_cli.templates.liger_config import LayerSpec

FAMILY_OF = {None: "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen25": "qwen2", "qwen3": "qwen3"} | {
    "qwen3_moe": "qwen3_moe",
    "qwen3moe": "qwen3_moe",
}
MODEL_TYPE = re.compile(r"liger_(?:(mistral|qwen2|qwen25|qwen3|qwen3_moe)_)?(gla|gsa|hgrn2)")
ARCHITECTURE = re.compile(r"Liger(Mistral|Qwen2|Qwen25|Qwen3|Qwen3Moe|Qwen3MoE)?(GLA|GSA|HGRN2)ForCausalLM")
# Written into its model code: half and half, and nothing divides the recurrent branch.
FIXED = {"mix": 0.5, "normalizer": "none"}


def as_base(config: dict) -> tuple[dict, str | None]:
    """The config.json of such a folder's base, and the folder's gate; any other config as it is, and None."""
    if "liger" in config:
        return config, None
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    match = MODEL_TYPE.fullmatch(str(config.get("model_type"))) or ARCHITECTURE.fullmatch(str(architecture))
    if match is None:
        return config, None
    family = FAMILIES[FAMILY_OF[match[1] and match[1].lower()]]
    names = {"model_type": family.model_type, "architectures": [f"{family.prefix}ForCausalLM"]}
    return {**config, **names}, match[2].lower()


def fixed_settings(settings: dict, gate: str, config: dict) -> dict:
    """Fields of `LayerSpec` for such a folder. Raises UsageError where `settings` ask for something else.

    Args:
        settings: what the user asked for; None is what he left open.
        gate: the folder's.
        config: its config.json, which names gsa's slots a head `pool_size`.
    """
    fixed = {**FIXED, "slots": config.get("pool_size")} if gate == "gsa" and "pool_size" in config else FIXED
    for name, value in fixed.items():
        if settings.get(name) not in (None, value, getattr(LayerSpec, name)):
            raise UsageError(f"--{name} is {settings[name]}, but a folder of the paper's own code is fixed to {value}")
    if settings.get("gate", gate) not in (gate, "gla"):
        raise UsageError(f"--gate is {settings['gate']}, but this folder of the paper's own code has the gate {gate}")
    return {**settings, **fixed, "gate": gate}


def notes(model_type: str, gate: str, settings: dict) -> tuple[str, ...]:
    """Sentences about what becomes of such a folder, converted with `fixed_settings`."""
    slots = f" with {settings.get('slots', LayerSpec.slots)} slots" if gate == "gsa" else ""
    first = (
        f"a folder of the paper's own code: gate {gate}{slots}, mix 0.5 and no normaliser are kept; its code's window "
        "is 65 tokens, the token itself included (--window 65); its LoRA adapter fits, since tensors keep their names"
    )
    if not model_type.startswith("qwen3"):
        return (first,)
    return (first, "the paper's code leaves out the norms on q and k, which are used here; fine-tune again to be sure")
