"""`liger eval`: perplexity, agreement, recall and harness tasks of a model beside its base and its window alone."""

import json
from pathlib import Path

from liger_cli.checkpoint.folders import resolve_model
from liger_cli.checkpoint.tokenizer import check_ids
from liger_cli.evaluation.harness import check_tasks, parse_tasks, run_tasks
from liger_cli.evaluation.published import TASKS as PUBLISHED_TASKS
from liger_cli.evaluation.published import published_figures
from liger_cli.evaluation.recall import KINDS, METHODS, generated_count, measure
from liger_cli.evaluation.report import (
    FORMATS,
    comparison_notes,
    comparison_tables,
    eval_notes,
    eval_tables,
    print_tables,
    sample_lines,
    sample_table,
)
from liger_cli.evaluation.results import read_results, shown, stamp
from liger_cli.evaluation.samples import write_samples
from liger_cli.evaluation.scoring import batch_size_for, make_rows, read_texts, score
from liger_cli.evaluation.subject import COLUMNS, Subject, open_subject
from liger_cli.shipped.probes import DISTANCES, held_out_text
from liger_cli.shipped.text import TEST_SEED
from liger_cli.system.errors import UsageError
from liger_cli.system.progress import progress

SEQ_LEN = 1024
SHIPPED_CHARACTERS = 60_000
COUNT = 32


def run(
    model: str | None = None,
    *,
    against: str | None = None,
    perplexity: str | None = None,
    recall: bool = False,
    agreement: bool = False,
    tasks: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    metadata: dict | None = None,
    samples: int = 0,
    compare: tuple[str, ...] = (),
    seq_len: int = SEQ_LEN,
    distances: tuple[int, ...] = DISTANCES,
    count: int = COUNT,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output_format: str = "table",
    save: bool = True,
) -> dict:
    """Evaluate, print, and put the results into the model's folder. Parameters as for `evaluate`.

    Args:
        model: a folder; the newest fitting one in the current folder by default.
        perplexity: a file whose perplexity is measured, instead of the shipped held-out text.
        recall, agreement: parts to run. Where no part is asked for, perplexity, agreement and recall are.
        tasks: of the harness, see `harness.run_tasks`; num_fewshot, limit, include_path, metadata: for them.
        samples: generations to show.
        compare: results files, or folders that have one: show them beside one another and measure nothing.
        output_format: `table`, `md`, `json` or `csv`.
        save: write `results.json` and the model card's section into the folder.
    """
    if output_format not in FORMATS:
        raise UsageError(f"--format is {output_format!r}, but has to be one of {', '.join(FORMATS)}")
    if compare:
        return _compare(compare, output_format)
    folder = resolve_model(model, "eval")
    parts = {"perplexity": perplexity is not None, "recall": recall, "agreement": agreement}
    if not (any(parts.values()) or tasks or samples):
        parts = dict.fromkeys(parts, True)
    for option, value in (
        ("--seq-len", seq_len),
        ("--batch-size", batch_size),
        ("--recall-count", count),
        ("--samples", samples or None),
    ):
        _check_positive(option, value)
    task_names = parse_tasks(tasks) if tasks else ()
    if task_names:
        check_tasks(task_names, num_fewshot, limit, include_path)
    subject = open_subject(folder, against=against, device=device, dtype=dtype)
    result = evaluate(
        subject,
        parts=tuple(name for name, wanted in parts.items() if wanted),
        text=perplexity,
        tasks=task_names,
        num_fewshot=num_fewshot,
        limit=limit,
        include_path=include_path,
        metadata=metadata,
        samples=samples,
        seq_len=seq_len,
        distances=distances,
        count=count,
        seed=TEST_SEED if seed is None else seed,
        batch_size=batch_size,
    )
    subject.check_unchanged()
    notes = eval_notes(result)
    if save:
        from liger_cli.evaluation.results_card import keep_result

        notes += keep_result(folder, "eval", result)
    if output_format == "json":
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        tables = eval_tables(result)
        if "samples" in result and output_format != "table":
            tables.append(sample_table(result))
        lines = sample_lines(result) if output_format == "table" else []
        print_tables(tables, output_format, (*lines, *notes))
    return result


def _compare(files: tuple[str, ...], output_format: str) -> dict:
    results = {name: read_results(Path(name)) for name in files}
    where = Path(files[0] if len(files) == 1 else "one of the results files")
    if output_format == "json":
        print(shown(lambda: json.dumps(results, indent=2, allow_nan=False), where))
    else:
        notes = shown(lambda: comparison_notes(results), where)
        print_tables(shown(lambda: comparison_tables(results), where), output_format, notes)
    return results


