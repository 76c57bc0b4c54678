"""The slots of a layer's exact memory: window, sinks and kept tokens in one tensor whose shape never changes.

A token is written once, into the slot of the token that goes, and stays there while it is visible: in the window, as a
sink, or among the kept ones. While there are free slots they are taken in order, so that slot n is taken once more than
n tokens were read. Without scores the slots behind the sinks' are a ring.

Heads that keep different numbers of tokens share one row of slots, head behind head, and each sees its own. So a layer
has M rows for its Hkv heads: as many, or one.
"""

from dataclasses import dataclass

import torch

from .liger_kept import EMPTY, head_groups

NEVER = 2**62  # number of a slot that is another head's
LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Layout:
    """How many slots there are.

    Attributes:
        window: tokens of the window, the token itself included.
        beyond: tokens behind it, sinks included, of each key/value head.
        scored: whether tokens are kept by their score; else the first ones are.
    """

    window: int
    beyond: tuple[int, ...]
    scored: bool = False

    @property
    def ragged(self) -> bool:
        """Whether the heads share one row of slots."""
        return len(set(self.beyond)) > 1

    @property
    def rows(self) -> int:
        """M, the number of rows."""
        return 1 if self.ragged else len(self.beyond)

    @property
    def slots(self) -> int:
        """S, the length of a row."""
        return sum(self.sizes) if self.ragged else self.sizes[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of each key/value head."""
        return tuple(self.window + count for count in self.beyond)

    def numbers(self, queries: int, device) -> torch.Tensor:
        """The number of each slot among those of a query head, NEVER where it is another head's; behind them, how many
        the head has. [1, 1, 1 or Hq, S + 1]"""
        if not self.ragged:
            return torch.arange(self.slots + 1, device=device).view(1, 1, 1, -1)
        found = torch.full((len(self.beyond), self.slots + 1), NEVER)
        start = 0
        for _, heads, _ in head_groups(self.beyond, 1, torch.device("cpu"))[0]:
            for head in heads.tolist():
                size = self.sizes[head]
                found[head, start : start + size] = torch.arange(size)
                found[head, -1] = size
                start += size
        return found.repeat_interleave(queries // len(self.beyond), dim=0).to(device)[None, None]


def ring_slot(places, window: int, sinks: int):
    """The slot of the token at each place of the text, where tokens go by their age."""
    return torch.where(places < sinks, places, (places - sinks).remainder(window) + sinks)


def from_ring(pairs, tokens, layout: Layout):
    """The window's tokens in order, from a ring.

    Args:
        pairs: [B, H, S, 2, D]. tokens: [B], how many were read.
    Returns:
        keys and values [B, H, W, 2, D], [B, W] bool, false where there is none; and the sinks: keys, values
        [B, H, N, D] and which tokens they are [B, N], EMPTY where there is none; or None.
    """
    window, sinks = layout.window, layout.beyond[0]
    places = tokens.unsqueeze(1) + torch.arange(-window, 0, device=tokens.device)
    found = _slots(pairs, ring_slot(places.clamp_min(0), window, sinks).unsqueeze(1).expand(-1, pairs.shape[1], -1))
    if not sinks:
        return found, places >= 0, None
    first = torch.arange(sinks, device=tokens.device).expand(len(tokens), -1)
    first = first.masked_fill(first >= tokens.unsqueeze(1), EMPTY)
    return found, places >= 0, (*pairs[:, :, :sinks].unbind(3), first)


def to_ring(recent, there, tokens, sinks, layout: Layout):
    """The inverse of `from_ring`, but that any number may say of a sink that it is there; free slots are zero."""
    window, count = layout.window, layout.beyond[0]
    last = tokens.unsqueeze(1) - 1
    places = last - (last - count - torch.arange(window, device=tokens.device)).remainder(window)
    index = places - tokens.unsqueeze(1) + window  # at 0 and above, since no place is older than the window
    taken = (places >= count) & there.gather(1, index)
    found = _slots(recent, index.unsqueeze(1).expand(-1, recent.shape[1], -1))
    found = found.masked_fill(~taken[:, None, :, None, None], 0)
    if not count:
        return found
    first = torch.stack(sinks[:2], dim=3).masked_fill(sinks[2][:, None, :, None, None] == EMPTY, 0)
    first = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, count - first.shape[2]))
    return torch.cat([first, found], dim=2)


def from_scored(held: tuple, tokens, layout: Layout):
    """The window's tokens in order, and the kept ones.

    Args:
        held: pairs [B, M, S, 2, D], priorities and maybe a gate's logits [B, M, S]. tokens: [B].
    Returns:
        pairs, priorities (and logits) of the window [B, H, W, ...], and the memory of `liger_kept.attend_kept`.
    """
    oldest = (tokens - 1 - layout.window).view(-1, 1, 1) << 32
    recents, memory = [], []
    for (count, _, _), part in zip(_groups(layout, tokens.device)[0], _split(held, layout), strict=True):
        ages = part[1] << 32  # the places, which are what an int64 holds below the scores
        order = ages.masked_fill(ages <= oldest, -1).sort(dim=2, stable=True).indices
        part = [_slots(x, order) for x in part]
        memory += [*part[0][:, :, :count].unbind(3), *(x[:, :, :count] for x in part[1:])]
        recents.append([x[:, :, count:] for x in part])
    return _natural(recents, layout), tuple(memory)


def to_scored(recent: tuple, memory: tuple, layout: Layout) -> tuple:
    """The inverse of `from_scored`: what is taken comes first, and slots that are not are zero."""
    groups, _, back = _groups(layout, recent[0].device)
    each = len(memory) // len(groups)
    parts = []
    for index, (_, heads, _) in enumerate(groups):
        keys, values, *more = memory[each * index : each * (index + 1)]
        own = recent if heads is None else [x[:, heads] for x in recent]
        part = [torch.cat(both, dim=2) for both in zip((torch.stack([keys, values], dim=3), *more), own, strict=True)]
        free = part[1] == EMPTY
        order = free.to(torch.uint8).sort(dim=2, stable=True).indices
        parts.append(
            [_slots(part[0].masked_fill(free[..., None, None], 0), order), *(_slots(x, order) for x in part[1:])]
        )
    if back is None:
        return tuple(parts[0])
    return tuple(
        torch.cat([x.flatten(1, 2) for x in several], dim=1).unsqueeze(1) for several in zip(*parts, strict=True)
    )


def _groups(layout: Layout, device):
    return head_groups(layout.beyond, 1, device)


def _split(held: tuple, layout: Layout) -> list[list]:
    """Of each of the groups its heads' slots, [B, heads, slots, ...]."""
    if not layout.ragged:
        return [list(held)]
    parts, start = [], 0
    for count, heads, _ in _groups(layout, held[0].device)[0]:
        stop = start + len(heads) * (layout.window + count)
        parts.append([x[:, 0, start:stop].unflatten(1, (len(heads), -1)) for x in held])
        start = stop
    return parts


def _natural(parts: list[list], layout: Layout) -> tuple:
    back = _groups(layout, parts[0][0].device)[2]
    if back is None:
        return tuple(parts[0])
    return tuple(torch.cat(several, dim=1)[:, back] for several in zip(*parts, strict=True))


def _slots(x, index):
    """Slots of x [B, H, S, ...] at index [B, H, n]."""
    index = index.view(*index.shape, *[1] * (x.ndim - 3))
    return x.gather(2, index.expand(*index.shape[:3], *x.shape[3:]))
