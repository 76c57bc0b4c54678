"""The plan of a conversion as tables for people."""

from dataclasses import fields
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from liger_cli.checkpoint.folders import next_step
from liger_cli.conversion.plan import Plan
from liger_cli.system.console import print_table
from liger_cli.system.escape import printable
from liger_cli.system.wording import size
from liger_cli.templates.liger_config import LayerSpec

HEADS = 12  # shown on a terminal; all stand in liger.json and in the plot


def print_plan(report: dict, plan: Plan) -> None:
    """Print the report of `convert` to stdout: layers, totals, memory against the KV cache, and what was written."""
    console = Console(highlight=False, markup=False, emoji=False)
    print_table(console, _layers(report))
    print_table(console, _memory(report))
    for name in ("selection", "calibration"):
        if report.get(name, {}).get("heads"):
            print_table(console, _heads(report[name]["heads"]))
    console.print(f"{report['parameters']:,} parameters, {size(report['bytes'])} of weights")
    if report["added_parameters"]:
        console.print(f"{report['added_parameters']:,} parameters added, float32, in a shard of their own")
    for note in plan.notes:
        console.print(printable(f"note: {note}"))
    output = printable(report["output"])
    if report["dry_run"]:
        console.print(f"dry run: {output} was not written", soft_wrap=True)
    else:
        console.print(f"wrote {output} (weights: {report['link']})", soft_wrap=True)
        console.print(printable(next_step(_state(report, plan), report["output"])), soft_wrap=True)


def _state(report: dict, plan: Plan) -> str:
    if "calibration" in report:
        return "calibrated"
    return "plain" if any(spec.kind == "liger" and spec.mix > 0 for spec in plan.specs) else "window-only"


def _heads(entries: list[dict]) -> Table:
    """The heads that lose most beyond window and sinks, the first of all, and what each got."""
    table = Table(title="heads that look back most to some effect", title_justify="left")
    for name in ("layer:head", "score", "got"):
        table.add_column(name, justify="left" if name == "got" else "right")
    for one in sorted(entries, key=lambda one: -one["score"][0])[:HEADS]:
        got = "softmax" if one.get("softmax") else f"{one['kept']} kept tokens{' and a state' if one['rest'] else ''}"
        table.add_row(f"{one['layer']}:{one['head']}", f"{one['score'][0]:.2g}", got)
    return table


def _layers(report: dict) -> Table:
    table = Table(
        title=Text(printable(f"{report['base']['name']} ({report['base']['model_type']})")), title_justify="left"
    )
    for name in ("layers", "attention", "settings"):
        table.add_column(name)
    for name in ("parameters", "bytes"):
        table.add_column(name, justify="right")
    layers = report["layers"]
    for _, group in groupby(layers, key=describe):
        group = list(group)
        first, last = group[0]["layer"], group[-1]["layer"]
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            *describe(group[0]),
            f"{sum(layer['parameters'] for layer in group):,}",
            size(sum(layer["bytes"] for layer in group)),
        )
    parameters, nbytes = (report[name] - sum(layer[name] for layer in layers) for name in ("parameters", "bytes"))
    table.add_row("other", "", "embeddings, final norm, head", f"{parameters:,}", size(nbytes))
    return table


def describe(layer: dict) -> tuple[str, str]:
    """What a layer is and its settings, in words; `layer` has the fields of `LayerSpec` that its kind has."""
    if layer["kind"] != "liger":
        return layer["kind"], "as in the base"
    default = LayerSpec()
    always = ("window", "mix", "slots") if layer["gate"] == "gsa" else ("window", "mix")
    names = [field.name for field in fields(LayerSpec) if field.name not in ("kind", "gate", "backend")]
    shown = [f"{name} {layer[name]}" for name in names if name in always or layer[name] != getattr(default, name)]
    return f"liger {layer['gate']}", ", ".join(shown)


def _memory(report: dict) -> Table:
    table = Table(title="memory of one sequence, up to the base's context", title_justify="left")
    for name in ("tokens", "this model", "base's KV cache", "less by"):
        table.add_column(name, justify="right")
    for row in report["memory"]:
        kept, cache = size(row["state_bytes"]), size(row["kv_cache_bytes"])
        table.add_row(f"{row['tokens']:,}", kept, cache, f"{row['ratio']:g}x")
    return table
