"""How much of what is trained lies beyond what a model keeps exactly: window, sinks and kept tokens."""

from collections.abc import Sequence

import numpy as np

from liger_cli.templates.liger_config import LayerSpec
from liger_cli.training.data import IGNORED, Example

LITTLE = 0.05  # of the trained tokens: below, training teaches next to nothing about distance


def exact_tokens(specs: Sequence[LayerSpec], num_key_value_heads: int) -> list[int]:
    """For each key/value head of a Liger layer the number of tokens it keeps exactly; softmax heads are left out."""
    found = []
    for spec in specs:
        if spec.kind == "liger":
            found += [spec.window + spec.sinks + kept for kept in spec.kept_by_head(num_key_value_heads)]
    return found


def share_beyond(
    samples: Sequence[tuple[float, Sequence[Example]]], exact: Sequence[int], every: bool, joined: int | None = None
) -> float | None:
    """Share of the trained tokens before which more text stands than a head keeps exactly, averaged over heads.

    Args:
        samples: of a schedule's `samples`.
        exact: of `exact_tokens`.
        every: every token is trained on, as `distill` and `transfer` do, and not the labels alone.
        joined: tokens of a row, where its examples are one text.
    Returns:
        None where nothing is trained or no head is Liger's.
    """
    total = 0.0
    tokens, heads = np.unique(exact, return_counts=True)
    for weight, examples in samples:
        seen = [_seen(example, every) for example in examples]
        if joined:
            starts = np.cumsum([0, *map(len, examples)])[:-1]
            seen = [(start + one - 1) % joined + 1 for start, one in zip(starts, seen, strict=True)]
        seen = np.concatenate(seen) if seen else np.zeros(0)
        if not len(seen) or not len(exact):
            return None
        total += weight * sum((seen > limit).mean() * count for limit, count in zip(tokens, heads, strict=True))
    return float(total / len(exact))


def _seen(example: Example, every: bool) -> np.ndarray:
    """For each trained prediction how many tokens it is made from."""
    if every:
        return np.arange(1, len(example) + 1)
    return np.flatnonzero(example.labels[1:] != IGNORED) + 1
