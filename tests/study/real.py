"""The recipes on a real base, one resumable command.

    PYTHONPATH=tests python -m study.real BASE --tasks NAMES --include-path TASKS --text FILE --data FILE --output DIR

Each row is converted, trained and measured in a process of its own, and its result is a file that appears whole: a run
that was stopped goes on with the rows that have none. `rows.jsonl` and `table.md` are made of what there is.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path

from liger_cli.checkpoint.reader import file_sha256
from liger_cli.system.errors import LigerError, UsageError, guarded
from liger_cli.system.outputs import write_whole
from liger_cli.system.tables import Table
from study.rows import (
    COUNTED,
    RATED,
    RATES,
    Row,
    at_rate,
    calibrated_of_equal_bytes,
    parse_tokens,
    show_tokens,
    windows_of_equal_bytes,
    with_sinks,
)

FORMAT = 1  # raised when what is measured changes
SINKS = 4
CALIBRATED = "calibrated"
EQUAL = "EQUAL"  # stands for the window that takes the bytes of the row `calibrated`
LIMITS = "200,mmlu_local:5"
TASKS = "piqa_local,arc_easy_local,arc_challenge_local,hellaswag_local,winogrande_local,mmlu_local"
CONTEXTS = (2048, 8192, 32768)
# The same for every recipe: what a step sees, how often it is interrupted.
COMMON = {
    "seq_len": 2048,
    "batch_size": 2,
    "micro_batch_size": 1,
    "held_out": 4,
    "eval_steps": 1 << 20,
    "save_steps": 1 << 20,
    "early_stop": 0,
    "streaming": None,
}
WINDOW = ("--mix", "0", "--window", EQUAL, "--sinks", str(SINKS))
HEADS = ("--calibrate", "--softmax-heads", "auto:10%")
FADING = ("retention", "mamba2", "mlstm", "retnet")  # gates that let the state fade
NO_REST = ("--calibrate", "--no-rest", "--kept", "share:194")  # the bytes of the states in kept tokens
ROWS = (
    Row("base", column="base"),
    Row("plain", ("--gate", "gla")),
    Row(CALIBRATED, ("--calibrate",)),
    Row("calibrated-own-text", ("--calibrate", "--calibration-data", "self")),
    Row("calibrated-no-rest", NO_REST),
    *(Row(f"calibrated-{gate}", ("--calibrate", "--gate", gate)) for gate in FADING),
    Row("calibrated-heads10", HEADS),
    Row("window", WINDOW, column="window_only"),
    Row("window-trained", WINDOW, "best", {"attention": "window"}, column="window_only"),
    Row("paper", ("--gate", "gla"), "paper"),
    Row("lolcats", ("--recipe", "lolcats"), "lolcats"),
    Row("supra", ("--recipe", "supra"), "supra"),
    Row("best", ("--calibrate",), "best"),
    Row("best-no-rest", NO_REST, "best"),
    Row("best-heads10", HEADS, "best"),
)
LONGER = ("best", "best-heads10")  # trained at the second budget, too


@dataclass(frozen=True)
class Question:
    """What a row is asked; a result answers one question.

    Attributes:
        base, text, data, long_data, calibration_data, include_path: paths, or None. text: files to evaluate on.
        tasks: of the harness; limits: examples of each, see `parse_limits`.
        rows: of 2,048 tokens of each text. needles: at each distance.
        seed: of the training. dtype: of the training's frozen weights and of the tasks; texts are scored in float32.
    """

    base: str
    text: tuple[str, ...]
    data: str | None
    long_data: str | None
    calibration_data: str | None
    include_path: str | None
    tasks: str
    limits: str
    rows: int
    needles: int
    seed: int
    dtype: str

    def named(self) -> dict:
        """The question with names and digests for paths: what a result on another machine can be compared by."""
        paths = ("base", "data", "long_data", "calibration_data", "include_path")
        found = asdict(self) | {name: named(getattr(self, name)) for name in paths}
        return found | {"text": [named(path) for path in self.text]}

    def paths(self) -> list[str]:
        """Every path in it, the longest first."""
        known = (self.base, self.data, self.long_data, self.calibration_data, self.include_path, *self.text)
        return sorted((path for path in known if path and Path(path).exists()), key=len, reverse=True)


@cache
def named(path: str | None) -> str | None:
    """`NAME@DIGEST` of a file, or of a folder's files; what is not there, a hub's id say, as it is."""
    if path is None or not Path(path).exists():
        return path
    place = Path(path)
    files = [place] if place.is_file() else sorted(one for one in place.iterdir() if one.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return f"{place.name}@{digest.hexdigest()[:16]}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code, as of every command of liger."""
    if arguments is None and len(sys.argv) == 2 and sys.argv[1] == "--one":
        return guarded(lambda: compute(**json.load(sys.stdin)), (SystemExit,))
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m study.real", description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="a checkpoint folder")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the results' folder")
    parser.add_argument("--text", required=True, action="append", type=Path, metavar="FILE", help="to evaluate on")
    parser.add_argument("--data", metavar="DATA", help="that every trained row is trained on; as of `liger finetune`")
    parser.add_argument("--long-data", metavar="DATA", help="long documents beside it, for every trained row")
    parser.add_argument("--calibration-data", metavar="FILE", help="by default what `liger convert --calibrate` takes")
    parser.add_argument("--tasks", default=TASKS, help="of the harness, by commas; empty for none")
    parser.add_argument("--include-path", metavar="DIR", help="the tasks' YAML files")
    parser.add_argument("--limits", default=LIMITS, help=f"examples of each task, others for some ({LIMITS})")
    parser.add_argument("--rows", type=int, default=8, help="rows of 2,048 tokens of each text (8)")
    parser.add_argument("--needles", type=int, default=10, help="at each distance (10)")
    parser.add_argument("--budget", default="0.1M", help="training tokens (0.1M)")
    parser.add_argument("--longer", default="0.5M", help="training tokens of one more run of the best, or none (0.5M)")
    parser.add_argument("--dtype", default="auto", help="of training and tasks, as of `liger finetune` (auto)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (0)")
    parser.add_argument("--only", default="*", metavar="ROWS", help="names of rows, with * and ?, by commas")
    parser.add_argument(
        "--fair", action="store_true",
        help="also the published methods with our sinks, at other learning rates, and what else has their bytes",
    )  # fmt: skip
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no row after that long")
    parser.add_argument("--plan", action="store_true", help="print the rows and compute nothing")
    return parser


