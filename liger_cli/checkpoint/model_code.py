"""The model code: as files for a converted folder, and as the classes that liger itself runs. Both are one source."""

import hashlib
from importlib import import_module
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.resources import files
from importlib.util import spec_from_loader
from pathlib import Path

from liger_cli.checkpoint.families import Family
from liger_cli.system.errors import LigerError
from liger_cli.system.memory import available
from liger_cli.system.wording import size

MEMORY_SHARE = 0.9  # of what is free on each of several devices, for weights

# Every file of a folder is flat and relative: what transformers' scan of custom code can follow.
MODULES = (
    "liger_attention",
    "liger_backend",
    "liger_branches",
    "liger_cache",
    "liger_config",
    "liger_export",
    "liger_extras",
    "liger_families",
    "liger_fla",
    "liger_gates",
    "liger_heads",
    "liger_kept",
    "liger_memory",
    "liger_model",
    "liger_recurrence",
    "liger_rest",
    "liger_rows",
    "liger_rules",
    "liger_spans",
    "liger_step",
    "liger_transformers",
    "liger_window",
)


def glue_name(family: Family) -> str:
    """Module name of the family's glue, as auto_map names it."""
    return f"modeling_liger_{family.model_type}"


def model_files(family: Family) -> dict[str, str]:
    """File name -> text of the Python files a converted folder of this family holds."""
    templates = files("liger_cli.templates")
    texts = {f"{module}.py": templates.joinpath(f"{module}.py").read_text("utf-8") for module in MODULES}
    return {f"{glue_name(family)}.py": _glue(family)} | texts


def code_hashes(family: Family) -> dict[str, str]:
    """File name -> SHA-256 of the Python files of this version, as `liger.json` records them."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in model_files(family).items()}


def _glue(family: Family) -> str:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    template = files("liger_cli.templates").joinpath("modeling_liger.py.jinja").read_text("utf-8")
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        prefix=family.prefix,
        config_class=family.config_class,
        decoder_class=family.decoder_class,
        model_type=family.model_type,
        package=family.package or family.model_type,
        attention=family.attention,
        renames_weights=family.renames_weights,
    )


def model_classes(family: Family) -> tuple[type, type]:
    """The config class and the causal-LM class of a family, from liger's installed model code."""
    module = import_module(f"liger_cli.templates.{glue_name(family)}")
    return getattr(module, f"Liger{family.prefix}Config"), getattr(module, f"Liger{family.prefix}ForCausalLM")


class GlueImporter(MetaPathFinder, SourceLoader):
    """Imports `liger_cli.templates.modeling_liger_<model type>`, which exists as a template only, as if it were a file:
    models of liger's own classes can be pickled into other processes, and tracebacks show their lines."""

    PREFIX = "liger_cli.templates.modeling_liger_"

    def find_spec(self, fullname, path=None, target=None):
        return spec_from_loader(fullname, self) if fullname.startswith(self.PREFIX) else None

    def get_filename(self, fullname: str) -> str:
        return f"{fullname.rpartition('.')[2]}.py"

    def get_data(self, path) -> bytes:
        from liger_cli.checkpoint.experimental import family_of

        model_type = Path(path).stem.removeprefix(self.PREFIX.rpartition(".")[2])
        return _glue(family_of(model_type)).encode()


def load_config(folder, family: Family | None = None):
    """The config of a converted folder, as an instance of the family's Liger class. Raises ModelError."""
    from liger_cli.checkpoint.converted import converted_family
    from liger_cli.checkpoint.reader import model_fields, read_config
    from liger_cli.system.errors import ModelError

    path = Path(folder).resolve()
    config = read_config(path)
    family = family or converted_family(config, folder)
    try:
        return model_classes(family)[0].from_dict(model_fields(config), name_or_path=str(path))
    except Exception as error:  # each check of the config classes has an exception of its own
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: config.json is refused by the model's code ({reason})") from error


def read_onto(device: str, model_class: type, folder, **kwargs):
    """A model of transformers, its weights read straight onto a device with no copy of them on the CPU.

    Args:
        device: `cuda` is all CUDA devices, over which the layers are spread where there are several; `cuda:1` is that
            one alone.
        kwargs: of `from_pretrained`.
    Raises:
        LigerError: the devices together have not enough memory left. torch.OutOfMemoryError: the one has not.
    """
    model = model_class.from_pretrained(folder, use_safetensors=True, **kwargs, **_placement(device))
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise LigerError(f"{folder} does not fit into the {size(available(device))} that the CUDA devices have left")
    return model


def _placement(device: str) -> dict:
    """Arguments of `from_pretrained`."""
    if device == "cpu":
        return {}
    import torch

    count = torch.cuda.device_count() if device == "cuda" else 1
    if count < 2:
        return {"device_map": {"": device}}
    # The CPU is left out: what is written to a tensor that waits there would be lost.
    room = {index: round(MEMORY_SHARE * available(f"cuda:{index}")) for index in range(count)}
    return {"device_map": "auto", "max_memory": room}


def load_model(folder, device: str = "cpu", **kwargs):
    """Load a converted or merged folder with liger's own model code; the folder's code is not run.

    Args:
        folder: path of the folder.
        device: as for `read_onto`.
        kwargs: of `from_pretrained` (dtype, attn_implementation, ...).
    Raises:
        ModelError: the folder is broken, or not one of a family and format that this version knows. LigerError: as of
            `read_onto`.
    """
    import torch

    from liger_cli.checkpoint.converted import read_converted
    from liger_cli.system.errors import ModelError

    found = read_converted(folder)
    _, model_class = model_classes(found.family)
    config = load_config(folder, found.family)
    try:
        return read_onto(device, model_class, found.folder, config=config, trust_remote_code=False, **kwargs)
    except (LigerError, OSError, MemoryError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a value in config.json that the family's classes refuse, each in a way of its own
        if hasattr(error, "liger_exit_code"):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder} cannot be loaded ({type(error).__name__}: {reason})") from error


def generate_plainly(model):
    """Take from a loaded model what its folder sets for `generate`, but for the special tokens, and return it.

    What a caller leaves open is then transformers' default: greedy decoding of each sequence as it stands.
    """
    from transformers import GenerationConfig

    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(model.generation_config, name) for name in tokens})
    return model
