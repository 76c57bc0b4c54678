"""Reading a folder that liger made, with the same care as a base, before any of it reaches transformers or torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from liger_cli.checkpoint.experimental import experimental_family
from liger_cli.checkpoint.extras import extra_shapes
from liger_cli.checkpoint.families import FAMILIES, Family
from liger_cli.checkpoint.reader import Checkpoint, check_fields, read_config, read_parts, refuse_adapter
from liger_cli.system.errors import ModelError
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, layer_specs

MAX_SLOTS = 1 << 16
ATTENTION = re.compile(r"[a-z][a-z0-9_]{0,40}")  # a name of transformers; with a slash it would be code from the hub


@dataclass(frozen=True)
class Converted:
    """A converted or merged folder that was read and found whole.

    Attributes:
        folder: resolved path.
        config: config.json, every field as it stands there.
        family: the base's.
        specs: one entry a layer.
        checkpoint: the weights and support files.
    """

    folder: Path
    config: dict
    family: Family
    specs: tuple[LayerSpec, ...]
    checkpoint: Checkpoint


def read_converted(folder: Path | str) -> Converted:
    """Read and check a folder that liger made.

    Raises:
        ModelError: it is not linearized, of another format, incomplete, or something in it would make transformers read
            elsewhere or fetch code.
    """
    named, folder = folder, Path(folder).resolve()
    config = read_config(folder)
    family = converted_family(config, named)
    check_fields(family, config)
    layers = config.get("num_hidden_layers")
    try:
        specs = tuple(layer_specs(config["liger"], layers))
    except (LigerConfigError, TypeError) as error:  # a list where a name has to be cannot even be looked up
        raise ModelError(f"{named}: {str(error)[:500]}") from None
    if any(spec.slots > MAX_SLOTS for spec in specs):
        raise ModelError(f"{named}: config.liger asks for more than {MAX_SLOTS} slots")
    refuse_detours(folder, named, config)
    checkpoint = read_parts(folder, config, family)
    for name, extra in extra_shapes(specs, checkpoint.geometry).items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.shape != tuple(extra.shape):
            held = "is missing" if tensor is None else f"is {list(tensor.shape)}"
            raise ModelError(f"{named}: {name} {held}, where config.liger asks for {list(extra.shape)}")
    return Converted(folder, config, family, specs, checkpoint)


def converted_family(config: dict, named) -> Family:
    """The family of a converted folder's base. Raises ModelError where the config is no such folder's."""
    model_type = config.get("model_type")
    if "liger" not in config or not isinstance(model_type, str) or not model_type.startswith("liger_"):
        shown = f"model_type {str(model_type)[:100]!r}"
        raise ModelError(f"{named} is not a folder that `liger convert` wrote ({shown})")
    base_type = model_type.removeprefix("liger_")
    if base_type in FAMILIES:
        return FAMILIES[base_type]
    return experimental_family(base_type[:100], {name: value for name, value in config.items() if name != "liger"})


def refuse_detours(folder: Path, named, config: dict) -> None:
    """Raises ModelError for what would make transformers take more than this folder's weights and its own code."""
    for field in ("quantization_config", "compression_config"):
        if config.get(field) is not None:
            raise ModelError(f"{named} is quantized (config.json has {field}); give the unquantized model")
    for field in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        value = config.get(field)
        if value is not None and not (isinstance(value, str) and ATTENTION.fullmatch(value)):
            raise ModelError(f"{named}: config.json's {field} is {value!r:.100}, which is no implementation's name")
    refuse_adapter(folder, named)
