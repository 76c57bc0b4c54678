"""The bases that the study measures: the frozen ones by name, and any other folder with a kind of text."""

from pathlib import Path

from liger_cli.checkpoint.reader import read_config
from liger_cli.system.errors import UsageError
from study import base_folders
from study.base_folders import BASES, StudyBase
from study.sources import source


def study_base(name: str) -> StudyBase:
    """A frozen base by its name, or any other as FOLDER@TEXT, TEXT being a kind of text that `sources` knows.

    Raises:
        UsageError: no such name, folder or text. SetupError: the frozen base is not in this installation.
    """
    path, at, text = name.rpartition("@")
    if not at:
        return base_folders.study_base(name)
    folder = Path(path).resolve()
    if not (folder / "config.json").is_file():
        raise UsageError(f"there is no base at {folder}")
    length = read_config(folder).get("max_position_embeddings", 512)
    return StudyBase(folder.name, folder, source(text), length)


def designation(base: StudyBase) -> str:
    """What `study_base` finds it by again."""
    frozen = BASES.get(base.name)
    return base.name if frozen and frozen.folder == base.folder else f"{base.folder}@{base.source.name}"


def layers(base: StudyBase) -> int:
    """How many layers it has."""
    return int(read_config(base.folder)["num_hidden_layers"])


def present() -> list[str]:
    """The frozen bases that are there."""
    return [name for name, base in BASES.items() if (base.folder / "config.json").is_file()]
