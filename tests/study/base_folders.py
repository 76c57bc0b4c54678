"""Where the study's frozen bases are, and the text that goes with each. No torch here."""

import json
from dataclasses import dataclass
from pathlib import Path

from liger_cli.shipped import BASE_DIR
from liger_cli.system.errors import SetupError, UsageError
from study.sources import CONSOLE, HARBOUR, PLAY, STORIES, Source

FOLDER = Path(__file__).parent / "bases"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class StudyBase:
    """A frozen base. folder: its checkpoint; source: its text and probes; trained_length: in tokens."""

    name: str
    folder: Path
    source: Source
    trained_length: int

    def evaluation(self) -> dict:
        """The held-out figures recorded when the base was frozen; the shipped base has none in this form.

        Returns:
            perplexity, recall_by_pairs {pairs: {distance: share}} with keys as JSON has them, count, minutes.
        """
        return json.loads((self.folder / EVALUATION).read_text(encoding="utf-8"))


BASES = {
    base.name: base
    for base in (
        StudyBase("stories", BASE_DIR, STORIES, 1024),
        StudyBase("console", FOLDER / "console", CONSOLE, 512),
        StudyBase("harbour", FOLDER / "harbour", HARBOUR, 512),
        StudyBase("play", FOLDER / "play", PLAY, 512),
    )
}


def study_base(name: str) -> StudyBase:
    """The base of that name.

    Raises:
        UsageError: unknown. SetupError: its checkpoint is not here; the wheel holds that of `stories` alone.
    """
    if name not in BASES:
        raise UsageError(f"no base of the study is called {name!r}; choose from {', '.join(BASES)}")
    base = BASES[name]
    if not (base.folder / "config.json").is_file():
        raise SetupError(
            f"the study's base {name} is in the source checkout only, not in an installed wheel; "
            f"clone the repository, or train it with python -m study.train_bases {name} --output DIR"
        )
    return base
