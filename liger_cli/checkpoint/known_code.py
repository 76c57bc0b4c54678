"""Which Python files a liger wrote into model folders: the hashes of every release's, and of this installation's.

    python -m liger_cli.checkpoint.known_code      records the files of the version about to be released

From then on the code under that version's number cannot change: a test compares it.
"""

import json
from importlib.resources import files
from pathlib import Path

from liger_cli import __version__
from liger_cli.checkpoint.families import FAMILIES, Family
from liger_cli.checkpoint.model_code import code_hashes, glue_name

TABLE = "known_code.json"


def released() -> dict[str, dict[str, str]]:
    """Version -> file name -> SHA-256, for each recorded release."""
    return json.loads(files("liger_cli.checkpoint").joinpath(TABLE).read_text(encoding="utf-8"))


def current() -> dict[str, str]:
    """File name -> SHA-256 of what this installation writes for the families of its table."""
    found: dict[str, str] = {}
    for family in FAMILIES.values():
        hashes = code_hashes(family)
        found |= hashes if not found else {f"{glue_name(family)}.py": hashes[f"{glue_name(family)}.py"]}
    return dict(sorted(found.items()))


def known(family: Family) -> dict[tuple[str, str], str]:
    """(file name, SHA-256) -> the version that wrote it, the newest release where several did.

    Args:
        family: of `--experimental`, perhaps: then only this installation's glue is known.
    """
    found = dict.fromkeys(code_hashes(family).items(), f"{__version__} (this installation)")
    for version, entries in released().items():
        found |= dict.fromkeys(entries.items(), version)
    return found


def record(path: Path) -> None:
    """Add this version's files to the table. Raises ValueError where the version has others in it already."""
    table = json.loads(path.read_text(encoding="utf-8"))
    if table.get(__version__, current()) != current():
        raise ValueError(f"version {__version__} is recorded with other code; raise the version first")
    table[__version__] = current()
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(__file__).with_name(TABLE))
