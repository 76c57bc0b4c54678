"""How many tokens each layer gets within a budget of bytes, window or kept tokens, from measured figures. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from liger_cli.calibration.choice import Kept, Ledger, Size
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import liger_layers

ROUNDS = 3  # of exchanges between layers, at most
EXCHANGES = 3  # layers that gain in one exchange, at most
SHARES = (0.0, 0.25, 0.5, 1.0)  # of the uniform size that every layer keeps in a first try

Sizes = dict[int, int]  # layer -> place of its size on its ladder


@dataclass(frozen=True)
class Ladder:
    """The sizes that each layer may have.

    Attributes:
        setting: `window` or `kept`.
        rungs: layer -> numbers of tokens, ascending. Those at even places are measured, but for the last, which reaches
            as far as the measured texts; the ones between take the mean of their neighbours' figures at first.
        nbytes: layer -> bytes of the layer's constant cache with each of them.
        around: bytes of layers that have no choice.
    """

    setting: str
    rungs: dict[int, list[int]]
    nbytes: dict[int, list[int]]
    around: int = 0

    def total(self, sizes: Sizes) -> int:
        """Bytes of the whole model's constant cache."""
        return self.around + sum(self.nbytes[layer][place] for layer, place in sizes.items())

    def units(self, sizes: Sizes) -> Kept:
        return frozenset(self.unit(layer, place) for layer, place in sizes.items())

    def unit(self, layer: int, place: int) -> Size:
        return Size(layer, self.setting, self.rungs[layer][place])

    def tokens(self, sizes: Sizes) -> dict[int, int]:
        """Layer -> tokens."""
        return {layer: self.rungs[layer][place] for layer, place in sorted(sizes.items())}


