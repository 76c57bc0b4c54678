"""Kept tokens: of all that have left the window, the few with the highest learned score stay visible to it.

A constant number of keys and values for each key/value head, chosen by a linear score of the key before its rotary
embedding. A token is kept at time t if it left the window by then and fewer than `count` of the others that did have a
higher score, or the same and a later place. So the choice depends on the text alone, not on how it is fed or padded.
"""

import heapq
import math
from functools import lru_cache

import torch

from .liger_products import by_heads, product
from .liger_window import log_denominator, soft_capped

# Queries that share a list of candidates: what was kept when the first of them came, and what leaves the window since.
BLOCK = 64
SPAN = 1024  # the most queries multiplied at once on a CPU: bounds their scores
NEVER = 2**31 - 1
STEPS = 1024  # scores are rounded to 1 / STEPS: equal keys have to get equal scores in sums of any order


def keep_scores(k, weight):
    """Scores of keys. k [B, Hkv, T, D] before RoPE, weight [Hkv, D] -> [B, Hkv, T, 1] float32, with gradients."""
    scores = k.float() @ weight.float().unsqueeze(-1)
    return scores + ((scores.detach() * STEPS).round() / STEPS - scores.detach())


@lru_cache(maxsize=256)
def head_groups(counts: tuple[int, ...], groups: int, device):
    """Key/value heads that keep equal numbers of tokens, in order of these.

    Returns:
        For each group its number, its key/value heads and their query heads; and where each query head is found when
        the groups' lie one behind the other. None in place of indices where there is only one group.
    """
    if len(set(counts)) == 1:
        return ((counts[0], None, None),), None
    with torch.inference_mode(False):
        found = []
        for count in sorted(set(counts)):
            heads = torch.tensor([head for head, other in enumerate(counts) if other == count], device=device)
            found.append((count, heads, (heads[:, None] * groups + torch.arange(groups, device=device)).flatten()))
        return tuple(found), torch.cat([queries for *_, queries in found]).argsort()


