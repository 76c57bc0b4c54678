"""Kept tokens: of all that have left the window, the few with the highest learned score stay visible to it.

A constant number of keys and values for each key/value head, chosen by a linear score of the key before its rotary
embedding. A token is kept at time t if it left the window by then and fewer than `count` of the others that did have a
higher score, or the same and a later place. So the choice depends on the text alone, not on how it is fed or padded.
Sinks, the first tokens of a text, come before every score, so that they are always among the kept ones.

Score and place are one int64, the token's priority: no two are equal, and a place never has to be looked up. Once the
memory is full, every step evicts one token: the one that leaves the window, or the kept one that it beats.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from .liger_window import Scoring, softmax_with_denominator

# Queries that share a list of candidates: what was kept when the first of them came, and what leaves the window since.
BLOCK = 64
STEPS = 1024  # scores are rounded to 1 / STEPS: equal keys have to get equal scores in sums of any order
HIGHEST = 2**30 - 64  # of a score, in steps
SINK = 2**30  # of a sink; float32 holds both
# Priority of padding, and of a place where nothing is kept. What it has in a place's bits is older than any token.
EMPTY = torch.iinfo(torch.int64).min + 2**31


def keep_scores(k, weight):
    """Scores of keys. k [B, Hkv, T, D] before RoPE, weight [Hkv, D] -> [B, Hkv, T, 1] float32, with gradients."""
    scores = k.float() @ weight.float().unsqueeze(-1)
    if not torch.is_grad_enabled():
        return scores  # `priorities` rounds them
    return scores + ((scores.detach() * STEPS).round() / STEPS - scores.detach())


def priorities(scores, places, sinks: int = 0, valid=None, bounds=None):
    """By which tokens are kept: the highest are.

    Args:
        scores: [B, Hkv, T]. places: [B or 1, T] int64, which tokens of the text they are.
        sinks: the first tokens, which come before all others.
        valid: [B, T] bool, false at padding; None where there is none.
        bounds: `score_bounds` of the places, where they are known.
    Returns:
        [B, Hkv, T] int64, EMPTY at padding.
    """
    bounds = bounds or score_bounds(places, sinks)
    steps = (scores.detach() * STEPS).round().clamp(*bounds).to(torch.int64)
    found = torch.add(places.unsqueeze(1), steps, alpha=1 << 32)
    return found if valid is None else found.masked_fill(~valid.unsqueeze(1), EMPTY)


def score_bounds(places, sinks: int):
    """Between which steps the scores of tokens at these places lie: numbers, or [B or 1, 1, T] float32 with sinks."""
    if not sinks:
        return -float(HIGHEST), float(HIGHEST)
    first = (places < sinks).unsqueeze(1)
    zeros = torch.zeros_like(first, dtype=torch.float32)
    return tuple((zeros + bound).masked_fill(first, SINK) for bound in (-HIGHEST, HIGHEST))


@lru_cache(maxsize=256)
def head_groups(counts: tuple[int, ...], groups: int, device):
    """Key/value heads that keep equal numbers of tokens, in order of these.

    Returns:
        For each group its number, its key/value heads and their query heads; and where each query head and each
        key/value head is found when the groups' lie one behind the other. None in place of indices where there is only
        one group.
    """
    if len(set(counts)) == 1:
        return ((counts[0], None, None),), None, None
    with torch.inference_mode(False):
        found = []
        for count in sorted(set(counts)):
            heads = torch.tensor([head for head, other in enumerate(counts) if other == count], device=device)
            found.append((count, heads, (heads[:, None] * groups + torch.arange(groups, device=device)).flatten()))
        return tuple(found), *(torch.cat([one[place] for one in found]).argsort() for place in (2, 1))


@dataclass(frozen=True)
class Stream:
    """S tokens of a text, which leave the window one after another.

    Attributes:
        keys, values: [B, Hkv, S, D], keys after RoPE. priority: [B, Hkv, S] int64, see `priorities`.
        scores: [B, Hkv, S], whose gradients are those of logits that they were added to; or None.
        logits: [B, Hkv, S], of a gate, which go the way of their tokens; or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    priority: torch.Tensor
    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    @property
    def held(self) -> tuple:
        """What is kept of a token: key, value, priority (and logits)."""
        held = (self.keys, self.values, self.priority)
        return held if self.logits is None else (*held, self.logits)

    def part(self, heads, start: int, stop: int) -> "Stream":
        """Tokens of some key/value heads."""
        values = (self.keys, self.values, self.priority, self.scores, self.logits)
        return Stream(*(None if x is None else x[:, :, start:stop][:, heads] for x in values))


