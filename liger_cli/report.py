"""Tables of results for people, as text, Markdown or CSV, made from the JSON that the commands print."""

import csv
import io
import sys
from dataclasses import dataclass, field

from liger_cli.columns import TITLES
from liger_cli.escape import csv_cell, markdown, printable
from liger_cli.wording import size

FORMATS = ("table", "md", "json", "csv")


@dataclass
class Table:
    """One table: a title, a header, rows of strings; the first column is left-aligned."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"**{markdown(self.title)}**", "", _markdown_row(self.header)]
        lines.append("|" + "---|" + "---:|" * (len(self.header) - 1))
        return "\n".join([*lines, *map(_markdown_row, self.rows)])

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([list(map(csv_cell, cells)) for cells in (self.header, *self.rows)])
        return text.getvalue()

    def rich(self):
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(printable(self.title)), title_justify="left", box=box.SIMPLE_HEAD)
        for index, name in enumerate(self.header):
            table.add_column(Text(printable(name)), justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table


def print_tables(tables: list[Table], output_format: str = "table", notes: tuple[str, ...] = ()) -> None:
    """Print tables to stdout; notes follow them (for CSV on stderr)."""
    if output_format == "table":
        from rich.console import Console

        from liger_cli.terminal import print_table

        console = Console(highlight=False, markup=False, emoji=False)
        for table in tables:
            print_table(console, table.rich())
        for note in notes:
            console.print(printable(note, keep="\n"), soft_wrap=True)
        return
    if output_format == "md":
        print("\n\n".join([table.markdown() for table in tables] + [printable(note, keep="\n") for note in notes]))
        return
    print("\n".join(table.csv() for table in tables), end="")
    for note in notes:
        print(printable(note, keep="\n"), file=sys.stderr)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(map(markdown, cells)) + " |"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """A perplexity or a divergence: three decimals where small, none where huge."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def eval_tables(result: dict) -> list[Table]:
    """Every table of one evaluation: base, model, window only, recovery."""
    titles = {**TITLES, "base": result["model"]["base_column"]["label"]}
    columns = [name for name in TITLES if any(name in result.get(part, {}) for part in PARTS)]
    head = [titles[name] for name in columns]
    tables = []
    for part, make in PARTS.items():
        if part in result:
            tables += make(result, columns, head)
    return tables


def _perplexity_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["perplexity"]
    recovery = values["recovery"]
    source = values["text"]
    table = Table(
        f"perplexity of {source['name']} ({source['tokens']:,} tokens, rows of {source['seq_len']})",
        ["", *head, "recovery"],
    )
    rows = [("a token", lambda column: column["token"]), ("a byte", lambda column: column["byte"])]
    for bucket in values["model"]["by_position"]:
        rows.append((f"at tokens {bucket}", lambda column, bucket=bucket: column["by_position"][bucket]))
    for name, pick in rows:
        shown = "-" if recovery is None else percent(pick(recovery))
        table.rows.append([name, *(number(pick(values[column])) for column in columns), shown])
    return [table]


def _agreement_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["agreement"]
    table = Table(f"agreement with the {head[0]} column on the same text", ["", *head])
    table.rows.append(["KL divergence, nats a token", *(number(values[column]["kl"]) for column in columns)])
    table.rows.append(["same most likely token", *(percent(values[column]["top1"]) for column in columns)])
    return [table]


BASE_SCORES_0 = "base scores 0"
RECALL_TITLES = {
    "single": "one fact",
    "key_value": "one of four facts",
    "multi": "all of four facts",
    "copy": "copying",
}
METHOD_TITLES = {"teacher_forced": "teacher-forced", "generation": "generated"}


def _recall_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["recall"]
    tables = []
    for method in values["count"]:
        title = METHOD_TITLES[method]
        table = Table(
            f"recall, {title}: exact answers by distance in tokens ({values['count'][method]} probes each)",
            ["probe", "distance", *head, "recovery"],
        )
        for kind, methods in values["model"].items():
            for distance in methods.get(method, {}):
                cells = [values[column][kind][method][distance] for column in columns]
                recovered = _recovered(values, (kind, method, distance))
                table.rows.append([RECALL_TITLES[kind], distance, *map(percent, cells), recovered])
        if table.rows:
            tables.append(table)
    return tables


def _task_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["tasks"]
    limit = values["settings"]["limit"]
    scope = "" if limit is None else f" (the first {limit:g} examples of each task)"
    table = Table(f"lm-evaluation-harness{scope}", ["task", "metric", *head, "recovery"])
    for task, metrics in values["model"].items():
        for metric in metrics:
            cells = []
            for column in columns:
                figure = values[column][task][metric]
                spread = "" if figure["stderr"] is None else f" ± {100 * figure['stderr']:.1f}"
                cells.append(f"{100 * figure['value']:.1f}{spread}")
            table.rows.append([task, metric, *cells, _recovered(values, (task, metric), lambda cell: cell["value"])])
    published = values.get("published")
    return [table, _published_table(published)] if published else [table]


