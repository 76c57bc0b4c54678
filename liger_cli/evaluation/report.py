"""The tables of results, made from the JSON that the commands print."""

from collections.abc import Callable
from pathlib import Path

from liger_cli.evaluation.recovery import BASE_FAILS, ERRORS, FAILS_BELOW, LEAST_NATS, NO_GAP, recall_gap, task_gap
from liger_cli.evaluation.subject import BASE, TITLES
from liger_cli.system.tables import Table
from liger_cli.system.wording import counted, size


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
        f"perplexity of {source['name']} ({source['tokens']:,} tokens, rows of {source['seq_len']:,})",
        ["", *head, "recovery"],
    )
    rows: list[tuple[str, Callable]] = [("a token", lambda column: column["token"])]
    for bucket in values["model"]["by_position"]:
        rows.append((f"at tokens {bucket}", lambda column, bucket=bucket: column["by_position"][bucket]))
    for name, pick in rows:
        shown = "-" if recovery is None else recovered(pick(recovery))
        table.rows.append([name, *(number(pick(values[column])) for column in columns), shown])
    table.rows.append(["a byte", *(number(values[column]["byte"]) for column in columns), "-"])
    return [table]


def _agreement_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["agreement"]
    recovery = values["recovery"]
    others, titles = columns[1:], head[1:]  # the base agrees with itself
    table = Table(f"agreement with the {head[0]} column on the same text", ["", *titles, "recovery"])
    rows: list[tuple[str, Callable, Callable]] = [("KL divergence, nats a token", lambda column: column["kl"], number)]
    for bucket in values["model"]["by_position"]:
        rows.append((f"at tokens {bucket}", lambda column, bucket=bucket: column["by_position"][bucket], number))
    rows.append(("same most likely token", lambda column: column["top1"], percent))
    for name, pick, show in rows:
        shown = "-" if recovery is None else recovered(pick(recovery))
        table.rows.append([name, *(show(pick(values[column])) for column in others), shown])
    return [table]


def _recall_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["recall"]
    recovery = values["recovery"]
    table = Table(
        f"recall in {values['text']['name']}: {counted(values['count'], 'needle')} a distance, answered exactly",
        ["", *head, "recovery"],
    )
    for distance in values["model"]["needle"]:
        cells = [values[column]["needle"][distance]["exact"] for column in columns]
        shown = "-"
        if recovery is not None:
            ends = (values[column]["needle"][distance]["exact"] for column in ("base", "window_only"))
            shown = recovered(recovery["needle"][distance], recall_gap(*ends).missing)
        table.rows.append([f"a code stated {int(distance):,} tokens before", *map(percent, cells), shown])
    if "second_reading" in values["model"]:
        shown = "-" if recovery is None else recovered(recovery["second_reading"])
        cells = [number(values[column]["second_reading"]) for column in columns]
        table.rows.append([f"second reading, {values['gap']} tokens between: nats a token", *cells, shown])
    return [table] if table.rows else []


def base_fails_note(result: dict) -> str | None:
    """A sentence where the base itself does not find what a text said, so that no needles were asked for."""
    values = result.get("recall", {})
    distance = values.get("base_fails")
    if distance is None:
        return None
    right = round(values["base"]["needle"][distance]["exact"] * values["count"])
    return (
        f"Needles: the base itself answers {right} of {values['count']} a mere {distance} tokens back, so neither the "
        "model nor longer distances were asked."
    )


def _task_tables(result: dict, columns: list[str], head: list[str]) -> list[Table]:
    values = result["tasks"]
    harness = values.get("harness", {}).get("lm_eval")
    title = " ".join(filter(None, ("lm-evaluation-harness", harness, _scope(values["settings"]["limit"]))))
    table = Table(title, ["task", "shots", "metric", *head, "recovery"])
    for task, metrics in values["model"].items():
        shots = values.get("details", {}).get(task, {}).get("num_fewshot")
        for metric in metrics:
            figures = [values[column][task][metric] for column in columns]
            share = _is_share(figures)
            cells = [_task_figure(figure, share) for figure in figures]
            shown = "-"
            if values["recovery"] is not None:
                ends = (values[column][task][metric] for column in ("base", "window_only"))
                gap = task_gap(metric, *ends, values["chance"][task][metric])
                shown = recovered(values["recovery"][task][metric], gap and gap.missing)
            name = f"{metric}, %" if share else metric
            table.rows.append([task, "-" if shots is None else f"{shots}", name, *cells, shown])
    published = values.get("published")
    return [table, _published_table(published)] if published else [table]


def _scope(limit: float | None) -> str:
    if limit is None:
        return ""
    share = percent(limit) if limit < 1 else f"the first {limit:g}"
    return f"({share} of each task's examples)"


def _is_share(figures: list[dict]) -> bool:
    """Whether a metric is an accuracy or the like, shown in percent, and no perplexity."""
    known = [figure["value"] for figure in figures if figure["value"] is not None]
    return figures[0].get("higher_is_better") is not False and all(0 <= value <= 1 for value in known)


