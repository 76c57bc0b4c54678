"""What stays softmax: `liger convert --softmax-layers auto:N --softmax-heads auto:N`.

Layers and single key/value heads are measured on the base, by the model code that the converted folder gets, and chosen
greedily (see `choice`). torch is imported only once something is measured.
"""

from dataclasses import replace
from pathlib import Path

from liger_cli.calibration.choice import Ledger, choose_heads, choose_layers, head_passes, layer_passes
from liger_cli.calibration.extent import FIRST_PASSES, expected_tokens
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import liger_layers, with_heads, with_softmax
from liger_cli.conversion.requests import Head, Request
from liger_cli.system.errors import UsageError


def selected_plan(
    plan: Plan, request: Request, data: str | None = None, dry_run: bool = False, calibrate: bool = False
) -> tuple[Plan, dict | None]:
    """The plan with the layers and heads kept that the request names or that a measurement finds.

    Args:
        data: a text or .jsonl file to measure on; a shipped text by default.
        dry_run: measure nothing; a note says what would be, and the last layers and heads stand in the plan for those
            to be chosen.
        calibrate: the plan is calibrated afterwards, so that kept tokens are measured with their scores fitted.
    Returns:
        The plan, and what was measured: the section `selection` of liger.json, None where nothing was.
    Raises:
        UsageError: more than there is to choose from; `data` is not a file. ModelError: the base cannot be loaded.
        LigerError: the text cannot be used.
    """
    plan = with_heads(plan, request.named)
    if not request.measured:
        return plan, None
    candidates = liger_layers(plan)
    if request.layers is not None and request.layers >= len(candidates):
        raise UsageError(
            f"--softmax-layers auto:{request.layers} leaves no layer to linearize; there are {len(candidates)} to "
            "choose from"
        )
    sizes = plan.checkpoint.geometry
    free = (len(candidates) - (request.layers or 0)) * sizes.num_key_value_heads
    heads = request.heads
    if request.share is not None:
        heads = max(1, round(request.share * sizes.num_hidden_layers * sizes.num_key_value_heads))
    if heads is not None and heads >= free:
        raise UsageError(f"--softmax-heads keeps {heads} heads, but only {free} can be chosen from; keep fewer")
    if data is not None and not Path(data).is_file():
        raise UsageError(f"--calibration-data {data} is not a file; name a text or a .jsonl file")
    total = FIRST_PASSES
    total += layer_passes(len(candidates), request.layers) if request.layers else 0
    total += head_passes(free, heads) + (2 if request.layers else 0) if heads else 0
    if dry_run:
        return _stand_in(plan, request.layers or 0, heads or 0, total), None
    keeping = [layer for layer in candidates if calibrate and plan.specs[layer].kept]
    if keeping:
        from liger_cli.calibration.calibrate import open_scored_meter

        meter = open_scored_meter(plan, data, keeping)
    else:
        from liger_cli.calibration.meter import open_meter

        meter = open_meter(plan, data)
    meter.announce(total, "liger" if keeping else None)
    report = meter.describe()
    said: tuple[str, ...] = ()
    kept: frozenset = frozenset()
    if request.layers:
        found = choose_layers(Ledger(meter.measure, meter.base, kept, meter.none), candidates, request.layers)
        report["softmax_layers"], kept = found, frozenset(found["chosen"])
        said += layer_notes(found)
        plan = with_softmax(plan, found["chosen"])
    if heads:
        from liger_cli.calibration.reach import measure_reach

        (none,) = meter.measure([kept]) if kept else (meter.none,)
        found = choose_heads(Ledger(meter.measure, meter.base, kept, none), measure_reach(meter, kept), heads)
        report["softmax_heads"] = found
        plan = with_heads(plan, [_head(name) for name in found["chosen"]])
        said += head_notes(found, plan)
    report["cost"] = cost = meter.cost()
    said += (
        f"measured as {report['stand_in']} on {report['text']}, {cost['passes']} passes over {cost['tokens']:,} "
        f"tokens in {cost['seconds']:.0f} s",
    )
    said += (report["recall_note"],) if report["recall_note"] else ()
    return replace(plan, notes=(*plan.notes, *said)), report


def layer_notes(found: dict) -> tuple[str, ...]:
    fixed = found["spacings"]
    beside = ""
    if fixed:
        best = max(fixed, key=lambda one: one["score"])
        beside = f"; the best fixed spacing of the same size, {best['name']}: {_result(best)}"
    layers = ", ".join(map(str, found["chosen"]))
    return (f"softmax layers chosen by measurement: {layers}; untrained, {_result(found['result'])}{beside}",)


def head_notes(found: dict, plan: Plan) -> tuple[str, ...]:
    """What was found, and what it costs in memory beside one softmax layer in eight."""
    sizes = plan.checkpoint.geometry
    total = sizes.num_hidden_layers * sizes.num_key_value_heads
    kept = len(found["chosen"])
    eighth = max(1, sizes.num_hidden_layers // 8) * sizes.num_key_value_heads
    return (
        f"softmax heads chosen by measurement (layer:head): {', '.join(found['chosen'])}; untrained, "
        f"{_result(found['result'])}",
        f"their keys and values grow with the text: {100 * kept / total:.1f} % of the base's KV cache, where one "
        f"softmax layer in eight takes {100 * eighth / total:.1f} %",
    )


def _result(figures: dict) -> str:
    said = f"{100 * figures['score']:.0f} % of the gap to the base closed"
    return said if figures["recall"] is None else f"{said}, recall beyond the window {100 * figures['recall']:.0f} %"


def _stand_in(plan: Plan, layers: int, heads: int, passes: int) -> Plan:
    measured, kept = [], []
    count = plan.checkpoint.geometry.num_key_value_heads
    candidates = liger_layers(plan)
    tokens = expected_tokens(plan)
    if layers:
        measured.append(f"{len(candidates)} layers")
        kept.append(f"{layers} layers")
        plan = with_softmax(plan, candidates[-layers:])
    if heads:
        left = [(layer, head) for layer in liger_layers(plan) for head in range(count)]
        measured.append(f"{len(left)} key/value heads")
        kept.append(f"{heads} heads")
        plan = with_heads(plan, left[-heads:])
    note = (
        f"{' and '.join(measured)} would be measured, at most {passes} passes over about {tokens:,} tokens, and "
        f"{' and '.join(kept)} kept as softmax; above, the last ones stand in their place"
    )
    return replace(plan, notes=(*plan.notes, note))


def _head(name: str) -> Head:
    layer, _, head = name.partition(":")
    return int(layer), int(head)