def _published_table(published: dict) -> Table:
    """What others measured, in a table of its own."""
    tasks = list(published["rows"][0]["scores"])
    table = Table(
        f"published ({published['source']}, base {published['base']}), not measured here: percent",
        ["published", "tokens, 10^9", *tasks, "average", "without mmlu"],
    )
    for row in published["rows"]:
        figures = [row["tokens_b"], *row["scores"].values(), row["average"], row["average_without_mmlu"]]
        table.rows.append([row["model"], *("-" if figure is None else f"{figure:g}" for figure in figures)])
    return table


def _recovered(values: dict, path: tuple[str, ...], figure=lambda cell: cell) -> str:
    """The recovery at `path`, or, where the base has nothing to recover, words that say so."""
    recovery, base = values["recovery"], values.get("base")
    if recovery is None:
        return "-"
    for name in path:
        recovery = recovery[name]
        base = base[name]
    return BASE_SCORES_0 if figure(base) == 0 else percent(recovery)


PARTS = {
    "perplexity": _perplexity_tables,
    "agreement": _agreement_tables,
    "recall": _recall_tables,
    "tasks": _task_tables,
}


def eval_notes(result: dict) -> list[str]:
    """Sentences that belong under the tables."""
    column = result["model"]["base_column"]
    control = "window only: the same weights without recurrent branch and kept tokens"
    notes = [f"{column['label']}: {column['source']}. {control}."]
    if column["label"] != "base":
        notes.append("The original base is not at hand, so no recovery is shown; name it with --against.")
    if any(BASE_SCORES_0 in row for table in eval_tables(result) for row in table.rows):
        notes.append(f"{BASE_SCORES_0}: the base itself scores 0 there, so nothing can be concluded.")
    tasks = result.get("tasks", {})
    if "published" in tasks and tasks["published"] is None:
        notes.append("No figures are published for a base of these shapes.")
    return notes


def sample_table(result: dict) -> Table:
    """Prompts and continuations, a row each."""
    samples = result["samples"]
    columns = [column for column in TITLES if column in samples[0]]
    table = Table("samples", ["prompt", *(TITLES[column] for column in columns)])
    table.rows = [[sample["prompt"], *(sample[column].strip() for column in columns)] for sample in samples]
    return table


def sample_lines(result: dict) -> list[str]:
    """The same for people to read on a terminal, where columns of prose would be too narrow."""
    lines = []
    for number_, sample in enumerate(result.get("samples", []), 1):
        lines.append(f"sample {number_}, prompt: {sample['prompt']}")
        lines += [f"  {TITLES[column]}: {sample[column].strip()}" for column in TITLES if column in sample]
    return lines


def comparison_tables(results: dict[str, dict]) -> list[Table]:
    """The figures of several results files beside one another: a column for each model, its own base's under base.

    Args:
        results: name -> results file.
    """
    table = Table("figures of the model (of its base)", ["", *results])
    lines: dict[str, dict[str, str]] = {}
    for name, found in results.items():
        for label, shown in _headline(found).items():
            lines.setdefault(label, {})[name] = shown
    table.rows = [[label, *(cells.get(name, "-") for name in results)] for label, cells in lines.items()]
    return [table]


def _headline(found: dict) -> dict[str, str]:
    lines = {}
    evaluation = found.get("eval", {})
    if "perplexity" in evaluation:
        values = evaluation["perplexity"]
        label = f"perplexity, {values['text']['name']}"
        lines[label] = f"{number(values['model']['token'])} ({number(values['base']['token'])})"
    if "agreement" in evaluation:
        lines["KL from the base, nats a token"] = number(evaluation["agreement"]["model"]["kl"])
    for kind, methods in evaluation.get("recall", {}).get("model", {}).items():
        for method, cells in methods.items():
            for distance, share in cells.items():
                base = evaluation["recall"]["base"][kind][method][distance]
                label = f"recall, {RECALL_TITLES[kind]}, {METHOD_TITLES[method]}, {distance}"
                lines[label] = f"{percent(share)} ({percent(base)})"
    for task, metrics in evaluation.get("tasks", {}).get("model", {}).items():
        for metric, figure in metrics.items():
            base = evaluation["tasks"]["base"][task][metric]["value"]
            lines[f"{task}, {metric}"] = f"{percent(figure['value'])} ({percent(base)})"
    rows = {(row["which"], row["position"]): row for row in found.get("bench", {}).get("rows", [])}
    for (which, position), row in rows.items():
        if which == "model":
            base = rows.get(("base", position), {"latency_ms": None, "cache_bytes": None})
            lines[f"ms a token after {position}"] = f"{_mean(row['latency_ms'])} ({_mean(base['latency_ms'])})"
            lines[f"cache after {position}"] = f"{_bytes(row['cache_bytes'])} ({_bytes(base['cache_bytes'])})"
    return lines


