"""Which layers stay softmax, by measurement: `liger convert --softmax-layers auto:N`.

Each layer is measured on the base, by the model code that the converted folder gets: what is lost when it alone is
linearized, and what is won back when it alone is kept. Then a greedy choice: keep the layer that helps most, measure
the others again beside it, until N are kept. torch is imported only once something is measured.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from liger_cli.errors import UsageError
from liger_cli.plan import Plan
from liger_cli.templates.liger_config import LayerSpec

AUTO = "auto:"
ROWS, ROW_TOKENS = 8, 512  # of the text
PROBES = 24  # of each distance
PROBE_TOKENS = 80  # about what a probe has beside its distance: the facts before it and the question
DISTANCES = (2, 6)  # of the probes, in windows
RECALL_NEEDED = 0.5  # share of the probes that the base answers, below which they would say nothing
RECALL_GAP = 0.05  # between the base and no layer kept, below which recall has nothing to tell the layers apart

Kept = frozenset[int]


@dataclass(frozen=True)
class Figures:
    """One choice of kept layers against the base.

    Attributes:
        kl: mean KL divergence (base || model) of the text, nats a token.
        kl_hard: the same over the tokens, of text and answers, where base and window differ by more than 0.5 nat.
        recall: share of the recall probes answered; None where the base cannot do them.
    """

    kl: float
    kl_hard: float
    recall: float | None


def automatic(softmax_layers: str) -> int | None:
    """The N of `auto:N`, or None for another kind of choice. Raises UsageError where N is not a whole number."""
    text = softmax_layers.strip()
    if not text.startswith(AUTO):
        return None
    number = text.removeprefix(AUTO)
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) > 0):
        raise UsageError(f"--softmax-layers is {text!r}; in auto:N, N has to be a whole number, 1 or more")
    return int(number)


def selected_plan(plan: Plan, count: int, data: str | None = None, dry_run: bool = False) -> tuple[Plan, dict | None]:
    """The plan with `count` of its Liger layers kept as softmax, found by measurement.

    Args:
        data: a text or .jsonl file to measure on; a shipped text by default.
        dry_run: measure nothing; a note says what would be, and the last layers stand in the plan for those chosen.
    Returns:
        The plan, and what was measured: the section `selection` of liger.json, None where nothing was.
    Raises:
        UsageError: more layers than there are to choose from; `data` is not a file. ModelError: the base cannot be
            loaded. LigerError: the text cannot be used.
    """
    candidates = [index for index, spec in enumerate(plan.specs) if spec.kind == "liger"]
    if count >= len(candidates):
        raise UsageError(
            f"--softmax-layers auto:{count} leaves no layer to linearize; there are {len(candidates)} to choose from"
        )
    if data is not None and not Path(data).is_file():
        raise UsageError(f"--calibration-data {data} is not a file; name a text or a .jsonl file")
    if dry_run:
        note = (
            f"{len(candidates)} layers would be measured, {passes(len(candidates), count)} passes over about "
            f"{expected_tokens(plan):,} tokens, and {count} of them kept as softmax; above, the last {count} stand in "
            "their place"
        )
        return with_softmax(plan, candidates[-count:], (note,)), None
    from liger_cli.selection_meter import open_meter

    meter = open_meter(plan, data)
    meter.announce(passes(len(candidates), count))
    found = choose_layers(meter.measure, candidates, count, meter.references())
    report = {**meter.describe(), **found, "cost": meter.cost()}
    return with_softmax(plan, report["chosen"], notes(report)), report


def with_softmax(plan: Plan, layers: list[int], said: tuple[str, ...]) -> Plan:
    """The plan with these layers kept as softmax and more notes."""
    specs = tuple(LayerSpec(kind="softmax") if index in layers else spec for index, spec in enumerate(plan.specs))
    return replace(plan, specs=specs, notes=(*plan.notes, *said))


def passes(candidates: int, count: int) -> int:
    """Passes over the data that choosing `count` of so many layers takes at most, the base's own included."""
    first = 3 + 1 + 2 * candidates
    later = sum(1 + candidates - kept for kept in range(1, count))
    return first + later + (0 if count == 1 else 1 + len(spacings(list(range(candidates)), count)))


def expected_tokens(plan: Plan) -> int:
    """About how many tokens a pass reads; the text may be shorter, and the base unable to do the probes."""
    distances = probe_distances(plan)
    return ROWS * ROW_TOKENS + PROBES * sum(distance + PROBE_TOKENS for distance in distances)


