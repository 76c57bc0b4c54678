"""The `liger` command line: options and help text. Each command hands over to its module at once.

Commands with many options have them in `commands.*_options`.
Heavy packages are imported inside those modules' functions, never here: `liger --help` has to answer at once.
"""

from typing import Annotated

import typer
import typer.core

from liger_cli import __version__
from liger_cli.commands.bench_options import BenchOptions
from liger_cli.commands.convert_options import ConvertOptions
from liger_cli.commands.evaluate_options import EvaluateOptions
from liger_cli.commands.finetune_options import FinetuneOptions
from liger_cli.commands.merge_options import MergeOptions
from liger_cli.commands.options import Json, command
from liger_cli.system import interrupts
from liger_cli.system.errors import flush_stdout, guarded

CLICK_EXCEPTION = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Commands(typer.core.TyperGroup):
    """Runs a command inside the error boundary, so that a failure is one sentence and an exit code."""

    def invoke(self, ctx):
        if code := guarded(lambda: self._run(ctx), (typer.Exit, typer.Abort, CLICK_EXCEPTION)):
            raise typer.Exit(code)

    def _run(self, ctx) -> None:
        # Outside of this, where nothing is written, signals end the process; Typer would make them an exit code of 130.
        with interrupts.unwinding():
            try:
                super().invoke(ctx)
            finally:
                flush_stdout()


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. Ctrl-C and termination unwind a command, so that half-written folders are removed."""
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


app.command("convert")(command(ConvertOptions, "liger_cli.commands.convert"))


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A base, or any folder that liger made.")],
    full: Annotated[
        bool, typer.Option("--full", help="Hash the weights whole and compare them with the base's, byte by byte.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what FOLDER is, what made it, whether code and weights are as recorded (exit 1 if not)."""
    from liger_cli.commands import inspect as module

    if code := module.run(folder, full=full, as_json=as_json):
        raise typer.Exit(code)


@app.command()
def families(
    as_json: Json = False,
) -> None:
    """List the supported model families and what is special about each."""
    from liger_cli.commands import families as family_table

    family_table.run(as_json)


@app.command()
def gates(
    head_dim: Annotated[int, typer.Option(min=1, help="Head dimension to give the state's size for.")] = 128,
    as_json: Json = False,
) -> None:
    """List the gates with their formulas and the size of their states."""
    from liger_cli.commands import gates as gate_table

    gate_table.run(as_json, head_dim)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A base or a model of liger's: which commands will fit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions and devices and what runs on what, and which commands fit; exit 4 where liger cannot run."""
    from liger_cli.commands import doctor

    doctor.run(as_json, model)


app.command("finetune")(command(FinetuneOptions, "liger_cli.commands.finetune"))
app.command("merge")(command(MergeOptions, "liger_cli.commands.merge"))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe whole.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the fine-tuning recipes, or print one."""
    from liger_cli.training import recipes as module

    module.run(name, as_json=as_json)


app.command("eval")(command(EvaluateOptions, "liger_cli.commands.evaluate"))
app.command("bench")(command(BenchOptions, "liger_cli.commands.bench"))


@app.command()
def demo(
    folder: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="Folder to work in; ./liger-demo by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier demo.")] = False,
    as_json: Json = False,
) -> None:
    """Convert, fine-tune, merge, evaluate and time the small model that liger ships: minutes on a CPU.

    A demo that was stopped is taken up again by the same command."""
    from liger_cli.commands import demo as module

    module.run(folder, force=force, as_json=as_json)
