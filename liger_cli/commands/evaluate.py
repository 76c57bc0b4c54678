"""`liger eval`: what a model still makes of a text, by position, and harness tasks, beside its base and its window."""

import json
import math
from functools import partial
from pathlib import Path

from liger_cli.checkpoint.folders import next_step, resolve_model
from liger_cli.checkpoint.reader import check_dtype, context_length
from liger_cli.checkpoint.tokenizer import check_ids
from liger_cli.commands.evaluate_options import EvaluateOptions
from liger_cli.commands.options import check_positive
from liger_cli.evaluation.harness import check_tasks, parse_metadata, parse_tasks, run_tasks
from liger_cli.evaluation.published import TASKS as PUBLISHED_TASKS
from liger_cli.evaluation.published import published_figures
from liger_cli.evaluation.recovery import FAILS_BELOW, Gap, nats_gap, recall_gap, scale, task_gap
from liger_cli.evaluation.report import (
    comparison_notes,
    comparison_tables,
    eval_notes,
    eval_tables,
    sample_lines,
    sample_table,
)
from liger_cli.evaluation.results import read_results, shown, stamp
from liger_cli.evaluation.samples import write_samples
from liger_cli.evaluation.scoring import Rows, batch_size_for, make_rows, read_texts, score
from liger_cli.evaluation.subject import COLUMNS, Subject, base_folder, open_subject, read_kind
from liger_cli.shipped import prose
from liger_cli.system.console import say
from liger_cli.system.errors import UsageError
from liger_cli.system.progress import progress
from liger_cli.system.tables import FORMATS, print_tables

SHIPPED_TEXT = "shipped prose (Opticks)"  # calibrations are fitted on the other one
SEQ_LEN = 2048
ROWS = 8
COUNT = 10
SEED = 0
DISTANCES = (128, 512)  # of needles in tokens, four times as far from one to the next
NEEDLE_TOKENS = 300  # of a row, beside the distance: text before the needle, statement, question and answer
PARTS = ("perplexity", "recall")

# Fields of `EvaluateOptions` that `evaluate` takes as they are.
PASSED = ("num_fewshot", "limit", "include_path", "samples", "seq_len", "rows", "seed", "beyond_context")


def run(model: str | None = None, *, as_json: bool = False, quiet: bool = False, **options) -> dict:
    """Evaluate, print, and put the results into the model's folder.

    Args:
        model, options: fields of `EvaluateOptions`; `recall_distances` may be numbers, `metadata` a dictionary.
        quiet: print nothing.
    Returns:
        What `--json` prints.
    """
    asked = EvaluateOptions(model=model, **options)
    output_format = "json" if as_json else asked.output_format
    if output_format not in FORMATS:
        raise UsageError(f"--format is {output_format!r}, but has to be one of {', '.join(FORMATS)}")
    if asked.compare:
        return _compare(tuple(asked.compare), output_format, quiet)
    batch_size, distances = parse_batch_size(asked.batch_size), parse_distances(asked.recall_distances)
    metadata = parse_metadata(asked.metadata)
    folder = resolve_model(asked.model, "eval")
    read_kind(folder)
    parts = tuple(name for name, wanted in zip(PARTS, (asked.perplexity, asked.recall), strict=True) if wanted)
    check_positive(asked, "seq_len", "rows", "recall_count", *(["samples"] if asked.samples else []))
    texts = None if asked.data is None else read_texts(Path(asked.data))
    if asked.against is not None:
        base_folder(asked.against)
    check_dtype(asked.dtype, "auto")
    tasks = parse_tasks(asked.tasks) if asked.tasks else ()
    if tasks:
        check_tasks(tasks, asked.num_fewshot, asked.limit, asked.include_path)
    subject = open_subject(folder, against=asked.against, device=asked.device, dtype=asked.dtype)
    result = evaluate(
        subject,
        parts=parts or (() if tasks or asked.samples else PARTS),
        texts=texts,
        source=SHIPPED_TEXT if asked.data is None else Path(asked.data).name,
        tasks=tasks,
        distances=distances,
        count=asked.recall_count,
        batch_size=batch_size,
        metadata=metadata,
        **{name: getattr(asked, name) for name in PASSED},
    )
    subject.check_unchanged()
    notes = eval_notes(result)
    if asked.save:
        from liger_cli.evaluation.results_card import keep_result

        notes += keep_result(folder, "eval", result)
    notes.append(next_step("adapter" if subject.kind == "adapter" else "evaluated", folder))
    if quiet:
        return result
    if output_format == "json":
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        tables = eval_tables(result)
        if "samples" in result and output_format != "table":
            tables.append(sample_table(result))
        lines = sample_lines(result) if output_format == "table" else []
        print_tables(tables, output_format, (*lines, *notes))
    return result


