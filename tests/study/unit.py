"""Computes one unit of the study in a process of its own: convert, train, measure, and keep the result.

    python -m study.unit HOME BASE  < unit.json

The commands are those that a user would type; a command line that liger does not have is told by its exit code.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from liger_cli.system.errors import LigerError, UsageError, guarded
from liger_cli.system.outputs import write_whole
from study.base_folders import StudyBase
from study.rows import COMMON, DOCUMENTS, Effort, Row, Unit
from study.subjects import study_base

MISSING = 5  # exit code: this liger has no such option or recipe
DATA_SEED = 2**30  # below 2**31: for training; away from the bases' own documents
CALIBRATION_SEED = 2**30 + 2**29
CALIBRATION_DOCUMENTS = 160
SPARE = 1.3  # texts for that many times the budget


def main() -> int:
    """The process's exit code: 0, `MISSING`, or that of the failed command."""
    home, base = Path(sys.argv[1]), study_base(sys.argv[2])
    wanted = json.load(sys.stdin)
    wanted["unit"]["row"] = Row(**{**wanted["unit"]["row"], "convert": tuple(wanted["unit"]["row"]["convert"])})
    unit = Unit(**wanted["unit"])
    return guarded(lambda: compute(home, base, unit, wanted["effort"], wanted["key"]), (SystemExit,))


def compute(home: Path, base: StudyBase, unit: Unit, effort: dict, key: str) -> None:
    """Compute the unit and write its result. Raises LigerError; SystemExit with `MISSING`."""
    work = home / "work" / unit.base / unit.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.perf_counter()
    converted, commands = work / "model", []
    measured_on = calibration_data(home, base, unit.seed) if unit.row.needs_data else ()
    commands.append(liger("convert", str(base.folder), str(converted), *unit.row.convert, *measured_on))
    converted_in = time.perf_counter() - began
    training, folder = None, converted
    made = json.loads((converted / "liger.json").read_text(encoding="utf-8"))
    fitted = made.get("calibration") or {}
    read = sum(fitted.get(name) or 0 for name in ("tokens", "held_out_tokens"))
    if unit.budget:
        folder = work / "adapter"
        training = train(unit, base, converted, folder, home, read)
        commands.append(training.pop("command"))
    measured = measured_figures(home, base, unit, folder, effort)
    selection = made.get("selection") or {}
    result = {
        "key": key,
        "status": "done",
        "base": unit.base,
        "row": unit.row.name,
        "group": unit.row.group,
        "control": unit.row.control,
        "budget": unit.budget,
        "seed": unit.seed,
        "mixture": unit.mixture,
        "commands": [[_portable(part, base, home, work) for part in command] for command in commands],
        "convert_seconds": converted_in,
        "calibration_tokens": read,
        "chosen": selection.get("chosen"),
        "training": training,
        **measured,
        "seconds": time.perf_counter() - began,
    }
    path = home / "results" / unit.base / f"{unit.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(work, ignore_errors=True)


def _portable(part: str, base: StudyBase, home: Path, work: Path) -> str:
    """An argument of a command without this machine's paths."""
    for folder, name in ((work, "WORK"), (home, "STUDY"), (base.folder, base.name)):
        part = part.replace(str(folder), name)
    return part


def measured_figures(home: Path, base: StudyBase, unit: Unit, folder: Path, effort: dict) -> dict:
    """The figures of `measure`, by the base's reference, which is made where it is not there."""
    import numpy as np

    from liger_cli.evaluation.subject import open_subject
    from study.measure import measure, reference, text_rows

    chosen = Effort(**{name: tuple(value) if isinstance(value, list) else value for name, value in effort.items()})
    subject = open_subject(folder)
    text = text_rows(subject.tokenizer, base.source, chosen)
    path = home / "reference" / f"{unit.base}-{chosen.characters}-{chosen.seq_len}.npz"
    if path.exists():
        losses = dict(np.load(path))
    else:
        plain = home / "work" / unit.base / f"reference-{os.getpid()}"
        liger("convert", str(base.folder), str(plain))
        losses = reference(open_subject(plain), text, path)
        shutil.rmtree(plain)
    return measure(folder, base.source, unit.row.column, chosen, losses, text)


