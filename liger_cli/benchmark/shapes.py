"""A model of random weights from a config alone, so that speed and memory are known before anything is downloaded."""

from collections.abc import Callable
from pathlib import Path

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.hub import HUB_ID, reachable
from liger_cli.checkpoint.reader import DTYPES, read_config, supported_family
from liger_cli.evaluation.subject import SWITCH, Subject, pick_device, pick_dtype
from liger_cli.system.errors import ModelError, SetupError, UsageError
from liger_cli.system.memory import available
from liger_cli.system.untrusted import read_json
from liger_cli.system.wording import size
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, liger_block


def shapes_subject(name: str, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """Build the model that `liger convert` with its defaults would make of a config, with random weights.

    Args:
        name: a config.json, a folder that has one, or a hub id. A converted folder's own settings are kept.
    Raises:
        UsageError, ModelError, SetupError.
    """
    import torch

    from liger_cli.checkpoint.model_code import model_classes

    config = _config(name)
    device = pick_device(device)
    torch_dtype = pick_dtype(device, dtype)
    if "liger" in config:
        family = FAMILIES.get(str(config.get("model_type")).removeprefix("liger_"))
        if family is None:
            raise ModelError(f"{name}: model type {config.get('model_type')!r} is not one of liger's")
    else:
        family = supported_family(config, Path(name))
        local = family.local_layers(config)
        mixed = any(local) and not all(local)
        specs = [LayerSpec(kind="base" if mixed and one else "liger") for one in local]
        config = {**config, "liger": liger_block(specs), "model_type": f"liger_{family.model_type}"}
    config_class, model_class = model_classes(family)
    if torch_dtype == "auto":
        name_of = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        torch_dtype = getattr(torch, name_of) if name_of in DTYPES else torch.bfloat16
    try:
        _check_memory(name, lambda: model_class._from_config(config_class.from_dict(config)), torch_dtype, device)
        with torch.device(device):
            model = model_class._from_config(config_class.from_dict(config), dtype=torch_dtype)
    except LigerConfigError as error:
        raise ModelError(f"{name}: {error}") from None
    return Subject(Path(name), "converted", model.eval(), None, base_source=f"{SWITCH}; random weights")


def _check_memory(name: str, build: Callable, dtype, device: str) -> None:
    """Raises SetupError where the weights do not fit: on a CPU the system would end the process without a word."""
    import torch

    with torch.device("meta"):
        wanted = sum(x.numel() for x in build().parameters()) * dtype.itemsize
    free = available(device)
    if free is not None and wanted > free:
        raise SetupError(
            f"{name}: its weights of {size(wanted)} in {str(dtype).removeprefix('torch.')} do not fit into the "
            f"{size(free)} that are free on {device}; try another --dtype or --device"
        )


def _config(name: str) -> dict:
    path = Path(name).expanduser()
    if path.is_dir():
        return read_config(path.resolve())
    if path.is_file():
        return read_json(path)
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name} does not exist; give a config.json, a folder or a hub id")
    import huggingface_hub

    try:
        # Without network only what was downloaded before: the retries would take most of a minute.
        return read_json(Path(huggingface_hub.hf_hub_download(name, "config.json", local_files_only=not reachable())))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SetupError(
            f"the config of {name} could not be had from the hub ({reason}); check the name and the network, or give a "
            "config.json"
        ) from None