def _compare(files: tuple[str, ...], output_format: str, quiet: bool) -> dict:
    results = {name: read_results(Path(name)) for name in files}
    where = Path(files[0] if len(files) == 1 else "one of the results files")
    if quiet:
        return results
    if output_format == "json":
        print(shown(lambda: json.dumps(results, indent=2, allow_nan=False), where))
    else:
        notes = shown(lambda: comparison_notes(results), where)
        notes = (*notes, "next: liger bench MODEL shows what each costs")
        print_tables(shown(lambda: comparison_tables(results), where), output_format, notes)
    return results


def evaluate(
    subject: Subject,
    *,
    parts: tuple[str, ...] = PARTS,
    texts: list[str] | None = None,
    source: str = SHIPPED_TEXT,
    tasks: tuple[str, ...] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    metadata: dict | None = None,
    samples: int = 0,
    seq_len: int = SEQ_LEN,
    rows: int = ROWS,
    distances: tuple[int, ...] | None = None,
    count: int = COUNT,
    seed: int = SEED,
    batch_size: int | None = None,
    beyond_context: bool = False,
) -> dict:
    """Measure the parts and return what `--json` prints.

    Args:
        parts: `perplexity` (of the text, and the KL divergence from the base), `recall` (needles in the text, and the
            second reading of a passage).
        texts: documents; by default the shipped prose that no calibration is fitted on. source: what they are called.
        tasks, num_fewshot, limit, include_path, metadata: see `harness.run_tasks`.
        samples: generations, of the beginnings of the text's documents.
        seq_len: tokens of a row of the text. rows: how many are read, at most.
        distances: of the needles, in tokens; by default 128, 512 ... and as far as a row of `seq_len` tokens reaches.
        count: needles of each distance. seed: of needles and passages.
        batch_size: sequences a pass; as many as fit by default.
        beyond_context: let rows and needles be longer than the base's context.
    """
    result = {**stamp(), "seed": seed, "model": subject.describe()}
    texts = texts or prose()[1:]
    if tasks:  # first: their data may be missing
        result["tasks"] = _tasks(
            subject,
            tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            include_path=include_path,
            metadata=metadata,
        )
    if parts:
        context = None if beyond_context else context_length(subject.liger_model.config.to_dict())
        seq_len, distances = _within(context, seq_len, distances)
        text = make_rows(subject.tokenizer, texts, seq_len, rows)
        check_ids(max(text.stream), subject.liger_model.config.vocab_size, subject.folder)
        about = {"name": source, "tokens": text.tokens, "bytes": text.nbytes, "seq_len": seq_len}
        if "perplexity" in parts:
            result |= _score(subject, text, about, batch_size)
        if "recall" in parts:
            result["recall"] = {**_recall(subject, text.stream, distances, count, seed, context), "text": about}
    if samples:
        result["samples"] = write_samples(subject, texts, samples)
    return result


def _within(context: int | None, seq_len: int, distances: tuple[int, ...] | None) -> tuple[int, tuple[int, ...]]:
    """Tokens of a row and distances of needles that the base's context has room for; what is left out is said."""
    longest = seq_len if context is None else min(seq_len, context)
    if longest < seq_len:
        say(f"the base's context is {context:,} tokens, so rows have {longest:,}; --beyond-context goes further")
    if distances is None:
        return longest, default_distances(longest)
    room = [distance for distance in distances if context is None or distance + NEEDLE_TOKENS <= context]
    if left := [str(distance) for distance in distances if distance not in room]:
        say(
            f"no needles {', '.join(left)} tokens back: with text and question around them they do not fit into the "
            f"base's context of {context:,} tokens; --beyond-context asks for them all the same"
        )
    return longest, tuple(room)