def attend_kept(
    q, stream: Stream, first: int, memory, window: int, counts: tuple[int, ...], scoring: Scoring, evict: bool = False
):
    """`kept_attention` of heads that may keep different numbers of tokens.

    Args:
        counts: of each key/value head.
        memory: the tensors of each of `head_groups`, one group behind the other, or None.
    """
    groups, order, back = head_groups(counts, q.shape[1] // stream.keys.shape[1], q.device)
    found, size = [], len(stream.held)
    start = max(first - window, 0)
    stop = max(first - window + q.shape[2], 0)  # no later token leaves the window
    for index, (count, heads, queries) in enumerate(groups):
        part = (q, stream, first) if heads is None else (q[:, queries], stream.part(heads, start, stop), first - start)
        before = None if memory is None else memory[size * index : size * (index + 1)]
        found.append(kept_attention(*part, before, window, count, scoring, evict))
    outputs, denominators, memories, evicted = zip(*found, strict=True)
    memory = tuple(x for one in memories for x in one)
    if order is None:
        return outputs[0], denominators[0], memory, evicted[0]
    evicted = tuple(torch.cat(parts, dim=1)[:, back] for parts in zip(*evicted, strict=True)) if evict else None
    return torch.cat(outputs, dim=1)[:, order], torch.cat(denominators, dim=1)[:, order], memory, evicted


def kept_attention(
    q, stream: Stream, first: int, memory, window: int, count: int, scoring: Scoring, evict: bool = False
):
    """Softmax attention over the kept tokens alone.

    Args:
        q: [B, Hq, T, D], the queries at `first`, `first + 1`, ... of the S tokens.
        memory: keys, values, priorities (and logits) [B, Hkv, count, ...] of what the query before could see; None at
            the start.
        window: a token leaves when it is `window` tokens old.
        scoring: as of `window_attention`; its `sink_logits` are the window's alone.
        evict: return the stream of what is evicted, too.
    Returns:
        o [B, Hq, T, D] float32, lse [B, Hq, T] (the lowest number where nothing is visible), the new memory, which
        holds what the last of these queries could see, and of the token that is in neither the window nor the memory
        from each query on: keys and values [B, Hkv, T, D], [B, Hkv, T] bool, false where there is none, (and logits
        [B, Hkv, T]); or None.
    """
    length, start = q.shape[2], first - window
    if memory is None:
        memory = empty_memory(stream.keys, stream.values, count, stream.logits)
    if count == 0:
        output = torch.zeros_like(q, dtype=torch.float32)
        lse = torch.full_like(output[..., 0], torch.finfo(torch.float32).min)
        return output, lse, memory, _evicted(entering(stream.held, start, length)) if evict else None
    kv_heads, scores = stream.keys.shape[1], stream.scores
    rows = min(length, BLOCK)
    blocks = -(-length // rows)
    coming = entering(stream.held, start, length, blocks * rows)
    pool = [torch.cat([*pair, none], dim=2) for *pair, none in zip(memory, coming, _nothing(stream.held), strict=True)]
    before, index = _scan(pool[2], count, blocks, rows)

    kept = before.flatten(2)
    candidates = [
        torch.cat([_at(x, kept).unflatten(2, (blocks, count)), new.unflatten(2, (blocks, rows))], dim=3)
        for x, new in zip(pool[:2], coming, strict=False)
    ]
    new = coming[2].unflatten(2, (blocks, rows))
    alive, left = _visible(_at(pool[2], kept).unflatten(2, (blocks, count)), new, count)  # [B, Hkv, N, c, count + c]

    groups = q.shape[1] // kv_heads
    q = torch.nn.functional.pad(q, (0, 0, 0, blocks * rows - length)).float()
    q = q.unflatten(1, (kv_heads, groups)).unflatten(3, (blocks, rows)).transpose(2, 3)  # [B, Hkv, N, G, c, D]
    logits = scoring.logits((q.flatten(3, 4) @ candidates[0].float().mT).unflatten(3, (groups, rows)))
    if scores is not None and scores.requires_grad:
        # Zero in value: it lets the score of a kept token learn how much the token is looked at.
        old = torch.nn.functional.pad(_from(scores, start, length, blocks * rows), (count, 1))
        bias = [_at(old, kept).unflatten(2, (blocks, count)), old[:, :, count:-1].unflatten(2, (blocks, rows))]
        bias = torch.cat(bias, dim=3)
        logits = logits + (bias - bias.detach())[:, :, :, None, None]
    weights, lse, nothing = _softmax(logits, alive.unsqueeze(3))
    weights = torch.nn.functional.dropout(weights, scoring.dropout) if scoring.dropout else weights
    output = (weights.flatten(3, 4) @ candidates[1].float()).unflatten(3, (groups, rows))
    output = output.masked_fill(nothing.unsqueeze(-1), 0.0)
    output, lse = (x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :length] for x in (output, lse.unsqueeze(-1)))
    evicted = None
    if evict:
        gone = left & ~alive
        first = gone & ~torch.nn.functional.pad(gone, (0, 0, 1, 0))[..., :-1, :]
        places = torch.arange(count, count + blocks * rows, device=q.device).view(blocks, rows)
        places = torch.cat([before, places.expand(*before.shape[:3], -1)], dim=3)
        found = places.gather(3, first.to(torch.uint8).argmax(-1))
        evicted = _evicted(pool, found.masked_fill(~first.any(-1), -1).flatten(2)[:, :, :length])
    return output, lse.squeeze(-1), tuple(_at(x, index) for x in pool), evicted


def _softmax(logits, visible):
    """Weights of what is visible, the log of their denominator (the lowest number where nothing is), where nothing is.

    visible broadcasts to logits. Hidden logits are lowered by an addition; a masked fill takes a CPU many times that.
    """
    lowest = torch.finfo(logits.dtype).min
    logits = logits + (~visible).to(logits.dtype).mul_(lowest)
    weights, lse = softmax_with_denominator(logits)
    nothing = ~visible.any(-1)
    return weights, lse.masked_fill(nothing, lowest), nothing


def add_kept(local, lse, kept, kept_lse):
    """One softmax over the window and the kept tokens, from both of its parts. [B, H, T, D] and [B, H, T]"""
    share = (kept_lse - lse).sigmoid().unsqueeze(-1)
    return torch.lerp(local.float(), kept, share), torch.logaddexp(lse, kept_lse)


def empty_memory(keys, values, count: int, logits=None):
    """Nothing kept yet: zeros that are never visible."""
    batch, heads = keys.shape[:2]
    found = (
        keys.new_zeros(batch, heads, count, keys.shape[-1]),
        values.new_zeros(batch, heads, count, values.shape[-1]),
        torch.full((batch, heads, count), EMPTY, device=keys.device),
    )
    return found if logits is None else (*found, logits.new_zeros(batch, heads, count))


def empty_memories(keys, values, counts: tuple[int, ...], logits=None):
    """`empty_memory` for each of `head_groups`, one group behind the other."""
    groups, *_ = head_groups(counts, 1, keys.device)
    pick = lambda x, heads: x if x is None or heads is None else x[:, heads]  # noqa: E731
    parts = [empty_memory(pick(keys, heads), pick(values, heads), count, pick(logits, heads))
             for count, heads, _ in groups]  # fmt: skip
    return tuple(x for part in parts for x in part)


def entering(held, start: int, length: int, padded: int | None = None):
    """The tokens that leave the window before each query: those from `start` on, nothing where there is none."""
    return [_from(x, start, length, padded or length, EMPTY if x.dtype == torch.int64 else 0.0) for x in held]


def _evicted(pool, index=None):
    """What `kept_attention` returns of a pool's tokens at index [B, H, T], -1 for none; of all, where it is None."""
    if index is None:
        there = pool[2] > EMPTY
    else:
        there, index = index >= 0, index.clamp_min(0)
        pool = [_at(x, index) for x in pool]
    return (*pool[:2], there, *pool[3:])


def _nothing(held):
    """One token that is not there."""
    return [x.new_full((*x.shape[:2], 1, *x.shape[3:]), EMPTY if x.dtype == torch.int64 else 0) for x in held]


def _from(x, start: int, length: int, padded: int, fill: float = 0.0):
    inside = x[:, :, max(start, 0) : max(start + length, 0)]
    missing = min(max(-start, 0), length)
    behind = [0, 0] * (x.ndim - 3)
    return torch.nn.functional.pad(inside, (*behind, missing, padded - length), value=fill)


def _scan(priority, count: int, blocks: int, rows: int):
    """What is kept before each block and after the last: places in the pool, the highest first.

    Twice as many blocks take one merge more: each merge joins what is kept of the blocks behind a block with what is
    kept of as many before.

    Returns [B, H, N, count] and [B, H, count].
    priority: [B, H, count + N * rows + 1]: of what was kept, then of what enters, then EMPTY.
    """
    own = min(count, rows)
    free = (0, count - own)
    new, places = priority[:, :, count:-1].unflatten(2, (blocks, rows)).topk(own, dim=3)
    places = places + torch.arange(count, count + blocks * rows, rows, device=priority.device).unsqueeze(1)
    new = torch.nn.functional.pad(new, free, value=EMPTY)
    places = torch.nn.functional.pad(places, free, value=priority.shape[2] - 1)
    before = priority[:, :, None, :count].topk(count, dim=3)
    best, index = (torch.cat(both, dim=2) for both in zip(before, (new, places), strict=True))
    step = 1
    while step <= blocks:
        both = [torch.cat([x[:, :, step:], x[:, :, :-step]], dim=3) for x in (best, index)]
        found = both[0].topk(count, dim=3)
        best = torch.cat([best[:, :, :step], found.values], dim=2)
        index = torch.cat([index[:, :, :step], both[1].gather(3, found.indices)], dim=2)
        step *= 2
    return index[:, :, :-1], index[:, :, -1]


def _visible(kept, new, count: int):
    """Which candidates of a block each of its queries sees, and which it could see if all were kept.

    kept: priorities [.., count], the highest first; new: [.., c]. Both of [.., c, count + c].
    """
    place = torch.arange(count, device=new.device).expand(kept.shape)
    beaten_before = torch.cat([place, (kept.unsqueeze(-2) > new.unsqueeze(-1)).sum(-1)], dim=-1)
    rows = new.shape[-1]
    left = torch.ones(rows, rows, dtype=torch.bool, device=new.device).tril()
    newer = new.unsqueeze(-1)
    beats = torch.cat([newer > kept.unsqueeze(-2), newer > new.unsqueeze(-2)], dim=-1)
    beaten = beaten_before.unsqueeze(-2) + beats.to(torch.int32).cumsum(-2)
    left = torch.nn.functional.pad(left, (count, 0), value=True)
    left = left & (torch.cat([kept, new], dim=-1) > EMPTY).unsqueeze(-2)
    return (beaten < count) & left, left


def _at(x, index):
    """Entries of x [B, H, S, ...] at index [B, H, n]."""
    return x.gather(2, index) if x.ndim == 3 else x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
