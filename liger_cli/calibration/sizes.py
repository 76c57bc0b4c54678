"""`liger convert --window auto:BYTES` and `--kept auto:BYTES`: each layer's own size, within a budget of cache bytes.

Sizes are measured on the base as softmax layers are (see `selection`), by the model code that the converted folder
gets, with the recurrence off, and chosen by `allocation`. torch is imported only once something is measured.
"""

from dataclasses import replace
from pathlib import Path

from liger_cli.calibration import extent
from liger_cli.calibration.allocation import (
    MEASURED,
    Ladder,
    choose_sizes,
    chosen_sizes,
    ladder_of,
    rungs_up_to,
    size_passes,
)
from liger_cli.calibration.choice import Ledger
from liger_cli.calibration.extent import expected_tokens, probe_distances
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import constant_bytes, liger_layers, resized
from liger_cli.conversion.requests import Budget
from liger_cli.system.errors import UsageError
from liger_cli.system.wording import by_layer, size

MOST = 1 << 20  # tokens of a uniform size
WORDS = {"window": "a window of {} tokens", "kept": "{} kept tokens"}


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
    total = size_passes(ladder.rungs) + extent.FIRST_PASSES
    if dry_run:
        count = sum(len(rungs) // 2 for rungs in ladder.rungs.values())
        note = (
            f"{count} sizes of {len(layers)} layers would be measured, at most {total} passes over about "
            f"{expected_tokens(plan):,} tokens, and each layer given its own within {size(budget.nbytes)}; above, "
            f"{same} stands in their place"
        )
        return replace(plan, notes=(*plan.notes, note)), None
    if name == "kept":
        from liger_cli.calibration.calibrate import open_scored_meter

        meter = open_scored_meter(plan, data, _layers(plan, name))
    else:
        from liger_cli.calibration.meter import open_meter

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
    longest = max([extent.ROW_TOKENS, *(far + extent.PROBE_TOKENS for far in probe_distances(plan))])
    rungs = {}
    for layer in layers:
        limit = min(longest, plan.local_window(layer) or longest)
        limit = max(limit - plan.specs[layer].window, 1) if setting == "kept" else limit
        if len(places := rungs_up_to(MEASURED[setting], limit)) > 1:
            rungs[layer] = places
    return ladder_of(plan, setting, rungs)


def _figures(figures: dict) -> str:
    said = f"KL {figures['kl']:.4f} and {figures['kl_hard']:.3f} on hard tokens"
    return said if figures["recall"] is None else f"{said}, recall beyond the window {100 * figures['recall']:.0f} %"
