"""The plan of a conversion as tables for people."""

from dataclasses import fields
from itertools import groupby

from liger_cli.checkpoint.folders import next_step, state_of
from liger_cli.conversion.plan import Plan
from liger_cli.system.tables import Table, print_tables
from liger_cli.system.wording import size
from liger_cli.templates.liger_config import LayerSpec

HEADS = 12  # shown on a terminal; all stand in liger.json and in the plot


def print_plan(report: dict, plan: Plan) -> None:
    """Print the report of `convert` to stdout: layers, totals, memory against the KV cache, and what was written."""
    tables = [_layers(report), _memory(report)]
    for name in ("selection", "calibration"):
        if report.get(name, {}).get("heads"):
            tables.append(_heads(report[name]["heads"]))
    notes = [f"{report['parameters']:,} parameters, {size(report['bytes'])} of weights"]
    if report["added_parameters"]:
        notes.append(f"{report['added_parameters']:,} parameters added, float32, in a shard of their own")
    notes += [f"note: {note}" for note in plan.notes]
    if report["dry_run"]:
        notes.append(f"dry run: {report['output']} was not written; {next_step('dry run')}")
    else:
        notes.append(f"wrote {report['output']} (weights: {report['link']})")
        notes.append(next_step(state_of(report), report["output"]))
    print_tables(tables, notes=tuple(notes))


def _heads(entries: list[dict]) -> Table:
    """The heads that lose most beyond window and sinks, the first of all, and what each got."""
    table = Table("heads that look back most to some effect", ["layer:head", "got", "score"], words=2)
    for one in sorted(entries, key=lambda one: -one["score"][0])[:HEADS]:
        got = "softmax" if one.get("softmax") else f"{one['kept']} kept tokens{' and a state' if one['rest'] else ''}"
        table.rows.append([f"{one['layer']}:{one['head']}", got, f"{one['score'][0]:.2g}"])
    return table


def _layers(report: dict) -> Table:
    title = f"{report['base']['name']} ({report['base']['model_type']})"
    table = Table(title, ["layers", "attention", "settings", "parameters", "bytes"], words=3)
    layers = report["layers"]
    for _, group in groupby(layers, key=describe):
        group = list(group)
        first, last = group[0]["layer"], group[-1]["layer"]
        span = str(first) if first == last else f"{first}-{last}"
        totals = f"{sum(layer['parameters'] for layer in group):,}", size(sum(layer["bytes"] for layer in group))
        table.rows.append([span, *describe(group[0]), *totals])
    parameters, nbytes = (report[name] - sum(layer[name] for layer in layers) for name in ("parameters", "bytes"))
    table.rows.append(["other", "", "embeddings, final norm, head", f"{parameters:,}", size(nbytes)])
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
    header = ["tokens", "this model", "base's KV cache", "less by"]
    table = Table("memory of one sequence, up to the base's context", header)
    for row in report["memory"]:
        kept, cache = size(row["state_bytes"]), size(row["kv_cache_bytes"])
        table.rows.append([f"{row['tokens']:,}", kept, cache, f"{row['ratio']:g}x"])
    return table
