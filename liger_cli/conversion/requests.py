"""What options of `liger convert` ask to be found: `auto:N` layers and heads, `auto:BYTES` of cache, `share:N`."""

from dataclasses import dataclass

from liger_cli.conversion.plan import whole_number
from liger_cli.system.errors import UsageError
from liger_cli.system.wording import read_size

AUTO = "auto:"
SHARE = "share:"
Head = tuple[int, int]  # layer, key/value head


@dataclass(frozen=True)
class Request:
    """What `--softmax-layers` and `--softmax-heads` ask to be found or kept beyond what `make_plan` does by itself.

    Attributes:
        layers: how many layers to choose, or None.
        heads: how many heads to choose, or None.
        share: heads to choose as a share of all key/value heads, or None.
        named: heads to keep, by the user's word.
    """

    layers: int | None = None
    heads: int | None = None
    share: float | None = None
    named: tuple[Head, ...] = ()

    @property
    def measured(self) -> bool:
        return self.layers is not None or self.heads is not None or self.share is not None


def read_request(softmax_layers: str, softmax_heads: str = "none") -> Request:
    """Parse both options. Raises UsageError where one cannot be read; lists of layers are left to `make_plan`."""
    layers = softmax_layers.strip()
    count = None
    if layers.startswith(AUTO):
        count = whole_number(layers.removeprefix(AUTO))
        if not count:
            raise UsageError(f"--softmax-layers is {layers!r}; in auto:N, N has to be a whole number, 1 or more")
    heads = softmax_heads.strip()
    if heads == "none":
        return Request(layers=count)
    if heads.startswith(AUTO):
        text = heads.removeprefix(AUTO)
        if text.endswith("%"):
            return Request(layers=count, share=_share(heads, text[:-1]))
        if not whole_number(text):
            raise UsageError(f"--softmax-heads is {heads!r}; in auto:N, N has to be a whole number or a share like 2%")
        return Request(layers=count, heads=whole_number(text))
    named = set()
    for part in heads.split(","):
        numbers = [whole_number(number) for number in part.strip().split(":")]
        if len(numbers) != 2 or None in numbers:
            raise UsageError(
                f"--softmax-heads is {heads!r}, but has to be none, auto:N, auto:2% or layers and heads such as 4:0,5:1"
            )
        named.add((numbers[0], numbers[1]))
    return Request(layers=count, named=tuple(sorted(named)))


def _share(option: str, text: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--softmax-heads is {option!r}; in auto:P%, P has to be between 0 and 100")
    return share


@dataclass(frozen=True)
class Budget:
    """What `--window auto:BYTES` or `--kept auto:BYTES` asks for.

    Attributes:
        setting: `window` or `kept`: the field of `LayerSpec` that each layer gets its own value of.
        nbytes: of one sequence's constant cache in all Liger layers together.
    """

    setting: str
    nbytes: int

    @property
    def option(self) -> str:
        return f"--{self.setting} {AUTO}{self.nbytes}"


def read_share(settings: dict, calibrate: bool) -> tuple[dict, bool]:
    """The settings with a number in place of `share:N`, and whether the kept tokens are to be shared out.

    A calibration shares them out where nothing is said of them.

    Raises:
        UsageError: `share:` without a number, without `calibrate`, or beside kept tokens of single layers.
    """
    text, layers = settings.get("kept"), any("kept=" in one for one in settings.get("layers", ()))
    if text is None:
        return settings, calibrate and not layers
    if not str(text).strip().startswith(SHARE):
        return settings, False
    number = whole_number(str(text).strip().removeprefix(SHARE))
    if number is None:
        raise UsageError(f"--kept is {text!r}; in share:N, N has to be a whole number: of tokens a layer, on average")
    if not calibrate:
        raise UsageError(f"--kept {text} needs scores that are fitted: add --calibrate")
    if layers:
        raise UsageError(f"--layer sets kept, which --kept {text} shares out; leave one of them out")
    return {**settings, "kept": number}, True


def read_budget(settings: dict, calibrate: bool) -> tuple[dict, Budget | None]:
    """The settings with numbers in place of the texts of `--window` and `--kept`, and the budget where one asks for it.

    Raises:
        UsageError: a text that is neither; two budgets; what does not go with one.
    """
    settings, found = dict(settings), []
    for name in ("window", "kept"):
        text = settings.get(name)
        if not isinstance(text, str):
            continue
        option = f"--{name} is {text!r}"
        if text.strip().startswith(AUTO):
            nbytes = read_size(text.strip().removeprefix(AUTO))
            if nbytes is None:
                raise UsageError(f"{option}; in auto:BYTES, BYTES has to be like 2MiB, 512KiB or 800000")
            settings[name] = 1  # until `sized_plan`: enough to find what does not go with it
            found.append(Budget(name, nbytes))
        elif (number := whole_number(text.strip())) is not None:
            settings[name] = number
        else:
            share = ", share:N such as share:128" if name == "kept" else ""
            raise UsageError(
                f"{option}, but has to be a whole number, 0 or more{share}, or auto:BYTES such as auto:2MiB"
            )
    if len(found) > 1:
        raise UsageError("--window and --kept both ask for auto; give one of them a number")
    if not found:
        return settings, None
    budget = found[0]
    if any(f"{budget.setting}=" in text for text in settings.get("layers", ())):
        raise UsageError(f"--layer sets {budget.setting}, which {budget.option} chooses; leave one of them out")
    if budget.setting == "kept" and not calibrate:
        raise UsageError(f"{budget.option} needs scores that are fitted: add --calibrate")
    if budget.setting == "window":
        if settings.get("kept") or any("kept=" in text for text in settings.get("layers", ())):
            raise UsageError(
                f"{budget.option} chooses windows without kept tokens; with them, give --window a number and use "
                "--kept auto:BYTES"
            )
        settings["kept"] = 0
    return settings, budget