def default_distances(seq_len: int) -> tuple[int, ...]:
    """128, 512, 2,048 ... tokens, and the furthest that a row of `seq_len` tokens has room for."""
    furthest = (seq_len - NEEDLE_TOKENS) // 100 * 100
    distances = list(DISTANCES)
    while distances[-1] < furthest:
        distances.append(4 * distances[-1])
    return (*(one for one in distances if one <= 3 * furthest // 4), *((furthest,) if furthest > 0 else ()))


def _tasks(subject: Subject, tasks: tuple[str, ...], **settings) -> dict:
    found = run_tasks(subject, tasks, **settings)
    result = {
        **found,
        "recovery": _task_recovery(found) if subject.has_recovery else None,
        "settings": {name: settings[name] for name in ("num_fewshot", "limit", "metadata")},
    }
    if set(tasks) & set(PUBLISHED_TASKS):
        result["published"] = published_figures(subject.liger_model.config)
    return result


def _task_recovery(found: dict) -> dict:
    recovery: dict[str, dict] = {}
    for task, metrics in found["model"].items():
        recovery[task] = {}
        for metric, figure in metrics.items():
            base, control = (found[column][task][metric] for column in ("base", "window_only"))
            gap, model = task_gap(metric, base, control, found["chance"][task][metric]), scale(metric, figure)
            recovery[task][metric] = None if gap is None or model is None else gap.closed_by(model)
    return recovery


def _score(subject: Subject, rows: Rows, about: dict, batch_size: int | None) -> dict:
    size = batch_size_for(rows, subject.liger_model.config.vocab_size, batch_size)
    with progress("perplexity", -(-len(rows.ids) // size) * len(COLUMNS)) as step:
        found = score(subject, rows, batch_size=batch_size, step=step)
    recoveries = {"perplexity": _perplexity_recovery, "agreement": _agreement_recovery}
    for part, values in found.items():
        values |= {"recovery": recoveries[part](values) if subject.has_recovery else None, "text": about}
    return found


def _perplexity_recovery(values: dict) -> dict:
    """Of the nats a token."""

    def closed(pick) -> float | None:
        base, model, control = (math.log(pick(values[column])) for column in COLUMNS)
        return nats_gap(base, control).closed_by(-model)

    buckets = values["model"]["by_position"]
    return {
        "token": closed(lambda column: column["token"]),
        "by_position": {name: closed(lambda column, name=name: column["by_position"][name]) for name in buckets},
    }


def _agreement_recovery(values: dict) -> dict:
    base, model, control = (values[column] for column in COLUMNS)
    return {
        "kl": nats_gap(base["kl"], control["kl"]).closed_by(-model["kl"]),
        "top1": Gap(base["top1"], control["top1"]).closed_by(model["top1"]),
        "by_position": {
            name: nats_gap(0.0, control["by_position"][name]).closed_by(-kl)
            for name, kl in model["by_position"].items()
        },
    }


def _recall(
    subject: Subject, text: list[int], distances: tuple[int, ...], count: int, seed: int, context: int | None
) -> dict:
    """Needles and the second reading in every column; the base alone, and the nearest needles only, where it fails."""
    from liger_cli.evaluation.position import BEFORE, GAP, PASSAGE, needle, second_reading

    columns = {name: partial(subject.column, name) for name in COLUMNS}
    found: dict = {name: {"needle": {}} for name in COLUMNS} | {"count": count, "base_fails": None}
    ask = partial(needle, tokenizer=subject.tokenizer, text=text, count=count, seed=seed)
    with progress("needles", max(1, len(distances)) * len(COLUMNS)) as step:
        first = ask({"base": columns["base"]}, distances=distances[:1], step=step)["base"]
        found["base"]["needle"] |= first
        if first and max(one["exact"] for one in first.values()) <= FAILS_BELOW:
            found["base_fails"] = next(iter(first))
        else:
            others = {name: opened for name, opened in columns.items() if name != "base"}
            for these, those in ((others, distances[:1]), (columns, distances[1:])):
                for name, shares in ask(these, distances=those, step=step).items():
                    found[name]["needle"] |= shares
    gap = GAP if context is None else min(GAP, context - BEFORE[0] - 2 * PASSAGE)
    try:
        if gap < 1:
            raise ValueError(f"a row with a passage read twice does not fit into a context of {context} tokens")
        for name, nats in second_reading(columns, text, gap=gap, seed=seed).items():
            found[name]["second_reading"] = nats
        found["gap"] = gap
    except ValueError as error:
        say(f"no second reading: {error}")
    found["recovery"] = _recall_recovery(found) if subject.has_recovery else None
    return found


def _recall_recovery(found: dict) -> dict:
    base, model, control = (found[column] for column in COLUMNS)
    recovery = {
        "needle": {
            distance: recall_gap(base["needle"][distance]["exact"], share["exact"]).closed_by(
                model["needle"][distance]["exact"]
            )
            for distance, share in control["needle"].items()
        }
    }
    if "second_reading" in base:
        gap = nats_gap(base["second_reading"], control["second_reading"])
        recovery["second_reading"] = gap.closed_by(-model["second_reading"])
    return recovery


def parse_batch_size(text: str | int) -> int | None:
    """`8` as a number; `auto`, as many as fit, as None. Raises UsageError."""
    text = str(text)
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"--batch-size is {text!r}, but has to be a number of sequences, or auto")
    return int(text)


def parse_distances(text: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """`16,64,256` as numbers; numbers and None as they are. Raises UsageError."""
    if not isinstance(text, str):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--recall-distances is {text!r}, but has to be a list of tokens such as 64,256,1024")
    return tuple(sorted({int(part) for part in parts}))