def rungs_up_to(measured: Iterable[int], limit: int) -> list[int]:
    """The measured sizes below `limit`, `limit` itself, and between each two the one half way."""
    ends = [*sorted(one for one in measured if one < limit), limit]
    between = [[first, (first + last) // 2] for first, last in zip(ends, ends[1:], strict=False)]
    return [tokens for pair in between for tokens in pair] + [limit]


def choose_sizes(ledger: Ledger, ladder: Ladder, budget: int, uniform: int, everything: Kept) -> dict:
    """Measure every layer at every size alone, share the budget out by that, then exchange between layers.

    1. Each layer alone at each measured size, the others softmax: what a size costs. Costs of layers are taken to add
       up, and every layer gives up tokens where that costs least for the bytes it frees, until the budget holds. This
       is done four times, each layer keeping at least a part of the uniform size; all are measured, the best is taken.
    2. In each round every layer is measured one size up and one down beside the others as they are. The sizes up that
       gain most for their bytes are paid for by those down that lose least; what is measured to be better is taken.

    Args:
        ledger: starts from the uniform size, the largest that every layer can have within the budget.
        budget: bytes.
        uniform: that size, in tokens.
        everything: all linearized layers, those without a choice too.
    Returns:
        `layers` (each with its `tokens`, and `sizes`: the figures of each measured size, in it alone), `result` (its
        score is the share of the uniform size's gap to the base that is closed), `references`, `setting`, `budget`,
        `uniform`, and `tries` and `rounds` (tokens layer by layer, bytes, figures). Where nothing is better than the
        uniform size, that is chosen.
    """
    losses = _losses(ledger, ladder, everything)
    starts = {}
    for share in SHARES:
        sizes = allocate(ladder, losses, budget, share * uniform)
        starts[tuple(sorted(sizes.items()))] = ladder.units(sizes)
    (best,), _ = ledger.best(starts)
    tries = [_entry(ledger, ladder, dict(one)) for one in starts]
    current, rounds = dict(best), []
    for _ in range(ROUNDS):
        better = _exchange(ledger, ladder, budget, current)
        if better is None:
            break
        current = better
        rounds.append(_entry(ledger, ladder, current))
    found, chosen = _entry(ledger, ladder, current), ladder.tokens(current)
    if found["score"] <= 0:
        found, chosen = ledger.scored(ledger.start), dict.fromkeys(chosen, uniform)
    return {
        "setting": ladder.setting,
        "budget": budget,
        "uniform": uniform,
        "result": {name: value for name, value in found.items() if name not in ("tokens", "bytes")},
        "references": ledger.references(),
        "layers": [
            {
                "layer": layer,
                "tokens": chosen[layer],
                "sizes": [
                    {"tokens": tokens, **ledger.scored(everything - {layer} | {Size(layer, ladder.setting, tokens)})}
                    for tokens in rungs[:-1:2]
                ],
            }
            for layer, rungs in sorted(ladder.rungs.items())
        ],
        "tries": tries,
        "rounds": rounds,
    }


def chosen_sizes(found: dict) -> dict[int, int]:
    """Layer -> tokens, of what `choose_sizes` returned."""
    return {entry["layer"]: entry["tokens"] for entry in found["layers"]}


def allocate(ladder: Ladder, losses: dict[int, list[float]], budget: int, least: float = 0.0) -> Sizes:
    """Sizes within the budget whose losses sum to little: each layer gives up where it loses least for its bytes.

    Args:
        losses: layer -> loss at each of its sizes.
        least: tokens that no layer goes below, as far as the budget has room for that.
    """
    lowest = {
        layer: max((place for place, tokens in enumerate(rungs) if tokens <= least), default=0)
        for layer, rungs in ladder.rungs.items()
    }
    if ladder.total(lowest) > budget:
        lowest = dict.fromkeys(lowest, 0)
    sizes = {layer: len(rungs) - 1 for layer, rungs in ladder.rungs.items()}
    while ladder.total(sizes) > budget:
        moves = [(layer, place) for layer, now in sizes.items() for place in range(lowest[layer], now)]
        layer, place = min(moves, key=lambda move: _rate(ladder, losses, sizes, *move))
        sizes[layer] = place
    while moves := [
        (layer, place)
        for layer, now in sizes.items()
        for place in range(now + 1, len(ladder.rungs[layer]))
        if ladder.total({**sizes, layer: place}) <= budget and losses[layer][place] < losses[layer][now]
    ]:
        layer, place = max(moves, key=lambda move: _rate(ladder, losses, sizes, *move))
        sizes[layer] = place
    return sizes


def _rate(ladder: Ladder, losses: dict[int, list[float]], sizes: Sizes, layer: int, place: int) -> float:
    """Loss for each byte between a layer's size and another one. The larger, the more the larger size is worth."""
    now = sizes[layer]
    nbytes = ladder.nbytes[layer]
    return (losses[layer][place] - losses[layer][now]) / ((nbytes[now] - nbytes[place]) or 1)


def _losses(ledger: Ledger, ladder: Ladder, everything: Kept) -> dict[int, list[float]]:
    """Layer -> what each of its sizes costs when it alone is linearized, in gaps of the uniform size."""
    alone = {
        (layer, tokens): everything - {layer} | {Size(layer, ladder.setting, tokens)}
        for layer, rungs in ladder.rungs.items()
        for tokens in rungs[:-1:2]
    }
    ledger.look_up(list(alone.values()))
    losses = {}
    for layer, rungs in ladder.rungs.items():
        losses[layer] = interpolated([1 - ledger.score(alone[layer, tokens]) for tokens in rungs[:-1:2]])
    return losses


def interpolated(measured: list[float]) -> list[float]:
    """Losses of every place of a ladder from those that are measured; the last place loses nothing."""
    ends = [*measured, 0.0]
    between = [(first + last) / 2 for first, last in zip(ends, ends[1:], strict=False)]
    return [*(loss for pair in zip(ends, between, strict=False) for loss in pair), 0.0]


def _exchange(ledger: Ledger, ladder: Ladder, budget: int, sizes: Sizes) -> Sizes | None:
    """Better sizes within the budget: some layers one size up, others down for it. None where none was found."""
    moves = {
        (layer, step): {**sizes, layer: sizes[layer] + step}
        for layer, rungs in ladder.rungs.items()
        for step in (1, -1)
        if 0 <= sizes[layer] + step < len(rungs)
    }
    now = ladder.units(sizes)
    ledger.look_up([now, *(ladder.units(moved) for moved in moves.values())])
    worth = {move: ledger.score(ladder.units(moved)) - ledger.score(now) for move, moved in moves.items()}
    price = {move: ladder.total(moved) - ladder.total(sizes) for move, moved in moves.items()}
    by_rate = sorted(moves, key=lambda move: -worth[move] / (abs(price[move]) or 1))
    gains = [move for move in by_rate if move[1] == 1 and worth[move] > 0]
    proposals = {}
    for count in range(1, min(EXCHANGES, len(gains)) + 1):
        taken = gains[:count]
        for move in by_rate:
            if ladder.total(sizes) + sum(price[one] for one in taken) <= budget:
                break
            if move[1] == -1 and (move[0], 1) not in taken:
                taken.append(move)
        proposal = dict(sizes)
        for layer, step in taken:
            proposal[layer] += step
        if ladder.total(proposal) <= budget and sum(worth[move] for move in taken) > 0:
            proposals[tuple(sorted(proposal.items()))] = ladder.units(proposal)
    if not proposals:
        return None
    (best,), _ = ledger.best(proposals)
    return dict(best) if ledger.score(proposals[best]) > ledger.score(now) else None


def size_passes(rungs: dict[int, list[int]]) -> int:
    """Passes over the data that `choose_sizes` takes at most; each reading of the data has one of the base, too."""
    alone = sum(len(places) // 2 for places in rungs.values())
    return 1 + alone + 1 + len(SHARES) + ROUNDS * (2 * len(rungs) + EXCHANGES + 2)


def _entry(ledger: Ledger, ladder: Ladder, sizes: Sizes) -> dict:
    tokens = list(ladder.tokens(sizes).values())
    return {"tokens": tokens, "bytes": ladder.total(sizes), **ledger.scored(ladder.units(sizes))}


MEASURED = {
    "window": (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "kept": (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
}  # tokens


def ladder_of(plan: Plan, setting: str, rungs: dict[int, list[int]]) -> Ladder:
    """The ladder of these sizes, with the bytes that they take; the plan's other layers have no choice."""
    nbytes = {
        layer: [plan.constant_bytes(layer, replace(plan.specs[layer], **{setting: tokens})) for tokens in places]
        for layer, places in rungs.items()
    }
    others = [layer for layer in liger_layers(plan) if layer not in rungs]
    return Ladder(setting, rungs, nbytes, sum(plan.constant_bytes(layer, plan.specs[layer]) for layer in others))
