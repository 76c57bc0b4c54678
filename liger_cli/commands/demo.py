"""`liger demo`: the whole main job on the shipped base, in minutes on a CPU, ending in one table of what came of it."""

import json
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from liger_cli.benchmark import bench
from liger_cli.commands import convert, evaluate, finetune, merge
from liger_cli.evaluation.report import Table, number, percent, print_tables
from liger_cli.evaluation.results import stamp
from liger_cli.evaluation.results_card import keep_result
from liger_cli.evaluation.subject import Subject, open_subject
from liger_cli.shipped import BASE_DIR
from liger_cli.shipped.probes import evaluate_recall, held_out_text
from liger_cli.system.errors import UsageError
from liger_cli.system.outputs import write_whole
from liger_cli.system.wording import size

FOLDER = "liger-demo"
REPORT = "demo.json"
NAME = "demo-liger-gla"
HYBRID = "demo-liger-gla-hybrid"
# Of the base's twelve key/value heads the one that recall needs most; `--softmax-heads auto:1` finds it in a minute.
SOFTMAX_HEADS = "4:0"
RECIPE_FILE = "recipe.yaml"
RECIPE = {
    "name": "demo",
    "description": "Minutes on a CPU: KL to the base, which is the same weights with LoRA off and softmax on.",
    "data": "demo",
    "seq_len": 512,
    "batch_size": 4,
    "micro_batch_size": 4,
    "held_out": 16,
    "schedule": "cosine",
    "save_steps": 1000,
    "eval_steps": 1000,
    "warmup": 0.05,
    "stages": [{"objective": "distill", "lr": 1e-3, "train": "lora"}],
}
STEPS = {NAME: 30, HYBRID: 15}
DISTANCES = (32, 64, 128, 256, 512)
COUNT = 32
CHARACTERS = 60_000
SEQ_LEN = 8192