def _run(options: argparse.Namespace) -> None:
    for path in (options.base, *options.text):
        if not path.exists():
            raise UsageError(f"{path} is not there")
    parse_limits(options.limits)
    longer = None if options.longer == "none" else parse_tokens(options.longer)
    wanted = [part.strip() for part in options.only.split(",")]
    more = compared(options.base) if options.fair else ()
    units = planned(parse_tokens(options.budget), longer, more)
    rows = [row for row in units if any(fnmatch(row[0], one) for one in wanted)]
    if any(budget for _, _, budget in rows) and options.data is None:
        raise UsageError("--data names what the rows are trained on; name it, or leave the trained rows out (--only)")
    if options.plan:
        print("\n".join(name for name, _, _ in rows))
        return
    home = options.output.resolve()
    home.mkdir(parents=True, exist_ok=True)
    absolute = lambda path: None if path is None else str(Path(path).resolve()) if Path(path).exists() else path  # noqa: E731
    question = Question(
        absolute(options.base), tuple(map(absolute, options.text)), absolute(options.data), absolute(options.long_data),
        absolute(options.calibration_data), absolute(options.include_path), options.tasks, options.limits, options.rows,
        options.needles, options.seed, options.dtype,
    )  # fmt: skip
    ends = time.monotonic() + 3600 * options.hours
    for name, row, budget in rows:
        if time.monotonic() > ends:
            print(f"later: {name}", file=sys.stderr)
        else:
            print(f"{_one(home, name, row, budget, question)}: {name}", file=sys.stderr, flush=True)
    for path in write(home):
        print(path)