def evaluate(
    subject: Subject,
    *,
    parts: tuple[str, ...] = ("perplexity", "agreement", "recall"),
    text: str | None = None,
    tasks: tuple[str, ...] = (),
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    metadata: dict | None = None,
    samples: int = 0,
    seq_len: int = SEQ_LEN,
    distances: tuple[int, ...] = DISTANCES,
    count: int = COUNT,
    kinds: tuple[str, ...] = KINDS,
    methods: tuple[str, ...] = METHODS,
    seed: int = TEST_SEED,
    batch_size: int | None = None,
) -> dict:
    """Measure the parts and return what `--json` prints.

    Args:
        text: a file; the shipped held-out text by default.
        tasks, num_fewshot, limit, include_path, metadata: see `harness.run_tasks`.
        samples: generations, of the beginnings of the text's documents.
        seq_len: tokens a row of the text.
        distances: of the recall probes, in tokens.
        count: probes of each kind and distance.
        batch_size: sequences a pass; as many as fit by default.
    """
    result = {**stamp(), "seed": seed, "model": subject.describe()}
    given = None if text is None else read_texts(Path(text))
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
    if "perplexity" in parts or "agreement" in parts:
        texts = given or held_out_text(SHIPPED_CHARACTERS)
        result |= _score(subject, parts, text, texts, seq_len, batch_size)
    if "recall" in parts:
        steps = len(kinds) * len(distances) * len(COLUMNS) * len(methods)
        with progress("recall", steps) as step:
            found = measure(
                subject,
                distances,
                count=count,
                kinds=kinds,
                methods=methods,
                seed=seed,
                batch_size=batch_size or 16,
                step=step,
            )
        counts = {"teacher_forced": count, "generation": generated_count(count)}
        result["recall"] = {**found, "recovery": _recovery(found, subject), "count": counts}
    if samples:
        result["samples"] = write_samples(subject, given or held_out_text(4000 * samples), samples)
    return result


def _tasks(subject: Subject, tasks: tuple[str, ...], **settings) -> dict:
    found = run_tasks(subject, tasks, **settings)
    recovery = {
        task: {metric: _regained(found["base"][task][metric], figure) for metric, figure in metrics.items()}
        for task, metrics in found["model"].items()
    }
    result = {
        **found,
        "recovery": recovery if subject.has_recovery else None,
        "settings": {name: settings[name] for name in ("num_fewshot", "limit", "metadata")},
    }
    if set(tasks) & set(PUBLISHED_TASKS):
        result["published"] = published_figures(subject.liger_model.config)
    return result


def _regained(base: dict, model: dict) -> float | None:
    """Of a task's figure: model over base, or base over model where lower is better; None where there is no ratio."""
    over, under = model["value"], base["value"]
    if model["higher_is_better"] is False:
        over, under = under, over
    return None if over is None or not under else over / under


def _score(subject: Subject, parts, text: str | None, texts: list[str], seq_len: int, batch_size: int | None) -> dict:
    name = "the shipped held-out text" if text is None else str(text)
    rows = make_rows(subject.tokenizer, texts, seq_len)
    check_ids(int(rows.ids.max()), subject.liger_model.config.vocab_size, subject.folder)
    size = batch_size_for(rows, subject.liger_model.config.vocab_size, batch_size)
    with progress("perplexity", -(-len(rows.ids) // size) * len(COLUMNS)) as step:
        found = score(subject, rows, batch_size=batch_size, agreement="agreement" in parts, step=step)
    scored = {"name": name, "tokens": rows.tokens, "bytes": rows.nbytes, "seq_len": seq_len}
    if "perplexity" not in parts:
        del found["perplexity"]
    for part, values in found.items():
        values["recovery"] = None
        values["text"] = scored
        if part == "agreement":
            values["recovery"] = values["model"]["top1"] if subject.has_recovery else None
        elif subject.has_recovery:
            values["recovery"] = _ratios(values["base"], values["model"])
    return found


def _recovery(found: dict, subject: Subject):
    return _ratios(found["model"], found["base"]) if subject.has_recovery else None


def _ratios(over, under):
    """The same nested figures, divided; None where the divisor is 0."""
    if isinstance(over, dict):
        return {name: _ratios(over[name], under[name]) for name in over}
    return over / under if under else None


def _check_positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{option} is {value}, but has to be 1 or more")


def parse_batch_size(text: str | None) -> int | None:
    """`8` as a number; `auto`, as many as fit, as None. Raises UsageError."""
    if text is None or text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"--batch-size is {text!r}, but has to be a number of sequences, or auto")
    return int(text)


def parse_distances(text: str) -> tuple[int, ...]:
    """`16,64,256` as numbers. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--recall-distances is {text!r}, but has to be a list of tokens such as 64,256,1024")
    return tuple(sorted({int(part) for part in parts}))
