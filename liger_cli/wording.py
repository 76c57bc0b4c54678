"""How messages and tables word a number of bytes, and a name that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


def size(count: float, places: int = 1) -> str:
    """Bytes in binary units, with so many decimal places from KiB on."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.{places}f} {unit}" if unit != "B" else f"{round(count)} B"
        count /= 1024
    raise AssertionError


def counted(count: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message that `name` is none of `known`: the nearest of them, or nothing where none is near."""
    near = get_close_matches(name[:100], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
