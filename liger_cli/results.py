"""What a measurement leaves behind: `results.json` in the model's folder, and a section of its model card."""

import json
import re
import sys
from pathlib import Path

from liger_cli.errors import LigerError, UsageError
from liger_cli.manifest import package_versions, utc_now
from liger_cli.outputs import write_whole

RESULTS = "results.json"
FORMAT = 1
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
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is not there; run `liger eval` or `liger bench` first") from None
    except ValueError:
        raise LigerError(f"{path} is not JSON") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise LigerError(f"{path} is not a results file of this version of liger")
    return found


def keep(folder: Path, part: str, result: dict) -> Path:
    """Put the result of `eval` or `bench` into the folder's results file, beside the other's, and return the file.

    Parts of an evaluation that this run did not measure stay as they were if the weights are the same.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / RESULTS
    try:
        found = read_results(path)
    except (UsageError, LigerError):
        found = {"format": FORMAT}
    before = found.get(part)
    if part == "eval" and before and before["model"]["fingerprint"] == result["model"]["fingerprint"]:
        result = {**{name: value for name, value in before.items() if name != "samples"}, **result}
    found[part] = result
    write_whole(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return path


def rewrite_card(folder: Path, section: str) -> Path:
    """Put the section into the folder's model card: in place of the last one, else at its end.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {folder.name}\n"
    block = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    text = pattern.sub(lambda _: block, text, count=1) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n"
    write_whole(path, text)
    return path
