"""What options of `liger convert` ask to be found on the base: softmax layers and heads, kept tokens, a budget."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from liger_cli.conversion.plan import whole_number
from liger_cli.system.errors import UsageError
from liger_cli.system.wording import read_size

AUTO = "auto:"
SHARE = "share:"
LEAST_SEQ_LEN = 32  # tokens of a row that is calibrated on
OWN = "self"  # the text to calibrate on is what the base writes itself
Head = tuple[int, int]  # layer, key/value head
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class Budget:
    """`--budget BYTES@TOKENS`: bytes that one sequence's cache may take after so many tokens."""

    nbytes: int
    tokens: int


@dataclass(frozen=True)
class Request:
    """What is to be found or kept beyond what `make_plan` does by itself.

    Attributes:
        layers: how many layers to choose, or None.
        heads: how many heads to choose, or None.
        share: heads to choose as a share of all key/value heads, or None.
        named: heads to keep, by the user's word.
        kept: kept tokens of a key/value head on average, shared out between all of them; None where each has its own.
        budget: of the whole cache, or None.
    """

    layers: int | None = None
    heads: int | None = None
    share: float | None = None
    named: tuple[Head, ...] = ()
    kept: int | None = None
    budget: Budget | None = None

    @property
    def chooses(self) -> bool:
        """Whether layers or heads are chosen, which needs the base."""
        return self.layers is not None or self.heads is not None or self.share is not None or self.budget is not None


def read_request(
    softmax_layers: str = "none",
    softmax_heads: str = "none",
    kept: str | int | Sequence[int] | None = None,
    budget: str | None = None,
    calibrate: bool = False,
    default_kept: int = 0,
) -> Request:
    """Parse the options. Lists of layers and numbers of kept tokens are left to `make_plan`.

    Args:
        default_kept: what a calibration shares out where nothing is said; 0 for nothing.
    Raises:
        UsageError: an option cannot be read, or does not go with another.
    """
    shared = default_kept or None
    if kept is not None:
        shared = _shared(kept) if isinstance(kept, str) else None
        if shared and not calibrate:
            raise UsageError(f"--kept {kept} needs scores that are fitted: add --calibrate")
    found = Request(**_heads(softmax_heads), layers=_layers(softmax_layers), kept=shared, budget=_budget(budget))
    if found.budget:
        if not calibrate:
            raise UsageError(f"--budget {budget} needs scores that are fitted: add --calibrate")
        if kept is not None or found.layers or found.heads or found.share:
            raise UsageError("--budget shares out all that it has; leave out --kept and auto of the softmax options")
    if found.layers and (found.heads or found.share):
        raise UsageError("--softmax-layers and --softmax-heads both ask for auto; give one of them")
    return found


def _shared(text: str) -> int | None:
    """N of `share:N`; None for a number."""
    text = text.strip()
    if not text.startswith(SHARE):
        if whole_number(text) is None:
            raise UsageError(f"--kept is {text!r}, but has to be a whole number or share:N such as share:128")
        return None
    shared = whole_number(text.removeprefix(SHARE))
    if not shared:
        raise UsageError(
            f"--kept is {text!r}; in share:N, N has to be a whole number, 1 or more: the mean of all heads"
        )
    return shared


def _layers(text: str) -> int | None:
    text = text.strip()
    if not text.startswith(AUTO):
        return None
    count = whole_number(text.removeprefix(AUTO))
    if not count:
        raise UsageError(f"--softmax-layers is {text!r}; in auto:N, N has to be a whole number, 1 or more")
    return count


def _heads(option: str) -> dict:
    option = option.strip()
    if option == "none":
        return {}
    if option.startswith(AUTO):
        text = option.removeprefix(AUTO)
        if text.endswith("%"):
            return {"share": _share(option, text[:-1])}
        if not whole_number(text):
            raise UsageError(
                f"--softmax-heads is {option!r}; in auto:N, N has to be a whole number or a share like 10%"
            )
        return {"heads": whole_number(text)}
    named = set()
    for part in option.split(","):
        numbers = [whole_number(number) for number in part.strip().split(":")]
        if len(numbers) != 2 or None in numbers:
            raise UsageError(
                f"--softmax-heads is {option!r}, but has to be none, auto:N, auto:10% or layers and heads such as "
                "4:0,5:1"
            )
        named.add((numbers[0], numbers[1]))
    return {"named": tuple(sorted(named))}


def _share(option: str, text: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--softmax-heads is {option!r}; in auto:P%, P has to be between 0 and 100")
    return share


def _budget(text: str | None) -> Budget | None:
    if text is None:
        return None
    size, _, context = text.strip().partition("@")
    nbytes, tokens = read_size(size), re.fullmatch(r"(\d{1,9})([kKmM]?)", context.strip())
    if nbytes is None or tokens is None or int(tokens[1]) == 0:
        raise UsageError(f"--budget is {text!r}, but has to be bytes at a length in tokens, such as 12MiB@32K")
    return Budget(nbytes, int(tokens[1]) * UNITS[tokens[2].lower()])
