"""The study behind the default recipe, one resumable command; see `--help`."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from liger_cli.system.errors import UsageError, guarded
from study import report, runner
from study.rows import Effort, parse_tokens, planned, show_tokens
from study.subjects import present, study_base


def main(arguments: list[str] | None = None) -> int:
    """Exit code, as of every command of liger."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m study",
        description="Measure every recipe on every base, go on where an earlier run stopped, write the table. All of "
        "it is meant for about four hours on two cores.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="the study's folder")
    parser.add_argument(
        "--from", dest="earlier", metavar="DIR", type=Path, help="go on from an earlier study's results, too"
    )
    parser.add_argument("--only", default="", metavar="ROWS", help="names or groups of rows, with * and ?, by commas")
    parser.add_argument("--budgets", default="0.1M,0.5M", help="training tokens, by commas (0.1M,0.5M)")
    parser.add_argument("--large", default="2M", help="training tokens of one more run of a few rows, or none (2M)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of a trained row (3)")
    parser.add_argument("--sinks", type=int, default=0, help="first tokens that stay visible, in every row (0)")
    parser.add_argument("--bases", help=f"by commas ({','.join(present())}); any other as FOLDER@TEXT")
    parser.add_argument("--hours", type=float, help="begin no row after that long")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="rows at once, which share the cores"
    )
    parser.add_argument("--probes", type=int, default=64, help="recall probes at each distance (64)")
    parser.add_argument("--characters", type=int, default=80_000, help="of held-out text (80000)")
    parser.add_argument("--plan", action="store_true", help="print the rows in their order and compute nothing")
    parser.add_argument("--report", action="store_true", help="write the table of what there is and compute nothing")
    return parser


def _run(options: argparse.Namespace) -> None:
    for name in ("seeds", "workers", "probes", "characters"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} is {getattr(options, name)}, but has to be 1 or more")
    if options.sinks < 0:
        raise UsageError(f"--sinks is {options.sinks}, but has to be 0 or more")
    names = _listed(options.bases) if options.bases else present()
    bases = {base.name: base for base in map(study_base, names)}
    large = None if options.large == "none" else parse_tokens(options.large)
    budgets = [parse_tokens(text) for text in _listed(options.budgets)]
    only = tuple(_listed(options.only))
    units = planned(list(bases.values()), budgets, options.seeds, only, large, options.sinks)
    if options.plan:
        for unit in units:
            print(f"{unit.base}/{unit.name}")
        print(f"liger: {len(units)} rows, {show_tokens(sum(unit.budget for unit in units))} tokens", file=sys.stderr)
        return
    home = options.output.resolve()
    home.mkdir(parents=True, exist_ok=True)
    if options.earlier:
        runner.take_over(options.earlier, home)
    if not options.report:
        effort = asdict(Effort(characters=options.characters, probes=options.probes))
        found = runner.run(units, bases, home, effort, workers=options.workers, hours=options.hours)
        print("; ".join(f"{outcome}: {len(labels)}" for outcome, labels in found.items()), file=sys.stderr)
    for path in report.write(home):
        print(path)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