def run(folder: str | Path | None = None, *, force: bool = False, as_json: bool = False) -> dict:
    """Convert, fine-tune, merge, evaluate and time the shipped base; print the table.

    Args:
        folder: to work in; `./liger-demo` by default.
        force: replace the folder of an earlier demo.
        as_json: print one JSON object instead of the table.
    Returns:
        What `--json` prints; it is also `demo.json` in the folder.
    Raises:
        UsageError: the folder is in the way. LigerError in all its kinds, OSError.
    """
    import yaml
    from transformers.utils import logging

    logging.set_verbosity_error()
    began = time.perf_counter()
    home = _fresh(Path(folder or FOLDER), force)
    base = home / "base"
    shutil.copytree(BASE_DIR, base)
    write_whole(home / RECIPE_FILE, yaml.safe_dump(RECIPE, sort_keys=False))
    columns: dict[str, dict] = {}
    seconds: dict[str, float] = {}
    # The hybrid first: what `liger eval` takes in this folder afterwards, the newest, is then the plain model.
    for name, softmax_heads in ((HYBRID, SOFTMAX_HEADS), (NAME, "none")):
        plain = name == NAME
        converted, adapter, merged = home / name, home / f"{name}-lora", home / f"{name}-merged"
        kept = "" if plain else f" --softmax-heads {softmax_heads}"
        with _step(f"liger convert base {name} --calibrate{kept}", seconds):
            convert.convert(str(base), str(converted), calibrate=True, softmax_heads=softmax_heads)
        if plain:
            with _step(f"liger eval {name}", seconds):
                columns |= _columns(open_subject(converted), {"model": "converted", "window_only": "window_untrained"})
        with _step(f"liger finetune {name} --recipe {RECIPE_FILE} --max-steps {STEPS[name]}", seconds):
            finetune.run(converted, recipe=str(home / RECIPE_FILE), output=adapter, max_steps=STEPS[name])
        with _step(f"liger merge {name}-lora", seconds):
            merge.run(adapter, output=merged, quiet=True)
        with _step(f"liger eval {name}-merged", seconds):
            subject = open_subject(merged)
            wanted = {"base": "base", "model": "trained", "window_only": "window"} if plain else {"model": "hybrid"}
            columns |= _columns(subject, wanted, keep=merged)
        with _step(f"liger bench {name}-merged --seq-len {SEQ_LEN}", seconds):
            sides = bench.SIDES if plain else ("model",)
            timed = bench.bench(subject, seq_len=SEQ_LEN, new_tokens=8, repetitions=3, base_limit=20, sides=sides)
            keep_result(merged, "bench", timed)
            _add_speed(columns["trained" if plain else "hybrid"], timed, "model")
            if plain:
                _add_speed(columns["base"], timed, "base")
    report = {
        **stamp(),
        "folder": str(home),
        "columns": columns,
        "softmax_heads_of_the_hybrid": SOFTMAX_HEADS,
        "seconds": {**seconds, "all": round(time.perf_counter() - began, 1)},
        "plot": str(home / f"{NAME}-merged" / "bench.png"),
    }
    write_whole(home / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if as_json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_tables([demo_table(report)], notes=tuple(demo_notes(report)))
    return report


TITLES = {
    "base": "base",
    "converted": "converted",
    "trained": "trained",
    "window": "window",
    "hybrid": "hybrid",
}


def demo_table(report: dict) -> Table:
    """The table at the end, made from what was measured."""
    columns = {name: report["columns"][name] for name in TITLES}
    table = Table("the shipped base, linearized", ["", *TITLES.values()])
    table.rows.append(["perplexity", *(number(column["perplexity"]) for column in columns.values())])
    for distance in columns["base"]["recall"]:
        cells = [percent(column["recall"][distance]) for column in columns.values()]
        table.rows.append([f"recall at {distance}", *cells])
    for name, what, show in (
        ("latency_ms", "ms/token at {}", lambda value: f"{value['mean']:.2f}"),
        ("cache_bytes", "cache at {}", size),
    ):
        for position in columns["base"][name]:
            cells = [column.get(name, {}).get(position) for column in columns.values()]
            table.rows.append([what.format(position), *("" if cell is None else show(cell) for cell in cells)])
    return table


def demo_notes(report: dict) -> list[str]:
    """What the columns are, and where everything lies."""
    columns, home = report["columns"], report["folder"]
    untrained = columns["window_untrained"]
    return [
        "recall at n: exact answers to questions whose answer stands n tokens back.",
        "base: softmax attention. converted: every layer linearized (gla, window 64, 128 tokens a layer kept by their "
        "score) and calibrated, the weights untouched. trained: after LoRA and merge. window: the trained weights with "
        f"recurrence and kept tokens off (without any training: perplexity {number(untrained['perplexity'])}). "
        f"hybrid: softmax kept in key/value head {report['softmax_heads_of_the_hybrid']} (layer:head), one of twelve, "
        "then trained. Speed is a matter of shapes: converted is as fast as trained.",
        f"This took {report['seconds']['all']:.0f} s. The models are in {home}; the plot is {report['plot']}.",
        f"Next: cd {home} && liger eval, or liger bench --seq-len 32768.",
    ]


def _columns(subject: Subject, wanted: dict[str, str], keep: Path | None = None) -> dict[str, dict]:
    """Perplexity and recall of the wanted columns, under the names they have in the demo.

    The base knows nothing but the texts it was trained on: it is read and asked by held-out ones of the same kind.
    """
    texts = held_out_text(CHARACTERS)
    result = evaluate.evaluate(
        subject, parts=("perplexity",), texts=texts, source="held-out stories", seq_len=1024, rows=len(texts)
    )
    if keep is not None:
        keep_result(keep, "eval", result)
    found = {}
    for column, name in wanted.items():
        with subject.column(column) as model:
            recall = evaluate_recall(model, subject.tokenizer, DISTANCES, COUNT)
        found[name] = {
            "perplexity": result["perplexity"][column]["token"],
            "recall": {str(distance): share for distance, share in recall.items()},
        }
    return found


def _add_speed(column: dict, timed: dict, which: str) -> None:
    rows = [row for row in timed["rows"] if row["which"] == which and row["position"] in (1024, SEQ_LEN // 2, SEQ_LEN)]
    for name in ("latency_ms", "cache_bytes"):
        column[name] = {str(row["position"]): row[name] for row in rows}


def _fresh(home: Path, force: bool) -> Path:
    if home.exists() and any(home.iterdir() if home.is_dir() else (home,)):
        if not force:
            raise UsageError(f"{home} exists already; name another folder, or replace an earlier demo with --force")
        if home.is_symlink() or not (home / REPORT).is_file():
            raise UsageError(f"{home} is not the folder of an earlier demo, so --force does not replace it")
        shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / REPORT, json.dumps({"folder": str(home), "finished": False}) + "\n")
    return home


@contextmanager
def _step(command: str, seconds: dict[str, float]):
    print(f"$ {command}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    yield
    seconds[command] = round(time.perf_counter() - began, 1)