def _mean(figure: dict | None) -> str:
    return "-" if figure is None else f"{figure['mean']:.3g}"


def bench_tables(result: dict) -> list[Table]:
    """Model and base side by side: decoding, prefill, cache and peak memory at every position."""
    rows = {(row["which"], row["position"]): row for row in result["rows"]}
    settings = result["settings"]
    sides = list(dict.fromkeys(row["which"] for row in result["rows"]))
    where = f"{result['model']['folder']}, {result['model']['dtype']}, batch {settings['batch_size']}"
    tables = []
    for title, columns in BENCH_TABLES.items():
        header = ["tokens", *(f"{which}, {unit}" for _, unit, _, _ in columns for which in sides)]
        table = Table(f"{title}: {where}", header)
        for position in sorted({row["position"] for row in result["rows"]}):
            both = [rows[which, position] for which in sides]
            cells = [show(row[name], row.get(note)) for name, _, note, show in columns for row in both]
            table.rows.append([str(position), *cells])
        tables.append(table)
    if "batch_sweep" in result:
        table = Table(f"largest batch at {settings['seq_len']} tokens", ["", "batch", "ms a step", "tokens/s", "why"])
        for row in result["batch_sweep"]:
            speed = (
                ("-", "-") if row["latency_ms"] is None else (f"{row['latency_ms']:.3g}", f"{row['tokens_per_s']:.4g}")
            )
            table.rows.append([row["which"], str(row["batch_size"]), *speed, row["note"]])
        tables.append(table)
    return tables


def bench_notes(result: dict) -> list[str]:
    """Sentences that belong under the table."""
    machine, settings = result["machine"], result["settings"]
    notes = [
        f"{machine['name']}, {machine['threads']} threads. Base: the same weights run as softmax attention with a "
        f"growing cache. Decoding: medians of {settings['new_tokens']} interleaved steps, mean and standard deviation "
        f"of {settings['repetitions']}; the base's cache is filled with random numbers, since a step takes as long "
        "whatever they are. Peak: weights and all that was allocated while reading the text and decoding a token. Of "
        f"limit: the least time that {machine['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s of memory and "
        f"{machine['matmul_flops_per_s'] / 1e9:.3g} GFLOP/s, both measured here, allow; weights that stay in the "
        "processor's cache can beat it.",
        *_backend_notes(result.get("backend")),
    ]
    flat = [
        f"{which} {row['ratio']['median']:.2f} times as long after {row['to']} tokens as after {row['from']}"
        for which, row in result.get("flatness", {}).items()
    ]
    if flat:
        notes.append(f"A step of decoding takes (median over repetitions): {'; '.join(flat)}.")
    if speedup := result.get("prefill_speedup"):
        notes.append(f"The model reads {speedup['position']} tokens {speedup['ratio']:.3g} times as fast as the base.")
    stopped = [
        f"{row['which']} at {row['position']} tokens: {what} {row[name]}"
        for row in result["rows"]
        for name, what in (("prefill_note", "prefill"), ("latency_note", "decoding"))
        if row[name]
    ]
    return notes + ([". ".join(stopped) + "."] if stopped else [])


def _backend_notes(backend: dict | None) -> list[str]:
    """What ran the kernels. Results of earlier versions do not say."""
    if not backend:
        return []
    rows = {**backend["gates"], "window": backend["window"]}
    return ["Kernels: " + "; ".join(f"{name} on {row['backend']} ({row['why']})" for name, row in rows.items()) + "."]


def _spread(figure: dict | None, note: str | None) -> str:
    if figure is None:
        return (note or "-").partition(":")[0]
    spread = "" if figure["std"] is None else f" ± {figure['std']:.2g}"
    return f"{figure['mean']:.3g}{spread}"


def _bytes(count: int | None, _note: str | None = None) -> str:
    return "-" if count is None else size(count)


BENCH_TABLES = {
    "decoding after that many tokens": (
        ("latency_ms", "ms a token", "latency_note", _spread),
        ("roofline_fraction", "of limit", None, lambda value, _note: percent(value)),
        ("cache_bytes", "cache", None, _bytes),
    ),
    "reading that many tokens": (
        ("prefill_s", "s", "prefill_note", _spread),
        ("peak_bytes", "peak memory", None, _bytes),
    ),
}
