"""How messages and tables word a number of bytes, figures by layer, and a name that is not known."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import groupby

FILE = re.compile(r"\.(jsonl?|csv|parquet|txt)(:[\d.]+)?$", re.IGNORECASE)
FOLDERS = re.compile(r"^.*[/\\\\]")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float, places: int = 1) -> str:
    """Bytes in binary units, with so many decimal places from KiB on."""
    for unit in UNITS:
        if count < 1024 or unit == "TiB":
            return f"{count:.{places}f} {unit}" if unit != "B" else f"{round(count)} B"
        count /= 1024
    raise AssertionError


def counted(count: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def read_size(text: str) -> int | None:
    """The bytes that a text such as `2MiB`, `1.5 GiB` or `800000` names; None for any other text."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([KMGT]iB|B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        return None
    unit = [one.lower() for one in UNITS].index((match[2] or "B").lower())
    return round(float(match[1]) * 1024**unit) if "." in match[1] else int(match[1]) * 1024**unit


def by_layer(values: dict[int, int]) -> str:
    """`16 (layers 0-2, 5), 96 (layer 3)`: each value with the layers that have it, in order of their first."""
    found: dict[int, list[int]] = {}
    for layer, value in sorted(values.items()):
        found.setdefault(value, []).append(layer)
    return ", ".join(f"{value} (layer{'s' * (len(layers) > 1)} {_runs(layers)})" for value, layers in found.items())


def _runs(numbers: list[int]) -> str:
    """`0-2, 5` for 0, 1, 2 and 5."""
    groups = [list(group) for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in ((group[0][1], group[-1][1]) for group in groups)
    )


def without_folders(sources: str) -> str:
    """Names of data for others to read: files, by commas, by their names alone; a hub id stays as it is."""
    return ",".join(FOLDERS.sub("", one.strip()) if FILE.search(one) else one.strip() for one in sources.split(","))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message that `name` is none of `known`: the nearest of them, or nothing where none is near."""
    near = get_close_matches(name[:100], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def duration(seconds: float) -> str:
    """`42 s`, `7 minutes`, `1.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
