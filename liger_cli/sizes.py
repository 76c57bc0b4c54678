"""`liger convert --window auto:BYTES` and `--kept auto:BYTES`: each layer's own size, within a budget of cache bytes.

Sizes are measured on the base as softmax layers are (see `selection`), by the model code that the converted folder
gets, with the recurrence off, and chosen by `selection_sizes`. torch is imported only once something is measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from liger_cli import selection
from liger_cli.errors import UsageError
from liger_cli.plan import Plan, whole_number
from liger_cli.selection import AUTO, expected_tokens, liger_layers, probe_distances
from liger_cli.selection_choice import Ledger
from liger_cli.selection_sizes import Ladder, choose_sizes, chosen_sizes, rungs_up_to, size_passes
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.wording import by_layer, read_size, size

MEASURED = {
    "window": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "kept": (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
}  # tokens
SHARE = "share:"
MOST = 1 << 20  # tokens of a uniform size
WORDS = {"window": "a window of {} tokens", "kept": "{} kept tokens"}


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
    for name in MEASURED:
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


def sized_plan(plan: Plan, budget: Budget, data: str | None = None, dry_run: bool = False) -> tuple[Plan, dict | None]:
    """The plan with the sizes that a measurement finds.

    Args:
        data: a text or .jsonl file to measure on; a shipped text by default.
        dry_run: measure nothing; a note says what would be, and the uniform size stands in the plan.
    Returns:
        The plan, and what was measured: the section `selection` of liger.json, None where nothing was.
    Raises:
        UsageError: a budget below the least; `data` is not a file. ModelError: the base cannot be loaded. LigerError:
        the text cannot be used.
    """
    name = budget.setting
    plan = resized(plan, name, dict.fromkeys(liger_layers(plan), MEASURED[name][0]))
    layers = _layers(plan, name)
    if not layers:
        raise UsageError(f"{budget.option} finds no layer to choose for: every linearized layer is local in the base")
    uniform = _uniform(plan, budget, layers)
    plan = resized(plan, name, dict.fromkeys(layers, uniform))
    if data is not None and not Path(data).is_file():
        raise UsageError(f"--calibration-data {data} is not a file; name a text or a .jsonl file")
    ladder = _ladder(plan, name, layers)
    same = WORDS[name].format(uniform) + " in every layer"
    if all(uniform >= rungs[-1] for rungs in ladder.rungs.values()):
        note = f"{size(budget.nbytes)} has room for {same}, longer than what would be measured: nothing is chosen"
        return replace(plan, notes=(*plan.notes, note)), None
    total = size_passes(ladder.rungs) + selection.FIRST_PASSES
    if dry_run:
        count = sum(len(rungs) // 2 for rungs in ladder.rungs.values())
        note = (
            f"{count} sizes of {len(layers)} layers would be measured, at most {total} passes over about "
            f"{expected_tokens(plan):,} tokens, and each layer given its own within {size(budget.nbytes)}; above, "
            f"{same} stands in their place"
        )
        return replace(plan, notes=(*plan.notes, note)), None
    if name == "kept":
        from liger_cli.calibrate import open_scored_meter

        meter = open_scored_meter(plan, data, _layers(plan, name))
    else:
        from liger_cli.selection_meter import open_meter

        meter = open_meter(plan, data)
    meter.announce(total, "liger" if name == "kept" else "window")
    everything = frozenset(liger_layers(plan))
    ledger = Ledger(meter.measure, meter.base, frozenset(), meter.none)
    found = choose_sizes(ledger, ladder, budget.nbytes, uniform, everything)
    plan = resized(plan, name, chosen_sizes(found))
    found["bytes"] = constant_bytes(plan)
    report = {**meter.describe(), f"{name}_sizes": found, "cost": meter.cost()}
    cost = report["cost"]
    said = (
        size_note(found),
        f"measured as {report['stand_in']} on {report['text']}, {cost['passes']} passes over {cost['tokens']:,} "
        f"tokens in {cost['seconds']:.0f} s",
        *((report["recall_note"],) if report["recall_note"] else ()),
    )
    return replace(plan, notes=(*plan.notes, *said)), report


def size_note(found: dict) -> str:
    """One sentence on what was chosen, and what it comes to beside the uniform size."""
    what = {"window": "windows in tokens", "kept": "kept tokens"}[found["setting"]]
    uniform = WORDS[found["setting"]].format(found["uniform"])
    chosen, same = found["result"], found["references"]["none"]
    return (
        f"{what} chosen by measurement within {size(found['budget'])}: {by_layer(chosen_sizes(found))}; untrained, "
        f"{_figures(chosen)}, where {uniform} in every layer has {_figures(same)}"
    )


def constant_bytes(plan: Plan) -> int:
    """Bytes of one sequence's constant cache, all Liger layers together."""
    return sum(plan.constant_bytes(layer, plan.specs[layer]) for layer in liger_layers(plan))


