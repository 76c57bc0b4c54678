"""The choice of what stays softmax, from measured figures: which layers, which key/value heads. No torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from liger_cli.conversion.requests import Head

RECALL_GAP = 0.05  # between the base and nothing kept, below which recall has nothing to tell the candidates apart
SHORTLIST = 16  # heads measured at least, where there are more
ROUNDS = 4  # of measuring heads, at most: where more are kept, a round keeps several


@dataclass(frozen=True)
class Size:
    """A linearized layer with another `window`, or another number of `kept` tokens, than the plan gives it."""

    layer: int
    setting: str
    tokens: int


Kept = frozenset[int | Head | Size]  # whole layers and single heads that stay softmax, and layers of another size


@dataclass(frozen=True)
class Figures:
    """One choice of what is kept against the base.

    Attributes:
        kl: mean KL divergence (base || model) of the text, nats a token.
        kl_hard: the same over the tokens, of text and answers, where base and window differ by more than 0.5 nat.
        recall: share of the recall probes answered; None where the base cannot do them.
    """

    kl: float
    kl_hard: float
    recall: float | None


Measure = Callable[[Sequence[Kept]], list[Figures]]


@dataclass
class Ledger:
    """Measures every set once, and scores it against the base and a set to start from."""

    measure: Measure
    base: Figures
    start: Kept
    none: Figures

    def __post_init__(self):
        self.known: dict[Kept, Figures] = {self.start: self.none}

    def look_up(self, sets: Sequence[Kept]) -> list[Figures]:
        new = [kept for kept in dict.fromkeys(sets) if kept not in self.known]
        if new:
            self.known.update(zip(new, self.measure(new), strict=True))
        return [self.known[kept] for kept in sets]

    def score(self, kept: Kept) -> float:
        return score(self.known[kept], self.none, self.base)

    def scored(self, kept: Kept) -> dict:
        return {**asdict(self.known[kept]), "score": self.score(kept)}

    def references(self) -> dict:
        return {"base": asdict(self.base), "none": asdict(self.none)}

    def best(self, options: dict, count: int = 1) -> tuple[list, dict]:
        """The `count` best options, best first, and every one's figures. Options are names of sets: name -> set."""
        self.look_up(list(options.values()))
        order = sorted(options, key=lambda option: -self.score(options[option]))
        return order[:count], {option: self.scored(options[option]) for option in options}

    def best_beside(self, kept: Kept, units: Sequence, count: int = 1) -> tuple[list, dict]:
        """The `count` units that help most beside `kept`, best first, and every unit's figures by its name."""
        order, tried = self.best({unit: kept | {unit} for unit in units}, count)
        return order, {name_of(unit): figures for unit, figures in tried.items()}


def score(figures: Figures, none: Figures, base: Figures) -> float:
    """How much of the gap between nothing kept and the base is closed: 1 all of it, below 0 a loss.

    The mean of two: the KL divergence on the hard tokens (all tokens where none is hard), and recall where the base can
    do the probes and `none` cannot.
    """
    name = "kl_hard" if none.kl_hard > 0 else "kl"
    gap = getattr(none, name)
    parts = [1 - getattr(figures, name) / gap if gap > 0 else 0.0]
    if figures.recall is not None and base.recall - none.recall > RECALL_GAP:
        parts.append((figures.recall - none.recall) / (base.recall - none.recall))
    return sum(parts) / len(parts)


def name_of(unit: int | Head) -> str:
    """`4` for a layer, `4:0` for its first key/value head: as `--softmax-layers` and `--softmax-heads` take them."""
    return f"{unit[0]}:{unit[1]}" if isinstance(unit, tuple) else str(unit)


