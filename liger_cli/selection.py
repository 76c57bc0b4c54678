"""What stays softmax: `liger convert --softmax-layers auto:N --softmax-heads auto:N`.

Layers and single key/value heads are measured on the base, by the model code that the converted folder gets, and chosen
greedily (see `selection_choice`). torch is imported only once something is measured.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from liger_cli.errors import UsageError
from liger_cli.plan import Plan, whole_number
from liger_cli.selection_choice import Head, Ledger, choose_heads, choose_layers, head_passes, layer_passes
from liger_cli.templates.liger_config import LayerSpec

AUTO = "auto:"
ROWS, ROW_TOKENS = 8, 512  # of the text
PROBES = 24  # of each distance
PROBE_TOKENS = 80  # about what a probe has beside its distance: the facts before it and the question
DISTANCES = (2, 6)  # of the probes, in windows
RECALL_NEEDED = 0.5  # share of the probes that the base answers, below which they would say nothing
FIRST_PASSES = 3  # the base and both stand-ins


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
        from liger_cli.calibrate import open_scored_meter

        meter = open_scored_meter(plan, data, keeping)
    else:
        from liger_cli.selection_meter import open_meter

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
        from liger_cli.selection_heads import measure_reach

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


def liger_layers(plan: Plan) -> list[int]:
    return [index for index, spec in enumerate(plan.specs) if spec.kind == "liger"]


def with_softmax(plan: Plan, layers: list[int]) -> Plan:
    """The plan with these layers kept as softmax."""
    specs = tuple(LayerSpec(kind="softmax") if index in layers else spec for index, spec in enumerate(plan.specs))
    return replace(plan, specs=specs)


def with_heads(plan: Plan, heads) -> Plan:
    """The plan with these key/value heads kept as softmax; a layer whose heads are all kept becomes a softmax layer.

    Raises:
        UsageError: a head that is not there or is not linearized, or no linearized head left.
    """
    count = plan.checkpoint.geometry.num_key_value_heads
    specs = list(plan.specs)
    for layer, head in heads:
        if layer >= len(specs) or head >= count:
            raise UsageError(
                f"--softmax-heads names head {layer}:{head}, but the layers are 0 to {len(specs) - 1} and the "
                f"key/value heads 0 to {count - 1}"
            )
        if plan.specs[layer].kind != "liger":
            raise UsageError(f"--softmax-heads names head {layer}:{head}, but layer {layer} is not linearized")
        specs[layer] = replace(specs[layer], softmax_kv_heads=(*specs[layer].softmax_kv_heads, head))
    for index, spec in enumerate(specs):
        if len(spec.softmax_kv_heads) == count:
            specs[index] = LayerSpec(kind="softmax")
    if not any(spec.kind == "liger" for spec in specs):
        raise UsageError("--softmax-heads leaves no head to linearize; keep fewer")
    return replace(plan, specs=tuple(specs))


def expected_tokens(plan: Plan) -> int:
    """About how many tokens a pass reads; the text may be shorter, and the base unable to do the probes."""
    return ROWS * ROW_TOKENS + PROBES * sum(distance + PROBE_TOKENS for distance in probe_distances(plan))


def probe_distances(plan: Plan) -> list[int]:
    """Distances beyond the window, in tokens, that the base's positions have room for."""
    window = max(16, max(spec.window for spec in plan.specs if spec.kind == "liger"))
    limit = plan.checkpoint.config.get("max_position_embeddings") or 2 * ROW_TOKENS
    return [times * window for times in DISTANCES if times * window + 2 * PROBE_TOKENS <= limit]


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


def say(sentence: str) -> None:
    """A line for the user while something takes long."""
    print(f"liger: {sentence}", file=sys.stderr)


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


def _share(option: str, text: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--softmax-heads is {option!r}; in auto:P%, P has to be between 0 and 100")
    return share
