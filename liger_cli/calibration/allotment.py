"""Where exact memory is worth most: kept tokens, states and softmax heads shared out between all heads. No torch.

Every head has options, each with a price and with what it costs the model (see `costs`). Costs of heads are taken to
add up. At a price of lambda for each unit, a head takes the option with the least cost + lambda * price; lambda is
the lowest at which everything fits (Everett's Lagrange multipliers), and what is left over goes where it gains most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Head = tuple[int, int]  # layer, key/value head
STEPS = 60  # of the bisection


@dataclass(frozen=True)
class Option:
    """What a head may have.

    Attributes:
        kept: tokens it keeps by score; None: it stays softmax.
        rest: whether what it lets go of enters a state.
        price: bytes, or tokens.
        cost: of what it then lacks.
    """

    kept: int | None
    rest: bool
    price: float
    cost: float


def allot(options: dict[Head, Sequence[Option]], budget: float, softmax: int | None = 0) -> dict[Head, Option]:
    """One option for every head, their prices within the budget.

    Args:
        budget: of all heads; with a number `softmax`, of those that do not stay softmax.
        softmax: how many heads stay softmax, whatever their price: those that cost most at the price of a unit. None:
            staying softmax is an option like the others.
    Raises:
        ValueError: the cheapest options are above the budget.
    """
    low, high = 0.0, 1.0
    while (found := _at_price(options, high, softmax)) and _price(found, softmax) > budget:
        high *= 16
        if high > 1e30:
            raise ValueError("the cheapest options are above the budget")
    for _ in range(STEPS):
        middle = (low * high) ** 0.5 if low else high / 1024
        candidate = _at_price(options, middle, softmax)
        if _price(candidate, softmax) > budget:
            low = middle
        else:
            high, found = middle, candidate
        if low and high / low < 1 + 1e-9:
            break
    return _spend(options, found, budget - _price(found, softmax), softmax)


def _at_price(options, price: float, softmax: int | None) -> dict[Head, Option]:
    found = {}
    for head, several in options.items():
        can = [one for one in several if softmax is None or one.kept is not None]
        found[head] = min(can, key=lambda one: (one.cost + price * one.price, one.price))
    worth = lambda head: found[head].cost + price * found[head].price  # noqa: E731
    can = [head for head, several in options.items() if any(one.kept is None for one in several)]
    for head in sorted(can, key=worth, reverse=True)[: softmax or 0]:
        found[head] = next(one for one in options[head] if one.kept is None)
    return found


def _price(found: dict[Head, Option], softmax: int | None) -> float:
    return sum(one.price for one in found.values() if softmax is None or one.kept is not None)


def _spend(options, found: dict[Head, Option], left: float, softmax: int | None) -> dict[Head, Option]:
    """What is left over goes to the options that gain most for their price."""
    found, free = dict(found), lambda one: softmax is None or one.kept is not None
    while True:
        moves = [
            (head, one)
            for head, now in found.items()
            if free(now)
            for one in options[head]
            if free(one) and one.cost < now.cost and 0 < one.price - now.price <= left
        ]
        if not moves:
            return found
        gain = lambda move: (found[move[0]].cost - move[1].cost) / (move[1].price - found[move[0]].price)  # noqa: E731
        head, one = max(moves, key=gain)
        left -= one.price - found[head].price
        found[head] = one


def evened(found: dict[Head, Option], options: dict[Head, Sequence[Option]]) -> dict[Head, Option]:
    """With states for every n-th of some of a layer's heads in a row, those that stay softmax left out.

    A step of decoding reads such heads as a slice; others it gathers one by one, which takes some six operations more.
    A layer with another set gets of these the one that costs least, at no higher a price.
    """
    found = dict(found)
    for layer in {layer for layer, _ in found}:
        heads = sorted(head for head, one in found.items() if head[0] == layer and one.kept is not None)
        sets = list(_slices(len(heads)))
        if [found[head].rest for head in heads] in sets:
            continue
        ways = [{one.rest: one for one in options[head] if one.kept == found[head].kept} for head in heads]
        most = sum(found[head].price for head in heads)
        several = [[way.get(flag) for flag, way in zip(flags, ways, strict=True)] for flags in sets]
        can = [them for them in several if None not in them and sum(one.price for one in them) <= most]
        if can:
            found |= dict(zip(heads, min(can, key=lambda them: sum(one.cost for one in them)), strict=True))
    return found


def _slices(count: int):
    """Every choice of a slice of so many, as flags; none first."""
    yield [False] * count
    for start in range(count):
        for step in range(1, count - start + 1):
            for stop in range(start + 1, count + 1, step):
                chosen = range(start, stop, step)
                yield [place in chosen for place in range(count)]