def attend_kept(
    q, keys, values, scores, first: int, memory, window: int, counts: tuple[int, ...], scaling: float, softcap=None,
    dropout: float = 0.0,
):  # fmt: skip
    """`kept_attention` of heads that may keep different numbers of tokens.

    Args:
        counts: of each key/value head.
        memory: three tensors for each of `head_groups`, one group behind the other, or None.
    """
    groups, order = head_groups(counts, q.shape[1] // keys.shape[1], q.device)
    outputs, denominators, found = [], [], ()
    for index, (count, heads, queries) in enumerate(groups):
        before = None if memory is None else memory[3 * index : 3 * index + 3]
        part = (q, keys, values, scores)
        if heads is not None:
            part = (q[:, queries], *(x[:, heads] for x in part[1:]))
        if count:
            output, lse, after = kept_attention(*part, first, before, window, count, scaling, softcap, dropout)
        else:
            output = torch.zeros_like(part[0], dtype=torch.float32)
            lse = torch.full_like(output[..., 0], torch.finfo(torch.float32).min)
            after = empty_memory(*part[1:3], 0)
        outputs.append(output)
        denominators.append(lse)
        found += after
    if order is None:
        return output, lse, found
    return torch.cat(outputs, dim=1)[:, order], torch.cat(denominators, dim=1)[:, order], found


def kept_attention(
    q, keys, values, scores, first: int, memory, window: int, count: int, scaling: float, softcap=None,
    dropout: float = 0.0,
):  # fmt: skip
    """Softmax attention over the kept tokens alone.

    Args:
        q: [B, Hq, T, D], the queries at `first`, `first + 1`, ... of the S tokens.
        keys, values: [B, Hkv, S, D], after RoPE. scores: [B, Hkv, S], -inf at padding, inf for what is always kept.
        memory: keys, values and scores [B, Hkv, count, ...] of what was kept before, oldest first; None at the start.
        window: a token leaves when it is `window` tokens old.
    Returns:
        o [B, Hq, T, D] float32, lse [B, Hq, T] (the lowest number where nothing is visible), and the new memory, which
        holds what the last of these queries could see.
    """
    batch, kv_heads, _, dim = keys.shape
    length = q.shape[2]
    if length == 1 and memory is not None and first < window:
        return *_step(q, memory, scaling, softcap, dropout), memory
    if length > BLOCK and by_heads(q):
        return _attend_by_spans(q, keys, values, scores, first, memory, window, count, scaling, softcap, dropout)
    rows = min(length, BLOCK)
    blocks = -(-length // rows)
    entering = [_entering(x, first - window, length, blocks * rows) for x in (keys, values)]
    entering_scores = _entering(scores.unsqueeze(-1), first - window, length, blocks * rows, -torch.inf).squeeze(-1)
    if memory is None:
        memory = empty_memory(keys, values, count)
    pool = [torch.cat(pair, dim=2) for pair in zip(memory, (*entering, entering_scores), strict=True)]
    before, index = _scan(pool[2].detach(), count, blocks, rows)

    kept = before.flatten(2)
    gather = lambda x: x.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))  # noqa: E731
    candidates = [
        torch.cat([gather(x).unflatten(2, (blocks, count)), new.unflatten(2, (blocks, rows))], dim=3)
        for x, new in zip(pool[:2], entering, strict=True)
    ]
    kept_scores = pool[2].gather(2, kept).unflatten(2, (blocks, count))
    new_scores = entering_scores.unflatten(2, (blocks, rows))
    visible = _visible(kept_scores.detach(), new_scores.detach(), count)  # [B, Hkv, N, c, count + c]
    bias = torch.cat([kept_scores, new_scores], dim=-1).unsqueeze(3)
    bias = torch.where(bias.isfinite(), bias - bias.detach(), 0.0) if bias.requires_grad else None

    groups = q.shape[1] // kv_heads
    q = torch.nn.functional.pad(q, (0, 0, 0, blocks * rows - length)).float()
    q = q.unflatten(1, (kv_heads, groups)).unflatten(3, (blocks, rows)).transpose(2, 3)  # [B, Hkv, N, G, c, D]
    logits = (q.flatten(3, 4) @ candidates[0].float().mT).unflatten(3, (groups, rows)) * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if bias is not None:
        # Zero in value: it lets the score of a kept token learn how much the token is looked at.
        logits = logits + bias.unsqueeze(3)
    weights, lse, nothing = _softmax(logits, visible.unsqueeze(3))
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    output = (weights.flatten(3, 4) @ candidates[1].float()).unflatten(3, (groups, rows))
    output = output.masked_fill(nothing.unsqueeze(-1), 0.0)
    output, lse = (x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :length] for x in (output, lse.unsqueeze(-1)))
    return output, lse.squeeze(-1), tuple(_at(x, index.flip(2)) for x in pool)


def _softmax(logits, visible):
    """Weights of what is visible, the log of their denominator (the lowest number where nothing is), where nothing is.

    visible broadcasts to logits. Hidden logits are lowered by an addition; a masked fill takes a CPU many times that.
    """
    lowest = torch.finfo(logits.dtype).min
    logits = logits + (~visible).to(logits.dtype).mul_(lowest)
    weights = logits.softmax(-1)
    nothing = ~visible.any(-1)
    return weights, log_denominator(logits, weights).masked_fill(nothing, lowest), nothing


