"""The `liger` command line: options and help text. Each command hands over to its module at once.

Heavy packages are imported inside those modules' functions, never here: `liger --help` has to answer at once.
"""

import signal
import sys
from typing import Annotated

import typer
import typer.core

from liger_cli import __version__
from liger_cli.errors import guarded
from liger_cli.templates.liger_config import FEATURE_MAPS, GATE_SOURCES, NORMALIZERS, LayerSpec
from liger_cli.templates.liger_gates import GATES

DEFAULT = LayerSpec()
CLICK_EXCEPTION = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Commands(typer.core.TyperGroup):
    """Runs a command inside the error boundary, so that a failure is one sentence and an exit code."""

    def invoke(self, ctx):
        if code := guarded(lambda: super(Commands, self).invoke(ctx), (typer.Exit, typer.Abort, CLICK_EXCEPTION)):
            raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point. A termination signal unwinds like Ctrl-C, so that half-written folders are removed."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    app(prog_name="liger")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"liger {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained softmax-attention language model into a gated linear recurrent one (arXiv 2503.01496)."""


@app.command()
def convert(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model's folder, or a hub id.")],
    output: Annotated[
        str | None, typer.Argument(metavar="OUTPUT", help="Folder to write; ./<name>-liger-<gate> by default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    gate: Annotated[str, typer.Option(help=f"One of {', '.join(GATES)}.")] = DEFAULT.gate,
    window: Annotated[int, typer.Option(help="Tokens of the softmax window, the token itself included.")] = (
        DEFAULT.window
    ),
    mix: Annotated[float, typer.Option(help="Share of the recurrent branch; the window's is 1 - mix.")] = DEFAULT.mix,
    softmax_layers: Annotated[
        str, typer.Option(help="Layers kept as softmax: none, every:N (the last of every N), or a list such as 3,11.")
    ] = "none",
    linearize_local: Annotated[
        bool, typer.Option("--linearize-local", help="Linearize layers that are local in the base, too.")
    ] = False,
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible to the window.")] = DEFAULT.sinks,
    normalizer: Annotated[
        str, typer.Option(help=f"Denominator of the recurrent branch: {', '.join(NORMALIZERS)}.")
    ] = DEFAULT.normalizer,
    feature_map: Annotated[
        str, typer.Option(help=f"Map of queries and keys in the recurrent branch: {', '.join(FEATURE_MAPS)}.")
    ] = DEFAULT.feature_map,
    gate_source: Annotated[
        str, typer.Option(help=f"Projection that the gate is pooled from: {', '.join(GATE_SOURCES)}.")
    ] = DEFAULT.gate_source,
    gate_normalizer: Annotated[
        float | None, typer.Option(help="Divisor of the log gate; the gate's own by default.")
    ] = DEFAULT.gate_normalizer,
    slots: Annotated[int, typer.Option(help="Memory slots of gsa.")] = DEFAULT.slots,
    link: Annotated[
        str, typer.Option(help="How the weights get there: auto (reflink, else hard link, else copy), hard, copy.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that liger made.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="BASE is a folder liger made: only renew its model code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a Liger model's folder out of BASE: its weights linked, its config and the model code beside them."""
    from liger_cli import convert as module

    if refresh:
        return module.run_refresh(base, dry_run=dry_run, as_json=as_json)
    module.run(
        base,
        output,
        settings={
            "gate": gate,
            "window": window,
            "mix": mix,
            "sinks": sinks,
            "normalizer": normalizer,
            "feature_map": feature_map,
            "gate_source": gate_source,
            "gate_normalizer": gate_normalizer,
            "slots": slots,
        },
        softmax_layers=softmax_layers,
        linearize_local=linearize_local,
        revision=revision,
        link=link,
        dry_run=dry_run,
        force=force,
        as_json=as_json,
    )