def _task_figure(figure: dict, share: bool) -> str:
    if figure["value"] is None:
        return "-"
    show = (lambda value: f"{100 * value:.1f}") if share else number
    return show(figure["value"]) + ("" if figure["stderr"] is None else f" ± {show(figure['stderr'])}")


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


def recovered(share: float | None, missing: str | None = NO_GAP) -> str:
    """The share of the gap that is closed, in percent, or in words why there is none."""
    return (missing or "-") if share is None else percent(share)


PARTS = {
    "perplexity": _perplexity_tables,
    "agreement": _agreement_tables,
    "recall": _recall_tables,
    "tasks": _task_tables,
}


MISSING = {
    BASE_FAILS: (
        f"{BASE_FAILS}: the base itself answers no more than {100 * FAILS_BELOW:g} %, or is within {ERRORS} standard "
        "errors of chance, so nothing can be concluded about the model."
    ),
    NO_GAP: (
        f"{NO_GAP}: window only is as good as the base, within {LEAST_NATS} nats a token, {100 * FAILS_BELOW:g} % of "
        f"the needles or {ERRORS} standard errors of a task, so this does not see what was linearized."
    ),
}


def eval_notes(result: dict) -> list[str]:
    """Sentences that belong under the tables."""
    column = result["model"]["base_column"]
    control = "window only: the same weights without recurrent branch and kept tokens"
    notes = [f"{column['label']}: {column['source']}. {control}."]
    if column["label"] != BASE:
        notes.append("The original base is not at hand, so no recovery is shown; name it with --against.")
    elif any(table.header[-1] == "recovery" for table in eval_tables(result)):
        notes.append(
            "recovery: the share of the gap between window only and base that the model closes, less than 0 where the "
            "model is worse than window only; of perplexities in nats."
        )
        tables = [table for table in eval_tables(result) if table.header[-1] == "recovery"]
        shown = {row[-1] for table in tables for row in table.rows}
        notes += [sentence for word, sentence in MISSING.items() if word in shown]
    if failed := base_fails_note(result):
        notes.append(failed)
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
    """The figures of several results files beside one another, a column for each model.

    Args:
        results: name -> results file.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[tuple[str, ...], dict[str, str]]] = {}
    for name, result in results.items():
        for title, head, labels, cell in (*_evaluated(result), *_timed(result)):
            found.setdefault((title, head), {}).setdefault(labels, {})[name] = cell
    names = [name.removesuffix("/results.json") or name for name in results]
    tables = []
    for (title, head), lines in found.items():
        rows = [[*labels, *(cells.get(name, "-") for name in results)] for labels, cells in lines.items()]
        tables.append(Table(title, [*head, *names], rows))
    return tables


def comparison_notes(results: dict[str, dict]) -> list[str]:
    """A sentence for each model whose base column is not its base."""
    labels = {
        name: found["eval"]["model"]["base_column"]["label"] for name, found in results.items() if "eval" in found
    }
    return [f"{name}: in place of its base stands {label}." for name, label in labels.items() if label != BASE]


BESIDE = "the model (its base; its window alone)"


def _evaluated(found: dict) -> list[tuple[str, tuple[str, ...], tuple[str, ...], str]]:
    """(title of the table, names of the labels, labels, cell) of every figure of an evaluation."""
    lines, evaluation = [], found.get("eval", {})

    def add(title: str, head: tuple, labels: tuple, part: str, path: tuple, show: Callable) -> None:
        model, base, window = (show(_at(evaluation[part][column], path)) for column in ("model", "base", "window_only"))
        lines.append((f"{title}: {BESIDE}", head, labels, f"{model} ({base}; {window})"))

    if "perplexity" in evaluation:
        text = evaluation["perplexity"]["text"]
        title = f"perplexity of {text['name']}, rows of {text['seq_len']}"
        add(title, ("",), ("a token",), "perplexity", ("token",), number)
        add(title, ("",), ("a byte",), "perplexity", ("byte",), number)
    if "agreement" in evaluation:
        title = f"agreement with the base on {evaluation['agreement']['text']['name']}"
        add(title, ("",), ("KL, nats a token",), "agreement", ("kl",), number)
        for bucket in evaluation["agreement"]["model"]["by_position"]:
            add(title, ("",), (f"at tokens {bucket}",), "agreement", ("by_position", bucket), number)
        add(title, ("",), ("same top token, %",), "agreement", ("top1",), _points)
    recall = evaluation.get("recall", {})
    for distance in recall["model"]["needle"] if recall else ():
        labels = (f"a code stated {int(distance):,} tokens before, %",)
        add("recall", ("",), labels, "recall", ("needle", distance, "exact"), _points)
    if "second_reading" in recall.get("model", {}):
        labels = (f"second reading, {recall['gap']} tokens between: nats",)
        add("recall", ("",), labels, "recall", ("second_reading",), number)
    for task, metrics in evaluation.get("tasks", {}).get("model", {}).items():
        for metric in metrics:
            share = _is_share([evaluation["tasks"][column][task][metric] for column in TITLES])
            labels = (task, f"{metric}, %" if share else metric)
            show = _points if share else number
            add("lm-evaluation-harness", ("task", "metric"), labels, "tasks", (task, metric, "value"), show)
    return lines


def _points(share: float | None) -> str:
    """Percent without the sign: 100, 97.6."""
    return "-" if share is None else f"{100 * share:.1f}".removesuffix(".0")


def _at(values: dict, path: tuple[str, ...]):
    for name in path:
        values = values[name]
    return values


def _timed(found: dict) -> list[tuple[str, tuple[str, ...], tuple[str, ...], str]]:
    """As `_evaluated`, of a benchmark."""
    lines = []
    rows = {(row["which"], row["position"]): row for row in found.get("bench", {}).get("rows", [])}
    for title, name, show in (
        ("decoding, ms a token", "latency_ms", _mean),
        ("reading, s", "prefill_s", _mean),
        ("cache", "cache_bytes", _bytes),
    ):
        for (which, position), row in rows.items():
            if which == "model":
                base = rows.get(("base", position), {}).get(name)
                cell = f"{show(row[name])} ({show(base)})"
                lines.append((f"{title}: the model (its base)", ("tokens",), (str(position),), cell))
    return lines


def _mean(figure: dict | None) -> str:
    return "-" if figure is None else f"{figure['mean']:.3g}"


def bench_tables(result: dict) -> list[Table]:
    """Model and base side by side: decoding, prefill, cache and peak memory at every position."""
    rows = {(row["which"], row["position"]): row for row in result["rows"]}
    settings = result["settings"]
    sides = list(dict.fromkeys(row["which"] for row in result["rows"]))
    where = f"{Path(result['model']['folder']).name}, {result['model']['dtype']}, batch {settings['batch_size']}"
    tables = []
    for title, columns in BENCH_TABLES.items():
        header = ["tokens", *(f"{which}, {unit}" for _, unit, _ in columns for which in sides)]
        table = Table(f"{title}: {where}", header)
        for position in sorted({row["position"] for row in result["rows"]}):
            both = [rows[which, position] for which in sides]
            cells = [show(row, name) for name, _, show in columns for row in both]
            table.rows.append([str(position), *cells])
        tables.append(table)
    if "batch_sweep" in result:
        table = Table(f"largest batch at {settings['seq_len']} tokens", ["", "batch", "ms a step", "tokens/s", "why"])
        for row in result["batch_sweep"]:
            batch = f"{'at least ' if row.get('at_least') else ''}{row['batch_size']}"
            speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.4g}"
            table.rows.append([row["which"], batch, _figure(row["latency_ms"]), speed, row["note"]])
        tables.append(table)
    return tables


def bench_notes(result: dict) -> list[str]:
    """Sentences that belong under the table."""
    machine, settings = result["machine"], result["settings"]
    threads = counted(machine["threads"], "thread")
    notes = [
        f"{machine['name']}, {threads}. Base: the same weights run as softmax attention with a "
        f"growing cache. Decoding: medians of {settings['new_tokens']} interleaved steps, mean and standard deviation "
        f"of {settings['repetitions']}; the base's cache is filled with random numbers, since a step takes as long "
        "whatever they are. Peak: weights and all that was allocated while reading the text and decoding a token. Of "
        f"roofline: the least time that {machine['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s of memory and "
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


def _figure(figure) -> str:
    """A mean with its standard deviation. Results of earlier versions have a plain number in some places."""
    if figure is None:
        return "-"
    if not isinstance(figure, dict):
        return f"{figure:.3g}"
    spread = "" if figure["std"] is None else f" ± {figure['std']:.2g}"
    return f"{figure['mean']:.3g}{spread}"


def _timing(row: dict, name: str) -> str:
    note = row["prefill_note" if name == "prefill_s" else "latency_note"]
    return _figure(row[name]) if row[name] is not None else (note or "-").partition(":")[0]


def _bytes(count: int | None) -> str:
    return "-" if count is None else size(count)


def _peak(row: dict, name: str) -> str:
    """The mean over runs with its standard deviation, in the mean's unit."""
    found = row.get(f"{name}_spread")
    if row[name] is None or found is None or found["std"] is None:
        return _bytes(row[name])
    mean, unit = size(found["mean"]).split()
    return f"{mean} ± {found['std'] * float(mean) / found['mean']:.1f} {unit}" if found["mean"] else _bytes(row[name])


BENCH_TABLES = {
    "decoding after that many tokens": (
        ("latency_ms", "ms a token", _timing),
        ("roofline_fraction", "of roofline", lambda row, name: percent(row[name])),
        ("cache_bytes", "cache", lambda row, name: _bytes(row[name])),
    ),
    "reading that many tokens": (
        ("prefill_s", "s", _timing),
        ("peak_bytes", "peak memory", _peak),
    ),
}