def _attend_by_spans(q, keys, values, scores, first, memory, window, count, scaling, softcap, dropout):
    """`kept_attention` on a CPU without gradients. Few tokens are ever kept, so long spans of queries share theirs: a
    span is multiplied at once with all that is kept at some time during it."""
    length, lowest = q.shape[2], torch.finfo(torch.float32).min
    new = [_entering(x, first - window, length, length) for x in (keys, values)]
    new.append(_entering(scores.unsqueeze(-1), first - window, length, length, -torch.inf).squeeze(-1))
    memory = empty_memory(keys, values, count) if memory is None else memory
    pool = [torch.cat(pair, dim=2) for pair in zip(memory, new, strict=True)]
    since, until = lifetimes(pool[2], count)
    output, lse = q.new_zeros(*q.shape[:3], values.shape[-1], dtype=torch.float32), torch.full(q.shape[:3], lowest)
    for start, stop in _spans(since, count):
        index = _alive(since, until, start, stop)
        if index.shape[2] == 0:
            continue
        k, v = (_at(x, index).float().unsqueeze(2) for x in pool[:2])
        time = torch.arange(start, stop, dtype=since.dtype).unsqueeze(1)
        visible = (time >= _at(since, index).unsqueeze(2)) & (time < _at(until, index).unsqueeze(2))
        bias = (~visible).float().mul_(lowest).unsqueeze(2)  # [B, Hkv, 1, t, P]
        logits = product(q[:, :, start:stop].float().unsqueeze(2), k.mT).squeeze(2)
        grouped = logits.unflatten(1, (bias.shape[1], -1))
        if softcap is None:
            torch.add(bias, grouped, alpha=scaling, out=grouped)
        else:
            logits = soft_capped(grouped, bias, scaling, softcap).flatten(1, 2)
        weights = logits.softmax(-1)
        lse[:, :, start:stop] = log_denominator(logits, weights)
        weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
        output[:, :, start:stop] = product(weights.unsqueeze(2), v).squeeze(2)
        nothing = ~visible.any(-1)
        if nothing.any():
            nothing = nothing.repeat_interleave(q.shape[1] // nothing.shape[1], dim=1)
            output[:, :, start:stop].masked_fill_(nothing.unsqueeze(-1), 0.0)
            lse[:, :, start:stop].masked_fill_(nothing, lowest)
    return output, lse, _remembered(pool, since, until, count)


def lifetimes(scores, count: int):
    """When each token of a stream is kept, if the `count` best so far are: since and until which row.

    Args:
        scores: [B, H, count + T]: what was kept, oldest first, then one token a row; -inf is never kept.
    Returns:
        since, until: [B, H, count + T] int32; NEVER for both where a token is not kept, until where it still is.
    """
    since = torch.full(scores.shape, NEVER, dtype=torch.int32)
    until = since.clone()
    rows = zip(*(x.flatten(0, 1).numpy() for x in (scores.detach(), since, until)), strict=True)
    for stream, begins, ends in rows:
        heap = [(score, place) for place, score in enumerate(stream[:count].tolist()) if score > -math.inf]
        heapq.heapify(heap)
        begins[[place for _, place in heap]] = 0
        for start in range(count, len(stream), BLOCK):
            part = stream[start : start + BLOCK]
            # A token that is no better than the worst one kept by now never will be.
            better = part >= heap[0][0] if len(heap) == count else part > -math.inf
            for offset in better.nonzero()[0].tolist():
                entry = (float(part[offset]), start + offset)
                row = start + offset - count
                if len(heap) < count:
                    heapq.heappush(heap, entry)
                elif entry > heap[0]:
                    ends[heapq.heapreplace(heap, entry)[1]] = row
                else:
                    continue
                begins[start + offset] = row
    return since, until


def _spans(since, count: int):
    """Cut the rows where a head has kept `count` new tokens, but not below BLOCK rows or above SPAN."""
    taken = (since[:, :, count:] != NEVER).flatten(0, 1).cumsum(1)
    start, length = 0, taken.shape[1]
    while start < length:
        before = taken[:, start - 1 : start] if start else 0
        full = (taken - before > max(count, BLOCK)).any(0).nonzero()
        stop = max(start + BLOCK, int(full[0])) if len(full) else length
        stop = min(stop, start + SPAN, length)
        yield start, stop
        start = stop


def _alive(since, until, start: int, stop: int):
    """Places of the tokens kept at some time in these rows, [B, H, P]; heads with fewer than P get others behind."""
    alive = (since < stop) & (until > start)
    most = int(alive.sum(-1).max()) if alive.numel() else 0
    return alive.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[:, :, :most]


def _remembered(pool, since, until, count: int):
    """The memory after all rows: what is still kept, oldest first, behind empty places."""
    kept = (since != NEVER) & (until == NEVER)
    index = kept.to(torch.uint8).sort(dim=2, stable=True).indices[:, :, -count:]
    keys, values, scores = (_at(x, index) for x in pool)
    return keys, values, scores.masked_fill(~_at(kept, index), -torch.inf)


def _step(q, memory, scaling: float, softcap, dropout: float):
    """One query where no token leaves the window: it sees what is kept, and nothing has to be chosen."""
    keys, values, scores = memory
    visible = (scores > -torch.inf)[:, :, None]
    logits = q.unflatten(1, (keys.shape[1], -1)).squeeze(3).float() @ keys.float().mT * scaling  # [B, Hkv, G, count]
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    weights, lse, nothing = _softmax(logits, visible)
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    output = (weights @ values.float()).masked_fill(nothing.unsqueeze(-1), 0.0)
    return output.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2)


