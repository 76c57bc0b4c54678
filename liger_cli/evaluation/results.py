"""What a measurement leaves behind: `results.json` in the model's folder, and a section of its model card."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from liger_cli.checkpoint.reader import inside
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.escape import markdown
from liger_cli.system.manifest import package_versions, utc_now
from liger_cli.system.outputs import write_whole
from liger_cli.system.untrusted import read_bytes, read_json

T = TypeVar("T")

RESULTS = "results.json"
FORMAT = 2
PARTS = ("eval", "bench")
STAMP = ("created", "command", "versions")
EVALUATED = ("perplexity", "agreement", "recall", "tasks")
BEGIN, END = "<!-- results: written by liger, rewritten by every eval and bench -->", "<!-- end of results -->"
CARD = "README.md"


def stamp() -> dict:
    """When, by which command, and with which versions."""
    return {"created": utc_now(), "command": ["liger", *sys.argv[1:]], "versions": package_versions()}


def read_results(path: Path) -> dict:
    """A results file, or a folder that has one.

    Raises:
        UsageError: it is not there. LigerError: liger did not write it.
    """
    path = path / RESULTS if path.is_dir() else path
    if not os.path.lexists(path):
        raise UsageError(f"{path} is not there; run `liger eval` or `liger bench` first")
    found = read_json(inside(path.parent.resolve(), path.name), LigerError)
    if found.get("format") != FORMAT or not all(isinstance(found.get(part, {}), dict) for part in PARTS):
        raise LigerError(f"{path} is not a results file of this version of liger")
    return found


def shown(make: Callable[[], T], path: Path) -> T:
    """What `make` makes of a results file. Raises LigerError where a figure is missing or is no figure.

    The tables look up hundreds of figures; a file that lacks one, or has a text in its place, was not written by liger.
    """
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LigerError(
            f"{path} is not as liger writes its results ({type(error).__name__}: {reason}); measure again"
        ) from error


def keep(folder: Path, part: str, result: dict) -> list[str]:
    """Put the result of `eval` or `bench` into the folder's results file, beside the other's.

    What an earlier evaluation measured and this one did not stays, with a stamp of its own (`measured`), if it was the
    same model against the same base, in the same dtype on the same device.

    Returns:
        What was measured earlier on something else, and is gone now.
    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / RESULTS
    try:
        found = read_results(path)
    except (UsageError, LigerError):
        found = {"format": FORMAT}
    before, gone = found.get(part, {}), []
    if part == "eval":
        earlier = {
            name: before[name] for name in EVALUATED if isinstance(before.get(name), dict) and name not in result
        }
        if _subject(before) == _subject(result):
            stamp_ = {name: before[name] for name in (*STAMP, "seed") if name in before}
            result = {**result, **{name: {"measured": stamp_, **value} for name, value in earlier.items()}}
            result["plots"] = list(dict.fromkeys([*_names(before.get("plots")), *_names(result.get("plots"))]))
        else:
            gone = list(earlier)
    found[part] = result
    write_whole(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return gone


def _subject(evaluation: dict) -> dict | None:
    """What an evaluation measured, whatever its folder was called."""
    model = evaluation.get("model")
    return {**model, "folder": None} if isinstance(model, dict) else None


def _names(plots) -> list[str]:
    return [name for name in plots if isinstance(name, str)] if isinstance(plots, list) else []


def rewrite_card(folder: Path, section: str) -> Path:
    """Put the section into the folder's model card: in place of the last one, else at its end.

    Raises:
        OSError: the folder cannot be written to. ModelError: the card is no plain file of the folder.
    """
    path = folder / CARD
    if os.path.lexists(path):
        text = read_bytes(inside(folder.resolve(), CARD)).decode("utf-8", "replace")
    else:
        text = f"# {markdown(folder.name)}\n"
    block = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    text = pattern.sub(lambda _: block, text, count=1) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n"
    write_whole(path, text)
    return path