def resized(plan: Plan, setting: str, tokens: dict[int, int]) -> Plan:
    """The plan with another `window` or `kept` in these layers."""
    specs = list(plan.specs)
    for layer, count in tokens.items():
        specs[layer] = replace(specs[layer], **{setting: count})
    return replace(plan, specs=tuple(specs))


def _layers(plan: Plan, setting: str) -> list[int]:
    """Linearized layers that have a choice: one that is local in the base has no use for kept tokens."""
    return [layer for layer in liger_layers(plan) if setting == "window" or plan.local_window(layer) is None]


def _uniform(plan: Plan, budget: Budget, layers: list[int]) -> int:
    """The largest size that every layer can have. Raises UsageError where the budget is below the least."""

    def needed(tokens: int) -> int:
        return constant_bytes(resized(plan, budget.setting, dict.fromkeys(layers, tokens)))

    least, most = MEASURED[budget.setting][0], MOST
    if needed(least) > budget.nbytes:
        each = WORDS[budget.setting].format(least)
        raise UsageError(
            f"{budget.option} is below the minimum of {needed(least)} ({size(needed(least))}): with {each}, the "
            f"{len(liger_layers(plan))} linearized layers take that much"
        )
    while least < most:  # the largest that fits lies between
        middle = (least + most + 1) // 2
        least, most = (middle, most) if needed(middle) <= budget.nbytes else (least, middle - 1)
    return least


def _ladder(plan: Plan, setting: str, layers: list[int]) -> Ladder:
    """Sizes up to the longest measured text, or to the base's own window where a layer has one.

    A layer whose own window is no longer than the least has no choice.
    """
    longest = max([selection.ROW_TOKENS, *(far + selection.PROBE_TOKENS for far in probe_distances(plan))])
    rungs = {}
    for layer in layers:
        limit = min(longest, plan.local_window(layer) or longest)
        limit = max(limit - plan.specs[layer].window, 1) if setting == "kept" else limit
        if len(places := rungs_up_to(MEASURED[setting], limit)) > 1:
            rungs[layer] = places
    return ladder_of(plan, setting, rungs)


def ladder_of(plan: Plan, setting: str, rungs: dict[int, list[int]]) -> Ladder:
    """The ladder of these sizes, with the bytes that they take; the plan's other layers have no choice."""
    nbytes = {
        layer: [plan.constant_bytes(layer, replace(plan.specs[layer], **{setting: tokens})) for tokens in places]
        for layer, places in rungs.items()
    }
    others = [layer for layer in liger_layers(plan) if layer not in rungs]
    return Ladder(setting, rungs, nbytes, sum(plan.constant_bytes(layer, plan.specs[layer]) for layer in others))


def without_recurrence(spec: LayerSpec) -> LayerSpec:
    """The layer without its recurrence."""
    return replace(spec, mix=0.0, normalizer="none", branch_scales=False) if spec.kind == "liger" else spec


def _figures(figures: dict) -> str:
    said = f"KL {figures['kl']:.4f} and {figures['kl_hard']:.3f} on hard tokens"
    return said if figures["recall"] is None else f"{said}, recall beyond the window {100 * figures['recall']:.0f} %"