def compared(base: Path) -> tuple[Row, ...]:
    """Rows that make the comparison with the published methods a fair one."""
    published = [row for row in ROWS if row.recipe in RATED]
    sinks = [replace(with_sinks(row, SINKS), name=f"{row.name}-sinks{SINKS}") for row in published]
    sinks = [row for row, plain in zip(sinks, published, strict=True) if row.convert != plain.convert]
    rates = [at_rate(row, factor) for row in published for factor in RATES]
    windows = [with_sinks(row, SINKS) for row in windows_of_equal_bytes(base, SINKS)]
    return (*sinks, *rates, *windows, *calibrated_of_equal_bytes(base, SINKS))


def planned(budget: int, longer: int | None, more: tuple[Row, ...] = ()) -> list[tuple[str, Row, int]]:
    """(name of the result, row, training tokens), in the order of the table; `more` rows behind the study's own."""
    rows = (*ROWS, *more)
    found = [(row.name if not row.recipe else f"{row.name}-{show_tokens(budget)}", row, budget) for row in rows]
    found = [(name, row, tokens if row.recipe else 0) for name, row, tokens in found]
    if longer:
        found += [(f"{row.name}-{show_tokens(longer)}", row, longer) for row in ROWS if row.name in LONGER]
    return found


def _one(home: Path, name: str, row: Row, budget: int, question: Question) -> str:
    """What became of a row: `kept`, `done` or `failed`, with the sentence that it failed with."""
    row = replace(row, convert=_window_of(home, row.convert))
    asked = {"format": FORMAT, "row": asdict(row), "budget": budget, "question": question.named()}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    known = read(home, name)
    if known and known["key"] == key and "failed" not in known:
        return "kept"
    (home / "logs").mkdir(exist_ok=True)
    job = {
        "home": str(home),
        "name": name,
        "key": key,
        "row": asdict(row),
        "budget": budget,
        "question": asdict(question),
        "asked": asked["question"],
    }
    with open(home / "logs" / f"{name}.log", "w", encoding="utf-8") as log:
        here = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        code = subprocess.run(
            [sys.executable, "-m", "study.real", "--one"], input=json.dumps(job), text=True, stdout=log, stderr=log,
            env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": here}, check=False,
        ).returncode  # fmt: skip
    if code == 0:
        return "done"
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    lines = [line for line in Path(log.name).read_text(encoding="utf-8").splitlines() if line.strip()]
    sentence = f"killed by signal {-code}" if code < 0 else lines[-1][:400] if lines else "it said nothing"
    _write(home, name, {"name": name, "key": key, "failed": sentence})
    return f"failed ({sentence})"


def _window_of(home: Path, convert: tuple[str, ...]) -> tuple[str, ...]:
    """The options with the window that takes the bytes of the calibrated row. Raises UsageError: that is not there."""
    if EQUAL not in convert:
        return convert
    calibrated = read(home, CALIBRATED)
    if calibrated is None or "failed" in calibrated:
        raise UsageError(f"the windows of equal bytes need the row {CALIBRATED!r}; let --only name it, too")
    return tuple(str(calibrated["equal_window"]) if part == EQUAL else part for part in convert)