def choose_layers(ledger: Ledger, candidates: list[int], count: int) -> dict:
    """Measure every layer and choose greedily: the layer that helps most, the others beside it, until there are enough.

    Args:
        candidates: layers that can be linearized; every one that is not kept is.
        count: how many to keep.
    Returns:
        `chosen` in order, `result`, `greedy` (the steps in the order taken, each with every candidate's figures),
        `layers` (each with `only_linearized` and `only_kept`), `references`, and `spacings` of the same size, each with
        its layers and figures.
    """
    everything = frozenset(candidates)
    alone = [frozenset({layer}) for layer in candidates]
    ledger.look_up([everything - one for one in alone] + alone)
    kept: Kept = frozenset()
    steps = []
    while len(kept) < count:
        (best,), tried = ledger.best_beside(kept, [layer for layer in candidates if layer not in kept])
        kept |= {best}
        steps.append({"layer": best, **tried[name_of(best)], "tried": tried})
    fixed = spacings(candidates, count)
    ledger.look_up([frozenset(layers) for layers in fixed.values()])
    return {
        "chosen": sorted(kept),
        "result": ledger.scored(kept),
        "references": ledger.references(),
        "layers": [
            {
                "layer": layer,
                "only_linearized": ledger.scored(everything - {layer}),
                "only_kept": ledger.scored(frozenset({layer})),
            }
            for layer in candidates
        ],
        "greedy": steps,
        "spacings": [
            {"name": name, "layers": layers, **ledger.scored(frozenset(layers))} for name, layers in fixed.items()
        ],
    }


def spacings(candidates: list[int], count: int) -> dict[str, list[int]]:
    """`every:k` for every k that keeps exactly `count` of the candidates, by its name."""
    found = {f"every:{step}": candidates[step - 1 :: step] for step in range(2, len(candidates) + 1)}
    return {name: layers for name, layers in found.items() if len(layers) == count}


def choose_heads(ledger: Ledger, reaches: dict[Head, float], count: int) -> dict:
    """Shortlist key/value heads by their reach, measure those, and choose greedily.

    Args:
        ledger: starts from the layers that are kept already.
        reaches: a closed-form score of every head that can be kept: see `reach.measure_reach`.
        count: how many to keep.
    Returns:
        `chosen` in order, `result`, `references`, `heads` (each with `reach`, and with `only_kept` where it was on the
        shortlist), `greedy` (rounds with the heads they kept and every figure), and `rank_correlation` between reach
        and score over the shortlist (Spearman's; None for fewer than three heads).
    """
    listed = sorted(reaches, key=lambda head: -reaches[head])[: shortlist_size(len(reaches), count)]
    kept = ledger.start
    rounds, alone = [], {}
    for size in round_sizes(count):
        options = [head for head in listed if head not in kept]
        best, tried = ledger.best_beside(kept, options, size)
        alone = alone or tried
        kept |= set(best)
        ledger.look_up([kept])
        rounds.append({"heads": [name_of(head) for head in best], **ledger.scored(kept), "tried": tried})
    chosen = sorted(head for head in kept if isinstance(head, tuple))
    return {
        "chosen": [name_of(head) for head in chosen],
        "result": ledger.scored(kept),
        "references": ledger.references(),
        "heads": [
            {"layer": head[0], "head": head[1], "reach": reach, "only_kept": alone.get(name_of(head))}
            for head, reach in sorted(reaches.items())
        ],
        "greedy": rounds,
        "rank_correlation": rank_correlation(
            [reaches[head] for head in listed], [alone[name_of(head)]["score"] for head in listed]
        ),
    }


def shortlist_size(heads: int, count: int) -> int:
    return min(heads, max(SHORTLIST, 2 * count))


def round_sizes(count: int) -> list[int]:
    """How many heads each round keeps: one, or as many as it takes for `ROUNDS` rounds."""
    rounds = min(count, ROUNDS)
    return [count // rounds + (index < count % rounds) for index in range(rounds)]


def layer_passes(candidates: int, count: int) -> int:
    """Passes over the data that `choose_layers` takes at most; each reading of the data has one of the base, too."""
    later = sum(1 + candidates - kept for kept in range(1, count))
    fixed = len(spacings(list(range(candidates)), count)) if count > 1 else 0
    return 1 + 2 * candidates + later + (1 + fixed if fixed else 0)


def head_passes(heads: int, count: int) -> int:
    """Passes over the data that `choose_heads` takes at most, with the one that measures the reach."""
    total, kept = 1, 0
    for size in round_sizes(count):
        total += 1 + shortlist_size(heads, count) - kept + (2 if size > 1 else 0)
        kept += size
    return total


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's rank correlation; equal values share their mean rank."""
    if len(first) < 3:
        return None
    a, b = _ranks(first), _ranks(second)
    middle = (len(a) - 1) / 2
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / spread if spread else None


def _ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
