"""The bases of the study, each with the kind of text that it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from liger_cli.checkpoint import read_config
from liger_cli.errors import UsageError
from liger_cli.shipped import BASE_DIR
from liger_cli.study.sources import Source, source

FOLDER = Path(__file__).parent / "bases"
BASES = {
    "stories": (BASE_DIR, "stories"),
    "console": (FOLDER / "console", "console"),
    "mixed": (FOLDER / "mixed", "mixed"),
}


@dataclass(frozen=True)
class StudyBase:
    """A base and its text.

    Attributes:
        layers: how many it has.
    """

    name: str
    folder: Path
    source: Source
    layers: int


def study_base(name: str) -> StudyBase:
    """A base by its name, or any other as FOLDER@TEXT, TEXT being a kind of text that `sources` knows.

    Raises:
        UsageError: there is none of that name; its folder is not there. ModelError: it has no readable config.
    """
    if name in BASES:
        folder, text = BASES[name]
    else:
        path, at, text = name.rpartition("@")
        if not at:
            raise UsageError(f"no base is called {name!r}; choose from {', '.join(BASES)}, or give FOLDER@TEXT")
        folder = Path(path)
        name = folder.resolve().name
    if not (folder / "config.json").is_file():
        raise UsageError(f"the base {name} is not at {folder}")
    return StudyBase(name, folder.resolve(), source(text), int(read_config(folder)["num_hidden_layers"]))


def present() -> list[str]:
    """The named bases that are there."""
    return [name for name, (folder, _) in BASES.items() if (folder / "config.json").is_file()]
