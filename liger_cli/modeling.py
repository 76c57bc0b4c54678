"""The model code: as files for a converted folder, and as the classes that liger itself runs. Both are one source."""

import sys
from importlib.resources import files
from types import ModuleType

from liger_cli.experimental import family_of
from liger_cli.families import Family

# Every file of a folder is flat and relative: what transformers' scan of custom code can follow.
MODULES = (
    "liger_attention",
    "liger_backend",
    "liger_branches",
    "liger_cache",
    "liger_config",
    "liger_extras",
    "liger_families",
    "liger_fla",
    "liger_gates",
    "liger_heads",
    "liger_model",
    "liger_recurrence",
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


def _glue(family: Family) -> str:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    template = files("liger_cli.templates").joinpath("modeling_liger.py.jinja").read_text("utf-8")
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        prefix=family.prefix, config_class=family.config_class, model_type=family.model_type
    )


def model_classes(family: Family) -> tuple[type, type]:
    """The config class and the causal-LM class of a family, from liger's installed model code."""
    name = f"liger_cli.templates.{glue_name(family)}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__package__ = "liger_cli.templates"
        module.__file__ = f"{glue_name(family)}.py"
        sys.modules[name] = module
        try:
            exec(compile(_glue(family), module.__file__, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    module = sys.modules[name]
    return getattr(module, f"Liger{family.prefix}Config"), getattr(module, f"Liger{family.prefix}ForCausalLM")


def load_model(folder, **kwargs):
    """Load a converted or merged folder with liger's own model code; the folder's code is not run.

    Args:
        folder: path of the folder.
        kwargs: of `from_pretrained` (dtype, device_map, attn_implementation, ...).
    Raises:
        ModelError: the folder is not one of a family and format that this version knows.
    """
    import json
    from pathlib import Path

    from liger_cli.errors import ModelError

    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {folder}/config.json: {error}") from None
    model_type = str(config.get("model_type", "")).removeprefix("liger_")
    if "liger" not in config:
        raise ModelError(
            f"{folder} is not a folder that `liger convert` wrote (model_type {config.get('model_type')!r})"
        )
    from liger_cli.templates.liger_config import LigerConfigError

    config_class, model_class = model_classes(family_of(model_type))
    try:
        return model_class.from_pretrained(folder, config=config_class.from_pretrained(folder), **kwargs)
    except LigerConfigError as error:
        raise ModelError(f"{folder}: {error}") from None
