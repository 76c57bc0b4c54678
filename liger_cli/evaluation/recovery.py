"""Recovery: the share of the gap between the control (the window alone) and the base that the model closes."""

import math
from dataclasses import dataclass

BASE_FAILS = "base fails"
NO_GAP = "no gap"
LEAST_NATS = 0.01  # a token; a smaller gap between control and base is no gap
FAILS_BELOW = 0.1  # of recall probes: a base that answers fewer has not learned to
ERRORS = 2  # standard errors that a task's figures have to be apart
LOGARITHMIC = "perplexity"  # metrics named so are compared by their logarithms, in nats


@dataclass(frozen=True)
class Gap:
    """What there is to recover, in a figure of which more is better.

    Attributes:
        base, control: the figures of the base and of the window alone.
        floor: what guessing scores. A base that is not `above_floor` over it has nothing that could be recovered.
        above_floor, least: the least distance of the base from the floor, and from the control, that says anything.
    """

    base: float
    control: float
    floor: float = -math.inf
    above_floor: float = 0.0
    least: float = 0.0

    @property
    def missing(self) -> str | None:
        """Why there is no recovery, in words, or None."""
        if not self.base - self.floor > self.above_floor:
            return BASE_FAILS
        return None if self.base - self.control > self.least else NO_GAP

    def closed_by(self, model: float) -> float | None:
        """0 for a model as good as the control, 1 for one as good as the base, less than 0 for a worse one."""
        return None if self.missing else (model - self.control) / (self.base - self.control)


def nats_gap(base: float, control: float) -> Gap:
    """Of two losses or divergences, in nats a token; less is better, so both are to be compared negated."""
    return Gap(-base, -control, least=LEAST_NATS)


def recall_gap(base: float, control: float) -> Gap:
    """Of two shares of probes answered exactly."""
    return Gap(base, control, floor=0.0, above_floor=FAILS_BELOW, least=FAILS_BELOW)


def task_gap(metric: str, base: dict, control: dict, chance: float | None) -> Gap | None:
    """Of a harness task's figures `{value, stderr, higher_is_better}`; None where nothing can be compared.

    Args:
        chance: what guessing scores, None where that is not known.
    """
    values = [scale(metric, figure) for figure in (base, control)]
    if None in values or (base["higher_is_better"] and chance is None):
        return None
    if LOGARITHMIC in metric:
        return Gap(*values, least=LEAST_NATS)
    errors = [figure["stderr"] or 0.0 for figure in (base, control)]
    floor = {"floor": chance, "above_floor": ERRORS * errors[0]} if base["higher_is_better"] else {}
    return Gap(*values, least=ERRORS * math.hypot(*errors), **floor)


def scale(metric: str, figure: dict) -> float | None:
    """A task's figure so that more is better, a perplexity in nats; None where nobody says what is better."""
    value, better = figure["value"], figure["higher_is_better"]
    if value is None or better is None:
        return None
    if LOGARITHMIC in metric:
        value = math.log(value) if value > 0 else None
    return value if better or value is None else -value