def add_kept(local, lse, kept, kept_lse):
    """One softmax over the window and the kept tokens, from both of its parts. [B, H, T, D] and [B, H, T]"""
    share = (kept_lse - lse).sigmoid().unsqueeze(-1)
    return torch.lerp(local.float(), kept, share), torch.logaddexp(lse, kept_lse)


def empty_memory(keys, values, count: int):
    """Nothing kept yet: zeros that are never visible."""
    batch, heads = keys.shape[:2]
    nothing = torch.full((batch, heads, count), -torch.inf, device=keys.device)
    return (
        keys.new_zeros(batch, heads, count, keys.shape[-1]),
        values.new_zeros(batch, heads, count, values.shape[-1]),
        nothing,
    )


def remember_heads(memory, keys, values, scores, counts: tuple[int, ...], place: int):
    """The memory of every group of heads after the token at `place` has left the window, too. memory: None for none."""
    found = ()
    for index, (count, heads, _) in enumerate(head_groups(counts, 1, keys.device)[0]):
        part = (keys, values, scores) if heads is None else tuple(x[:, heads] for x in (keys, values, scores))
        before = empty_memory(*part[:2], count) if memory is None else memory[3 * index : 3 * index + 3]
        found += remember(before, *part, place) if count else before
    return found


def remember(memory, keys, values, scores, place: int):
    """The memory after the token at `place` has left the window, too; as it is where there is no such token."""
    if place < 0:
        return memory
    new = (keys[:, :, place : place + 1], values[:, :, place : place + 1], scores[:, :, place : place + 1])
    pool = [torch.cat(pair, dim=2) for pair in zip(memory, new, strict=True)]
    # The lowest goes, of equal ones the oldest; the others keep their order.
    lowest = pool[2].sort(dim=2, stable=True).indices[:, :, :1]
    place = torch.arange(memory[2].shape[2], device=lowest.device)
    index = place + (place >= lowest)
    return tuple(_at(x, index) for x in pool)


def _entering(x, start: int, length: int, padded: int, fill: float = 0.0):
    """The tokens that leave the window before each query: those from `start` on, `fill` where there is none."""
    inside = x[:, :, max(start, 0) : max(start + length, 0)]
    missing = min(max(-start, 0), length)
    return torch.nn.functional.pad(inside, (0, 0, missing, padded - length), value=fill)


def _scan(scores, count: int, blocks: int, rows: int):
    """What is kept before each block and after the last: places in the pool, newest first.

    Returns [B, H, N, count] and [B, H, count].
    scores: [B, H, count + N * rows]: what was kept, oldest first, then what enters.
    """
    index = torch.arange(count - 1, -1, -1, device=scores.device).expand(*scores.shape[:2], count)
    before = []
    for block in range(blocks):
        before.append(index)
        last = count + (block + 1) * rows
        new = torch.arange(last - 1, last - 1 - rows, -1, device=scores.device).expand(*scores.shape[:2], rows)
        candidates = torch.cat([new, index], dim=2)
        order = scores.gather(2, candidates).sort(dim=2, descending=True, stable=True).indices
        index = candidates.gather(2, order[:, :, :count]).sort(dim=2, descending=True).values
    return torch.stack(before, dim=2), index


def _visible(kept, new, count: int):
    """Which candidates each query of a block sees. kept [.., count], newest first, new [.., c] -> [.., c, count + c]"""
    order = kept.sort(dim=-1, descending=True, stable=True).indices
    beaten_before = torch.cat([order.argsort(-1), (kept.unsqueeze(-2) > new.unsqueeze(-1)).sum(-1)], dim=-1)
    rows = new.shape[-1]
    later = torch.ones(rows, rows, dtype=torch.bool, device=new.device).tril(-1)
    newer, older = new.unsqueeze(-1), new.unsqueeze(-2)
    beats = torch.cat([newer >= kept.unsqueeze(-2), (newer > older) | ((newer == older) & later)], dim=-1)
    beaten = beaten_before.unsqueeze(-2) + beats.to(torch.int32).cumsum(-2)
    left = torch.nn.functional.pad(later | later.new_ones(rows).diag(), (count, 0), value=True)
    there = (torch.cat([kept, new], dim=-1) > -torch.inf).unsqueeze(-2)
    return (beaten < count) & left & there


def _at(x, index):
    """Entries of x [B, H, S, ...] at index [B, H, n]."""
    return x.gather(2, index) if x.ndim == 3 else x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
