"""Rows of the study as data: what is converted how, trained by what; and the rows beside the published methods."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.conversion.plan import make_plan
from liger_cli.conversion.plan_edits import constant_bytes
from liger_cli.system.errors import UsageError
from liger_cli.training.recipes import load_recipe

# The published methods at other learning rates than theirs, all stages alike. The best of a row and its own is found by
# the held-out loss of training, so that no figure of the table is chosen by.
RATED = ("paper", "lolcats", "supra")
RATES = (0.3, 3.0, 10.0)
EQUAL = ("gla", "lolcats", "supra")  # methods beside which others of as many bytes stand
COUNTED = "best-as-"  # begins the names of rows whose calibration's tokens count as training's
LONG = "32K"  # tokens, after which a cache of constant size has all its bytes


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: what it is called there.
        convert: options of `liger convert`.
        recipe: of `liger finetune`; None for an untrained row.
        changes: fields of the recipe that differ from the shipped one's.
        column: what is measured: `base`, `model` or `window_only`.
    """

    name: str
    convert: tuple[str, ...] = ()
    recipe: str | None = None
    changes: dict = field(default_factory=dict)
    column: str = "model"

    @property
    def needs_data(self) -> bool:
        """Whether its conversion measures something on a text."""
        return "--calibrate" in self.convert or any(part.startswith("auto:") for part in self.convert)


def at_rate(row: Row, factor: float) -> Row:
    """The row at other learning rates."""
    stages = [{**stage, "lr": stage["lr"] * factor} for stage in load_recipe(row.recipe).to_dict()["stages"]]
    return replace(row, name=f"{row.name}-lr{factor:g}x", changes={**row.changes, "stages": stages})


def windows_of_equal_bytes(folder: Path, sinks: int) -> tuple[Row, ...]:
    """For every published method the window alone with as many bytes (and sinks), untrained and trained."""
    rows = []
    for name in EQUAL:
        whole = _method_bytes(folder, name, sinks)
        alone = [_cache_bytes(folder, {"window": window, "mix": 0.0, "sinks": sinks}) for window in (1, 2)]
        window = 1 + max(0, whole - alone[0]) // (alone[1] - alone[0])
        options = ("--window", str(window))
        rows.append(Row(f"window-only-as-{name}", ("--mix", "0", *options), column="window_only"))
        rows.append(
            Row(f"window-only-as-{name}-trained", options, "window-only", {"attention": "window"}, "window_only")
        )
    return tuple(rows)


def calibrated_of_equal_bytes(folder: Path, sinks: int) -> tuple[Row, ...]:
    """For every published method a calibrated model with as many bytes, untrained and trained."""
    rows = []
    for name in EQUAL:
        options = ("--calibrate", "--budget", f"{_method_bytes(folder, name, sinks)}@{LONG}")
        rows += [Row(f"calibrated-as-{name}", options), Row(f"{COUNTED}{name}", options, "best")]
    return tuple(rows)


def _method_bytes(folder: Path, name: str, sinks: int) -> int:
    """Of a published method's cache, with as many sinks where it has a window that sees them."""
    settings = {} if name == "gla" else load_recipe(name).model
    return _cache_bytes(folder, {**settings, "sinks": 0 if settings.get("window") == 0 else sinks})


def with_sinks(row: Row, sinks: int) -> Row:
    """The row with as many sinks as every other, where it has a window that sees them."""
    if not sinks or row.column == "base" or "--sinks" in row.convert or row.recipe == "supra":
        return row
    return replace(row, convert=(*row.convert, "--sinks", str(sinks)))


def _cache_bytes(folder: Path, settings: dict) -> int:
    """Bytes of one sequence's constant cache where every layer of a base has these settings."""
    return constant_bytes(make_plan(read_checkpoint(folder), settings))


def parse_tokens(text: str) -> int:
    """`0.5M` or `100k` or `4096` as tokens. Raises UsageError."""
    units = {"k": 1_000, "m": 1_000_000}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        tokens = round(float(number) * unit)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise UsageError(f"{text!r} is no number of tokens; write 0.5M, 100k or 4096")
    return tokens


def show_tokens(tokens: int) -> str:
    """As `parse_tokens` reads it."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if tokens >= size / 10 and tokens * 10 % size == 0:
            return f"{tokens / size:g}{unit}"
    return str(tokens)