def probe_distances(plan: Plan) -> list[int]:
    """Distances beyond the window, in tokens, that the base's positions have room for."""
    window = max(16, max(spec.window for spec in plan.specs if spec.kind == "liger"))
    limit = plan.checkpoint.config.get("max_position_embeddings") or 2 * ROW_TOKENS
    return [times * window for times in DISTANCES if times * window + 2 * PROBE_TOKENS <= limit]


def spacings(candidates: list[int], count: int) -> dict[str, list[int]]:
    """`every:k` for every k that keeps exactly `count` of the candidates, by its name."""
    found = {f"every:{step}": candidates[step - 1 :: step] for step in range(2, len(candidates) + 1)}
    return {name: layers for name, layers in found.items() if len(layers) == count}


def choose_layers(
    measure: Callable[[Sequence[Kept]], list[Figures]], candidates: list[int], count: int, references: dict
) -> dict:
    """Measure every layer and choose greedily.

    Args:
        measure: figures of several sets of kept layers, in one reading of the data.
        candidates: layers that can be linearized; every one that is not kept is.
        count: how many to keep.
        references: `{"base": Figures, "none": Figures}`, all kept and none kept.
    Returns:
        `chosen` in order, `greedy` (the steps in the order taken, each with every candidate's figures), `layers` (each
        with `only_linearized` and `only_kept`), and `spacings` of the same size, each with its layers and figures.
    """
    everything = frozenset(candidates)
    known: dict[Kept, Figures] = {}

    def figures(sets: list[Kept]) -> list[Figures]:
        new = [kept for kept in dict.fromkeys(sets) if kept not in known]
        if new:
            known.update(zip(new, measure(new), strict=True))
        return [known[kept] for kept in sets]

    def scored(kept: Kept) -> dict:
        return {**asdict(known[kept]), "score": score(known[kept], references)}

    alone = [frozenset({layer}) for layer in candidates]
    figures([everything - one for one in alone] + alone)
    kept: Kept = frozenset()
    steps = []
    while len(kept) < count:
        options = [layer for layer in candidates if layer not in kept]
        figures([kept | {layer} for layer in options])
        best = max(options, key=lambda layer: score(known[kept | {layer}], references))
        tried = {str(layer): scored(kept | {layer}) for layer in options}
        kept |= {best}
        steps.append({"layer": best, **tried[str(best)], "tried": tried})
    fixed = spacings(candidates, count)
    figures([frozenset(layers) for layers in fixed.values()])
    return {
        "chosen": sorted(kept),
        "result": scored(kept),
        "references": {name: asdict(value) for name, value in references.items()},
        "layers": [
            {"layer": layer, "only_linearized": scored(everything - {layer}), "only_kept": scored(frozenset({layer}))}
            for layer in candidates
        ],
        "greedy": steps,
        "spacings": [{"name": name, "layers": layers, **scored(frozenset(layers))} for name, layers in fixed.items()],
    }


def score(figures: Figures, references: dict[str, Figures]) -> float:
    """How much of the gap between no layer kept and the base is closed: 1 all of it, below 0 a loss.

    The mean of two: the KL divergence on the hard tokens (all tokens where none is hard), and recall where the base can
    do the probes and the window cannot.
    """
    none, base = references["none"], references["base"]
    name = "kl_hard" if none.kl_hard > 0 else "kl"
    gap = getattr(none, name)
    parts = [1 - getattr(figures, name) / gap if gap > 0 else 0.0]
    if figures.recall is not None and base.recall - none.recall > RECALL_GAP:
        parts.append((figures.recall - none.recall) / (base.recall - none.recall))
    return sum(parts) / len(parts)


def notes(report: dict) -> tuple[str, ...]:
    """Sentences for the plan and the model card."""
    result, cost = report["result"], report["cost"]
    layers = ", ".join(map(str, report["chosen"]))
    found = f"{100 * result['score']:.0f} % of the gap to the base closed, untrained"
    if result["recall"] is not None:
        found += f"; recall beyond the window {100 * result['recall']:.0f} %"
    fixed = report["spacings"]
    if fixed:
        best = max(fixed, key=lambda one: one["score"])
        found += f" (best fixed spacing of the same size, {best['name']}: {100 * best['score']:.0f} % closed"
        found += ")" if best["recall"] is None else f", recall {100 * best['recall']:.0f} %)"
    said = [
        f"measured choice: softmax is kept in layer {layers}: {found}",
        f"measured as {report['stand_in']} on {report['text']}, {cost['passes']} passes over {cost['tokens']:,} "
        f"tokens in {cost['seconds']:.0f} s",
    ]
    if report["recall_note"]:
        said.append(report["recall_note"])
    return tuple(said)


def say(sentence: str) -> None:
    """A line for the user while something takes long."""
    print(f"liger: {sentence}", file=sys.stderr)
