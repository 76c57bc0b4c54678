"""`liger demo`: the whole main job on the shipped base, in minutes on a CPU, ending in one table of what came of it."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from liger_cli.commands import convert, evaluate, finetune, merge
from liger_cli.evaluation.report import number, percent
from liger_cli.evaluation.results import stamp
from liger_cli.evaluation.results_card import keep_result
from liger_cli.evaluation.samples import write_samples
from liger_cli.evaluation.subject import Subject, open_subject
from liger_cli.shipped import BASE_DIR
from liger_cli.shipped.probes import evaluate_recall, held_out_text
from liger_cli.shipped.text import TRAIN_SEED
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.outputs import write_whole
from liger_cli.system.tables import Table, print_tables
from liger_cli.system.untrusted import read_json
from liger_cli.system.wording import size

FOLDER = "liger-demo"
REPORT = "demo.json"
NAME = "demo-liger"
HYBRID = "demo-liger-hybrid"
# Of the base's twelve key/value heads the one that recall needs most.
SOFTMAX_HEADS = "4:0"
RECIPE_FILE = "recipe.yaml"
TEXT_FILE = "text.jsonl"  # of the base's own small world, which knows no prose
TEXT_CHARACTERS = 80_000
TEXT_KINDS = ("story", "facts", "recall", "drill", "chat")
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
SHOWN = (1024, 4096, 8192)  # positions


def run(folder: str | Path | None = None, *, force: bool = False, as_json: bool = False) -> dict:
    """Convert, fine-tune, merge, evaluate and time the shipped base; print the table.

    Args:
        folder: to work in; `./liger-demo` by default. A demo that was stopped there is taken up again.
        force: begin anew in the folder of an earlier demo.
        as_json: print one JSON object instead of the table.
    Returns:
        What `--json` prints; it is also `demo.json` in the folder.
    Raises:
        UsageError: the folder is in the way. LigerError in all its kinds, OSError.
    """
    home = Path(folder or FOLDER)
    steps = _Steps(home, _begun(home, force))
    from transformers.utils import logging

    logging.set_verbosity_error()
    for name in (NAME, HYBRID):
        _make(home, name, steps)
    columns = {one: figures for result in steps.results.values() for one, figures in result.get("columns", {}).items()}
    timed = steps(f"liger bench {NAME}-merged --seq-len {SEQ_LEN}", lambda: _time(home))
    for column, figures in timed["columns"].items():
        columns[column] |= figures
    seconds = {command: result["seconds"] for command, result in steps.results.items()}
    report = {
        **stamp(),
        "folder": str(home),
        "finished": True,
        "columns": columns,
        "sample": steps.results[f"liger eval {NAME}-merged"]["sample"],
        "softmax_heads_of_the_hybrid": SOFTMAX_HEADS,
        "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
        "plot": str(home / f"{NAME}-merged" / "bench.png"),
    }
    write_whole(home / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if as_json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_tables([demo_table(report)], notes=tuple(demo_notes(report)))
    return report


class _Steps:
    """Runs the demo's commands, each once: what one has given stands in the folder's `demo.json`.

    Args:
        results: of an earlier demo that was stopped: command -> what it gave and the seconds it took.
    """

    def __init__(self, home: Path, results: dict[str, dict]):
        self.home, self.results = home, results

    def __call__(self, command: str, work: Callable[[], dict | None]) -> dict:
        """The result of a command; one of an earlier demo is not run again."""
        if command in self.results:
            print(f"$ {command}   (done before)", file=sys.stderr, flush=True)
            return self.results[command]
        print(f"$ {command}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        found = work() or {}
        self.results[command] = {**found, "seconds": round(time.perf_counter() - began, 1)}
        write_whole(self.home / REPORT, json.dumps({"finished": False, "steps": self.results}) + "\n")
        return self.results[command]


def _make(home: Path, name: str, steps: _Steps) -> None:
    """One of the two models: converted, trained, merged and evaluated."""
    base, converted, adapter, merged = home / "base", home / name, home / f"{name}-lora", home / f"{name}-merged"
    heads = "none" if name == NAME else SOFTMAX_HEADS
    option = "" if name == NAME else f" --softmax-heads {heads}"
    steps(
        f"liger convert base {name} --calibrate --calibration-data {TEXT_FILE}{option}",
        lambda: (
            convert.convert(
                str(base),
                str(converted),
                calibrate=True,
                calibration_data=str(home / TEXT_FILE),
                softmax_heads=heads,
                force=True,
            )
            and None
        ),
    )
    if name == NAME:
        wanted = {"model": "converted", "window_only": "window_untrained"}
        steps(f"liger eval {name}", lambda: _evaluated(open_subject(converted), wanted))
    tuning = {"recipe": str(home / RECIPE_FILE), "output": adapter, "max_steps": STEPS[name], "force": True}
    steps(
        f"liger finetune {name} --recipe {RECIPE_FILE} --max-steps {STEPS[name]}",
        lambda: finetune.run(converted, **tuning) and None,
    )
    steps(f"liger merge {name}-lora", lambda: merge.run(adapter, output=merged, quiet=True, force=True) and None)
    wanted = {"base": "base", "model": "trained", "window_only": "window"} if name == NAME else {"model": "hybrid"}
    untrained = converted if name == NAME else None
    steps(f"liger eval {name}-merged", lambda: _evaluated(open_subject(merged), wanted, merged, untrained))


def _time(home: Path) -> dict:
    """The base, the model and the hybrid, step by step in turn: a busy moment of the machine meets them all alike."""
    from liger_cli.benchmark.bench import bench

    merged = home / f"{NAME}-merged"
    beside = {"hybrid": open_subject(home / f"{HYBRID}-merged")}
    timed = bench(open_subject(merged), seq_len=SEQ_LEN, new_tokens=8, repetitions=3, base_limit=20, beside=beside)
    own = {**timed, "rows": [row for row in timed["rows"] if row["which"] not in beside]}
    own["flatness"] = {which: found for which, found in timed["flatness"].items() if which not in beside}
    keep_result(merged, "bench", own)
    columns: dict[str, dict] = {}
    for which, column in (("base", "base"), ("model", "trained"), ("hybrid", "hybrid")):
        rows = [row for row in timed["rows"] if row["which"] == which and row["position"] in SHOWN]
        columns[column] = {
            name: {str(row["position"]): row[name] for row in rows} for name in ("latency_ms", "cache_bytes")
        }
    return {"columns": columns}


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
    """What the columns are, one text continued by three of them, and what to do next."""
    columns, home, sample = report["columns"], report["folder"], report["sample"]
    untrained = columns["window_untrained"]
    return [
        "recall at n: exact answers to questions whose answer stands n tokens back.",
        "base: softmax attention. converted: every layer linearized and calibrated (a window of 64 tokens, 128 more "
        "that a head keeps by their score, on average, and a state of the others), the weights untouched. trained: "
        "after LoRA and merge. window: the trained weights with state and kept tokens off (without any training: "
        f"perplexity {number(untrained['perplexity'])}). "
        f"hybrid: the same, but that key/value head {report['softmax_heads_of_the_hybrid']} (layer:head), one of "
        "twelve, keeps its softmax attention and the cache that grows with it: what the memory of constant size does "
        "not hold, it does. Speed is a matter of shapes: converted is as fast as trained.",
        f"One text continued: ...{sample['prompt'][-60:]}",
        *(f"  {name}: {sample[name].strip()}" for name in ("base", "converted", "trained")),
        f"This took {report['seconds']['all']:.0f} s. The models are in {home}; the plot is {report['plot']}.",
        "Your own model: liger convert FOLDER-OR-HUB-ID, then liger finetune, liger merge, liger eval and liger bench.",
    ]


def _evaluated(
    subject: Subject, wanted: dict[str, str], keep: Path | None = None, untrained: Path | None = None
) -> dict:
    """Perplexity and recall of the wanted columns, under the names they have in the demo.

    The base knows nothing but the texts it was trained on: it is read and asked by held-out ones of the same kind.

    Args:
        keep: the folder that the results are put into.
        untrained: the converted folder, whose continuation of a text is shown beside the base's and the model's.
    """
    texts = held_out_text(CHARACTERS)
    result = evaluate.evaluate(
        subject, parts=("perplexity",), texts=texts, source="held-out stories", seq_len=1024, rows=len(texts)
    )
    if keep is not None:
        keep_result(keep, "eval", result)
    columns = {}
    for column, name in wanted.items():
        with subject.column(column) as model:
            recall = evaluate_recall(model, subject.tokenizer, DISTANCES, COUNT)
        columns[name] = {
            "perplexity": result["perplexity"][column]["token"],
            "recall": {str(distance): share for distance, share in recall.items()},
        }
    if untrained is None:
        return {"columns": columns}
    (sample,) = write_samples(subject, texts, 1, ("base", "model"))
    (before,) = write_samples(open_subject(untrained), texts, 1, ("model",))
    written = {"prompt": sample["prompt"], "base": sample["base"], "trained": sample["model"]}
    return {"columns": columns, "sample": {**written, "converted": before["model"]}}


def _begun(home: Path, force: bool) -> dict[str, dict]:
    """What was done in the folder before; an empty one, or that of an earlier demo with `force`, is begun anew."""
    import yaml

    done: dict[str, dict] = {}
    if home.exists() and any(home.iterdir() if home.is_dir() else (home,)):
        found = None if home.is_symlink() or not (home / REPORT).is_file() else read_json(home / REPORT, LigerError)
        stopped = found is not None and found.get("finished") is False and isinstance(found.get("steps"), dict)
        if stopped and not force:
            done = found["steps"]
        elif not force:
            raise UsageError(f"{home} exists already; name another folder, or replace an earlier demo with --force")
        elif found is None:
            raise UsageError(f"{home} is not the folder of an earlier demo, so --force does not replace it")
        else:
            shutil.rmtree(home)
    if not done:
        home.mkdir(parents=True, exist_ok=True)
        write_whole(home / REPORT, json.dumps({"finished": False, "steps": {}}) + "\n")
        shutil.copytree(BASE_DIR, home / "base", dirs_exist_ok=True)
        write_whole(home / RECIPE_FILE, yaml.safe_dump(RECIPE, sort_keys=False))
        texts = held_out_text(TEXT_CHARACTERS, TRAIN_SEED + 2**20, TEXT_KINDS)
        write_whole(home / TEXT_FILE, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return done