def train(unit: Unit, base: StudyBase, converted: Path, adapter: Path, home: Path, read: int = 0) -> dict:
    """Fine-tune by the row's recipe; what the report says of it, and the command.

    read: tokens of the budget that the calibration has read; what is left is trained on.
    """
    import yaml

    from liger_cli.training.recipes import load_recipe, recipe_from, recipe_names

    if unit.row.recipe not in recipe_names():
        print(f"liger: there is no recipe {unit.row.recipe!r} yet", file=sys.stderr)
        raise SystemExit(MISSING)
    rows = COMMON["batch_size"] * COMMON["seq_len"]
    recipe = load_recipe(unit.row.recipe)
    changes = {**COMMON, **unit.row.changes, "max_steps": max(1, round((unit.budget - read) / rows)), "seed": unit.seed}
    recipe = recipe_from({**replace(recipe, name=unit.row.name).to_dict(), **changes})
    file = adapter.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
    data = training_data(home, base, unit)
    began = time.perf_counter()
    command = ["finetune", str(converted), "--data", str(data), "--recipe", str(file), "--output", str(adapter)]
    from liger_cli.commands import finetune

    report = finetune.run(converted, data=str(data), recipe=str(file), output=adapter, quiet=True)
    return {
        "command": ["liger", *command],
        "recipe": recipe.to_dict(),
        "tokens": report["tokens"],
        "steps": report["steps_done"],
        "parameters": report["trainable_parameters"],
        "extra_parameters": report.get("trainable_extra_parameters", 0),
        "minutes": (time.perf_counter() - began) / 60,
        "first_loss": report["first_loss"],
        "last_loss": report["last_loss"],
        "held_out_perplexity": report["held_out_perplexity"],
    }


def calibration_data(home: Path, base: StudyBase, seed: int) -> tuple[str, str]:
    """The option that names a text of the base's own kind: the shipped one is of another kind for other bases.

    Each seed has a text of its own.
    """
    path = home / "data" / f"{base.name}-calibration{f'-{seed}' if seed else ''}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = base.source.documents(CALIBRATION_SEED + seed, base.source.kinds, min_words=80, max_words=400)
        texts = islice(stream, CALIBRATION_DOCUMENTS)
        write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return "--calibration-data", str(path)


def training_data(home: Path, base: StudyBase, unit: Unit) -> Path:
    """A file of training text, enough for the budget; the file of a small budget is the beginning of a larger one's."""
    path = home / "data" / f"{unit.base}-{unit.mixture}-{unit.budget}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = tuple(kind for kind in base.source.kinds if kind != "chat")
    if unit.mixture == DOCUMENTS:
        stream = ({"text": text} for text in base.source.documents(DATA_SEED, kinds, min_words=80, max_words=400))
    else:
        stream = base.source.instructions(DATA_SEED)
    lines, words = [], 0.0
    for record in islice(stream, 10_000_000):
        lines.append(json.dumps(record))
        words += sum(len(text.split()) for text in record.values())
        if words * base.source.tokens_per_word > SPARE * unit.budget and len(lines) >= 200:
            break
    write_whole(path, "\n".join(lines) + "\n")
    return path


def liger(*arguments: str) -> list[str]:
    """Run a command of liger in this process and return it.

    Raises:
        SystemExit: `MISSING` where liger has no such option or value. LigerError: the command failed.
    """
    import typer

    from liger_cli.main import CLICK_EXCEPTION, app

    try:
        code = app(list(arguments), standalone_mode=False)
    except CLICK_EXCEPTION as error:
        print(f"liger: {error.format_message()}", file=sys.stderr)
        raise SystemExit(MISSING) from None
    except typer.Exit as error:
        code = error.exit_code
    if code == UsageError.exit_code:
        raise SystemExit(MISSING)
    if code:
        raise LigerError(f"liger {arguments[0]} failed with exit code {code}")
    return ["liger", *arguments]


if __name__ == "__main__":
    sys.exit(main())
