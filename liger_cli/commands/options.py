"""An option stands once: a field of a dataclass, with its help, for the command line and the Python function alike."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from importlib import import_module
from typing import Annotated, Any, get_type_hints

import typer

from liger_cli.system.console import without_length_advice
from liger_cli.system.errors import UsageError

OURS = ("make", "flags", "panel", "shown", "recipe")  # of a field's metadata: not for Typer as they stand
# Panels of `--help`, from what people need first to what few ever do.
OUTPUT, EXPERT = "Output", "For experts"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]


def argument(help: str, default: Any = MISSING, **settings) -> Any:
    """A field that is a positional argument. settings: of `typer.Argument`."""
    return field(default=default, metadata={"help": help, "make": typer.Argument, **settings})


def option(default: Any, help: str, *flags: str, **settings) -> Any:
    """A field that is an option.

    Args:
        help: one sentence, for `--help` and for the Python function's docstring.
        flags: on the command line, where they are not `--` and the field's name.
        settings: of `typer.Option`; `panel` is short for `rich_help_panel`, and `shown` for `show_default`.
    """
    return field(default=default, metadata={"help": help, "make": typer.Option, "flags": flags, **settings})


def measured() -> Any:
    help = "A folder liger made; by default the newest here: a merged one, else an adapter, else a converted one."
    return argument(help, None, metavar="MODEL")


def device() -> Any:
    return option("auto", "auto, cpu, cuda, cuda:1 ...")


def dtype() -> Any:
    return option("auto", "auto (float32 on a CPU), float32, bfloat16, float16.")


def save() -> Any:
    return option(True, "Keep results.json, plots and card section in the folder.", panel=OUTPUT)


def output_format() -> Any:
    return option("table", "table, md, json or csv.", "--format", panel=OUTPUT)


def push() -> Any:
    help = "Upload the result to this repository of the hub; a new one is private."
    return option(None, help, metavar="REPO", panel=OUTPUT)


def command(options: type, module: str) -> Callable[..., None]:
    """The function of a command for Typer: a parameter for each field of `options`, and `--json`.

    Args:
        options: a dataclass of fields made by `argument` and `option`; its docstring is the command's help.
        module: imported once the command runs; its `run` gets the fields' values and `as_json`.
    """

    def call(as_json: bool = False, **given) -> None:
        with without_length_advice():
            import_module(module).run(as_json=as_json, **given)

    hints = get_type_hints(options)
    parameters = [_parameter(one, hints[one.name]) for one in fields(options)]
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))
    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    call.__doc__ = options.__doc__
    return call


def function(options: type, module: str) -> Callable[..., dict]:
    """The Python function of a command: the same parameters, documented by the same words; it prints nothing.

    Args:
        options, module: as for `command`; `run` returns the report.
    """
    hints = get_type_hints(options)
    parameters = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
            annotation=hints[one.name],
        )
        for one in fields(options)
    ]
    signature = inspect.Signature(parameters, return_annotation=dict)

    def call(*values, **given) -> dict:
        with without_length_advice():
            return import_module(module).run(quiet=True, **signature.bind(*values, **given).arguments)

    call.__signature__ = signature
    told = "\n".join(f"    {one.name}: {one.metadata['help']}" for one in fields(options))
    call.__doc__ = f"{inspect.cleandoc(options.__doc__)}\n\nArgs:\n{told}\n\nReturns:\n    What `--json` prints."
    return call


def _parameter(one, hint) -> inspect.Parameter:
    """A field as Typer's parameter. A switch that is off has no `--no-` form."""
    settings = {name: value for name, value in one.metadata.items() if name not in OURS}
    for short, name in (("panel", "rich_help_panel"), ("shown", "show_default")):
        if short in one.metadata:
            settings[name] = one.metadata[short]
    flags = one.metadata.get("flags", ())
    if hint is bool and one.default is False and not flags:
        flags = (f"--{one.name.replace('_', '-')}",)
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    annotation = Annotated[hint, one.metadata["make"](*flags, **settings)]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def check_positive(options, *names: str) -> None:
    """Raises UsageError where one of these fields is below 1."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, but has to be 1 or more")