def compute(home: str, name: str, key: str, row: dict, budget: int, question: dict, asked: dict) -> None:
    """Convert, train and measure one row, and write its result. Raises LigerError; SystemExit as of `liger`.

    asked: the question as the result keeps it, of `Question.named`.
    """
    row = Row(**{**row, "convert": tuple(row["convert"])})
    question = Question(**{**question, "text": tuple(question["text"])})
    work = Path(home, "work", name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.perf_counter()
    converted = folder = work / "model"
    named = ("--calibration-data", question.calibration_data) if question.calibration_data else ()
    commands = [liger("convert", question.base, str(converted), *row.convert, *(named if row.needs_data else ()))]
    seconds = {"convert": time.perf_counter() - began}
    manifest = json.loads((converted / "liger.json").read_text(encoding="utf-8"))
    tokens = {"calibration": (manifest.get("calibration") or {}).get("tokens", 0), "training": 0}
    training = None
    if row.recipe:
        folder = work / "adapter"
        left = budget - tokens["calibration"] if row.name.startswith(COUNTED) else budget
        training = _train(row, left, question, converted, folder)
        commands.append(training.pop("command"))
        seconds["training"], tokens["training"] = training["seconds"], training["tokens"]
    measured = measure(folder, row.column, question)
    seconds["all"] = time.perf_counter() - began
    result = {
        "name": name,
        "key": key,
        "row": row.name,
        "budget": budget,
        "commands": [[_portable(part, work, question) for part in command] for command in commands],
        "training": training,
        "tokens": tokens,
        "seconds": seconds,
        **sizes(converted, row.column),
        **measured,
        "question": asked,
    }  # fmt: skip
    _write(Path(home), name, result)
    shutil.rmtree(work, ignore_errors=True)


def _portable(part: str, work: Path, question: Question) -> str:
    """A command's part without this machine's folders."""
    part = part.replace(str(work), "WORK").replace(question.base, "BASE")
    for path in question.paths():
        part = part.replace(path, Path(path).name)
    return part


def liger(*arguments: str) -> list[str]:
    """Run a command of liger in this process and return it. Raises SystemExit: it failed, and said why."""
    import typer

    from liger_cli.main import CLICK_EXCEPTION, app

    try:
        code = app(list(arguments), standalone_mode=False)
    except CLICK_EXCEPTION as error:
        print(f"liger: {error.format_message()}", file=sys.stderr)
        code = UsageError.exit_code
    except typer.Exit as error:
        code = error.exit_code
    if code:
        raise SystemExit(code)
    return ["liger", *arguments]


def _train(row: Row, budget: int, question: Question, converted: Path, adapter: Path) -> dict:
    """Fine-tune by the row's recipe; what the report says of it, and the command."""
    import yaml

    from liger_cli.commands import finetune
    from liger_cli.training.recipes import load_recipe, recipe_from

    rows = COMMON["batch_size"] * COMMON["seq_len"]
    changes = {**COMMON, **row.changes, "max_steps": max(1, round(budget / rows)), "seed": question.seed}
    changes |= {"calibrate": False, "long_data": question.long_data}
    recipe = recipe_from({**replace(load_recipe(row.recipe), name=row.name).to_dict(), **changes})
    file = adapter.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
    began = time.perf_counter()
    options = {"data": question.data, "long_data": question.long_data, "recipe": str(file), "output": str(adapter)}
    options |= {"dtype": question.dtype} if question.dtype != "auto" else {}
    report = finetune.run(converted, quiet=True, **options)
    given = [part for name, value in options.items() if value for part in (f"--{name.replace('_', '-')}", value)]
    return {
        "command": ["liger", "finetune", str(converted), *given],
        "recipe": recipe.to_dict(),
        "tokens": report["trained_tokens"],
        "beyond_exact_memory": report["beyond_exact_memory"],
        "steps": report["steps_done"],
        "parameters": report["trainable_parameters"],
        "first_loss": report["first_loss"],
        "last_loss": report["last_loss"],
        "held_out_perplexity": report["held_out_perplexity"],
        "seconds": time.perf_counter() - began,
    }


def sizes(converted: Path, column: str) -> dict:
    """`bytes` of one sequence at `CONTEXTS`, and `equal_window`, of as many bytes beside `SINKS` sinks."""
    from liger_cli.checkpoint.converted import read_converted
    from liger_cli.conversion.plan import Plan

    found = read_converted(converted)
    plan = Plan(found.checkpoint, tuple(found.specs), ())
    layers = range(len(plan.specs))
    base = {tokens: sum(plan.base_cache(layer, tokens) for layer in layers) for tokens in CONTEXTS}
    kept = base if column == "base" else {tokens: plan.cache_bytes(tokens) for tokens in CONTEXTS}
    count = sum(spec.kind == "liger" for spec in plan.specs)
    constant = sum(plan.constant_bytes(i, spec) for i, spec in enumerate(plan.specs) if spec.kind == "liger")
    token = base[CONTEXTS[0]] // (CONTEXTS[0] * len(layers))
    return {
        "bytes": {str(tokens): kept[tokens] for tokens in CONTEXTS},
        "equal_window": constant // (count * token) - SINKS + 1 if count else None,
    }


def measure(folder: Path, column: str, question: Question) -> dict:
    """The figures of one column of a folder.

    Returns:
        `texts`: for each text, in float32, perplexity, `kl`, both by position, `needle` and `second_reading`. `tasks`:
        the harness's figures with their standard errors, and its details (how many examples).
    """
    import math

    from liger_cli.evaluation.harness import parse_tasks, run_tasks
    from liger_cli.evaluation.position import needle, score_positions, second_reading
    from liger_cli.evaluation.scoring import make_rows, read_texts
    from liger_cli.evaluation.subject import open_subject

    subject = open_subject(folder)
    columns = {name: partial(subject.column, name) for name in dict.fromkeys(("base", column))}
    own = {column: columns[column]}
    texts = {}
    for path in map(Path, question.text):
        rows = make_rows(subject.tokenizer, read_texts(path), 2048)
        whole = rows.ids[rows.lengths == 2048]
        if len(whole) < question.rows:
            raise LigerError(f"{path} fills {len(whole)} rows of 2,048 tokens, and {question.rows} are asked for")
        spread = whole[:: len(whole) // question.rows][: question.rows]
        positions = score_positions(columns, spread)[column]
        text = whole[:, :-1].flatten().tolist()
        texts[path.name] = {
            "perplexity": math.exp(positions.mean("loss")),
            "kl": positions.mean("kl"),
            "perplexity_by_position": {name: math.exp(loss) for name, loss in positions.by_bucket("loss").items()},
            "kl_by_position": positions.by_bucket("kl"),
            "needle": needle(own, subject.tokenizer, text, count=question.needles)[column],
            "second_reading": second_reading(own, text)[column],
        }
    tasks = {"figures": {}, "details": {}}
    if question.tasks and question.dtype != "auto":
        del columns, own
        subject = open_subject(folder, dtype=question.dtype)
    usual, others = parse_limits(question.limits)
    names = parse_tasks(question.tasks) if question.tasks else ()
    for limit in dict.fromkeys(others.get(name, usual) for name in names):
        chosen = tuple(name for name in names if others.get(name, usual) == limit)
        found = run_tasks(subject, chosen, limit=limit, include_path=question.include_path, columns=(column,))
        tasks["figures"] |= found[column]
        tasks["details"] |= found["details"]
    return {"texts": texts, "tasks": tasks}


def parse_limits(text: str) -> tuple[int, dict[str, int]]:
    """`200,mmlu_local:5` -> 200 examples of a task, but 5 of each of mmlu_local's. Raises UsageError."""
    usual, *others = text.split(",")
    try:
        return int(usual), {name: int(count) for name, count in (other.split(":") for other in others)}
    except ValueError:
        raise UsageError(f"--limits is {text!r}, but has to be like {LIMITS}") from None


def read(home: Path, name: str) -> dict | None:
    """A row's result, or None where there is none."""
    path = home / "rows" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(home: Path, name: str, result: dict) -> None:
    (home / "rows").mkdir(exist_ok=True)
    write_whole(home / "rows" / f"{name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


def results(home: Path) -> list[dict]:
    """Every result there is, in the table's order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (home / "rows").glob("*.json")]
    order = [row.name for row in ROWS]
    place = lambda name: order.index(name) if name in order else len(order)  # noqa: E731
    key = lambda result: (place(result["row"]), result["budget"], result["name"]) if "row" in result else (99, 0, "")  # noqa: E731
    return sorted(found, key=key)


def write(home: Path) -> tuple[Path, Path]:
    """Write `rows.jsonl`, every result in a line, and `table.md`."""
    found = results(home)
    write_whole(home / "rows.jsonl", "".join(json.dumps(result) + "\n" for result in found))
    write_whole(home / "table.md", table(found))
    return home / "rows.jsonl", home / "table.md"


def table(results: list[dict]) -> str:
    """One Markdown table for each text, and one of the tasks, of the rows that were asked some."""
    done = [result for result in results if "failed" not in result]
    done += best_rates(done)
    tables = []
    for text in dict.fromkeys(name for result in done for name in result["texts"]):
        buckets = list(done[0]["texts"][text]["kl_by_position"])
        distances = list(dict.fromkeys(d for result in done for d in result["texts"][text]["needle"]))
        header = ["row", "perplexity", *(f"KL {bucket}" for bucket in buckets)]
        header += [*(f"needle {distance}" for distance in distances), "second reading"]
        header += [*(f"MiB at {tokens // 1024}K" for tokens in CONTEXTS), "tokens seen", "seconds"]
        shown = Table(text, header)
        for result in done:
            found = result["texts"][text]
            cells = [f"{found['perplexity']:.2f}"]
            cells += [f"{max(found['kl_by_position'][bucket], 0):.4f}" for bucket in buckets]
            cells += [f"{found['needle'][d]['exact']:.0%}" if d in found["needle"] else "" for d in distances]
            cells.append(f"{found['second_reading']:.3f}")
            cells += [f"{result['bytes'][str(tokens)] / 2**20:.1f}" for tokens in CONTEXTS]
            cells.append(f"{sum(result['tokens'].values()):,}")
            cells.append(f"{result['seconds']['convert'] + result['seconds'].get('training', 0):.0f}")
            shown.rows.append([result["name"], *cells])
        tables.append(shown)
    names = list(dict.fromkeys(task for result in done for task in result["tasks"]["figures"]))
    if names:
        asked = [result for result in done if result["tasks"]["figures"]]
        rows = [[result["name"], *(_task(result["tasks"], name) for name in names)] for result in asked]
        rows.append(["examples", *(_examples(done[0]["tasks"], name) for name in names)])
        tables.append(Table("", ["row", *names], rows))
    failed = [f"failed: {result['name']} ({result['failed']})" for result in results if "failed" in result]
    return "\n\n".join([*(shown.markdown() for shown in tables), *failed]) + "\n"


def best_rates(results: list[dict]) -> list[dict]:
    """Of each published method, where other learning rates were tried, the run with the lowest held-out perplexity."""
    found = []
    for name in RATED:
        names = {name, *(f"{name}-lr{factor:g}x" for factor in RATES)}
        tried = [
            result for result in results if result["row"] in names and result["training"].get("held_out_perplexity")
        ]
        for budget in dict.fromkeys(result["budget"] for result in tried if result["row"] != name):
            here = [result for result in tried if result["budget"] == budget]
            best = min(here, key=lambda result: result["training"]["held_out_perplexity"])
            found.append({**best, "name": f"{name}, best rate: {best['name']}"})
    return found


def _task(tasks: dict, name: str) -> str:
    """`acc_norm` where there is one, else `acc`, in per cent with its standard error."""
    figures = tasks["figures"].get(name) or {}
    figure = figures.get("acc_norm") or figures.get("acc") or {}
    if figure.get("value") is None:
        return ""
    error = f" ± {100 * figure['stderr']:.1f}" if figure.get("stderr") is not None else ""
    return f"{100 * figure['value']:.1f}{error}"


def _examples(tasks: dict, name: str) -> str:
    """How many examples a figure rests on; of a group its tasks are not counted."""
    return str((tasks["details"].get(name) or {}).get("examples") or "")


if __name__ == "__main__":
    sys.exit(main())
