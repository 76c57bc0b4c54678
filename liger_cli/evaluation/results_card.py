"""The results section of a model card, made anew from the folder's results file by every eval and bench."""

import re
from pathlib import Path

from liger_cli.evaluation.plots import bench_plot, position_plot
from liger_cli.evaluation.report import bench_notes, bench_tables, eval_notes, eval_tables, sample_table
from liger_cli.evaluation.results import EVALUATED, RESULTS, keep, read_results, rewrite_card, shown
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError
from liger_cli.system.escape import markdown

PLOT = re.compile(r"\w+\.png", re.ASCII)
PLOTS = {"eval": position_plot, "bench": bench_plot}


def keep_result(folder: Path, part: str, result: dict) -> list[str]:
    """Put a result, its plots and the card's section into the folder; return sentences that say where they are.

    A folder that cannot be written to is a sentence on stderr, not a failure: the figures are printed anyway.
    """
    try:
        result["plots"] = PLOTS[part](result, folder)
        gone = keep(folder, part, result)
        refresh_card(folder)
    except (OSError, LigerError) as error:
        reason = getattr(error, "strerror", None) or error
        say(f"the results could not be kept in {folder}: {reason}")
        return []
    files = [str(folder / name) for name in (*result["plots"], RESULTS)]
    notes = [f"wrote {', '.join(files)} and the model card"]
    if gone:
        notes.append(f"gone from there: {', '.join(gone)}, measured on other weights, dtype or device, or another base")
    return notes


def refresh_card(folder: Path) -> Path:
    """Rewrite the section from `results.json`.

    Raises:
        OSError: the folder cannot be written to. LigerError: the results or the card are not as liger writes them.
    """
    results = read_results(folder)
    return rewrite_card(folder, shown(lambda: section(results, folder), folder / RESULTS))


def section(results: dict, folder: Path) -> str:
    """Markdown: every table, the notes under them, and the plots that lie in the folder."""
    parts = ["## Results"]
    for name, title, tables, notes in (
        ("eval", "Evaluation", eval_tables, eval_notes),
        ("bench", "Speed and memory", bench_tables, bench_notes),
    ):
        if name not in results:
            continue
        result = results[name]
        parts.append(f"### {title}")
        parts += [table.markdown() for table in tables(result)]
        parts += [sample_table(result).markdown()] if result.get("samples") else []
        parts += map(markdown, notes(result))
        parts += [f"![{title}]({plot})" for plot in result.get("plots", []) if PLOT.fullmatch(plot)]
        parts += [markdown(sentence) for sentence in _measured(result)]
    return "\n\n".join(parts)


def _measured(result: dict) -> list[str]:
    """When and with which versions; a sentence of its own for what an earlier run measured."""
    earlier: dict[str, list[str]] = {}
    for name in EVALUATED:
        if stamp := result.get(name, {}).get("measured"):
            earlier.setdefault(_stamped(stamp), []).append(name)
    return [f"Measured {_stamped(result)}."] + [
        f"{', '.join(names).capitalize()}: measured {stamp}." for stamp, names in earlier.items()
    ]


def _stamped(stamp: dict) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in stamp["versions"].items() if version)
    return f"{stamp['created'][:16].replace('T', ' ')} UTC with {versions}"
