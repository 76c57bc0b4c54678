"""Window and kept tokens in one softmax on a CPU without gradients: what `liger_window` and `liger_kept` compute apart.

Few tokens are ever kept, so long spans of queries share theirs: a span is multiplied at once with all that is kept at
some time during it, and its scores stand beside those of the window. Every key/value head goes its own way on views:
heads may keep different numbers of tokens, and nothing of the text is copied.
"""

import heapq

import numpy
import torch

from .liger_kept import BLOCK, EMPTY, Stream, empty_memories, entering, head_groups
from .liger_window import ROWS_OF_HEAD, Scoring, near_scores, segments, soft_capped, softmax_weights, whole_blocks

CHUNK = 256  # tokens that are compared at once with the worst one kept
SPAN = 2048  # the most queries multiplied at once: bounds their scores
NEVER = 2**31 - 1


def attend_by_spans(
    q, stream: Stream, first: int, memory, window: int, counts: tuple[int, ...], scoring: Scoring, valid=None,
    evict: bool = False, need_lse: bool = False,
):  # fmt: skip
    """Softmax attention over the window and the kept tokens.

    Args:
        q: [B, Hq, T, D], the queries at `first`, `first + 1`, ... of the stream's S tokens.
        memory, counts, evict: as of `liger_kept.attend_kept`.
        valid: [B, S] bool, false at padding; None where there is none.
    Returns:
        o [B, Hq, T, D] float32, lse [B, Hq, T] or None, the new memory and what is evicted or None, both as of
        `attend_kept`.
    """
    memory = empty_memories(stream.keys, stream.values, counts, stream.logits) if memory is None else memory
    output = torch.empty(*q.shape[:3], stream.values.shape[-1])
    lse = torch.empty(q.shape[:3]) if need_lse else None
    after = [torch.zeros_like(x) if x.is_floating_point() else torch.full_like(x, EMPTY) for x in memory]
    gone = None
    if evict:
        keys, values, priority, *logits = entering(stream.held, first - window, q.shape[2])
        gone = (keys, values, priority > EMPTY, *logits)
    size, each = len(stream.held), q.shape[1] // len(counts)
    for index, (_, heads, _) in enumerate(head_groups(counts, 1, q.device)[0]):
        group = slice(size * index, size * (index + 1))
        for place, head in enumerate(range(len(counts)) if heads is None else heads.tolist()):
            queries = slice(each * head, each * (head + 1))
            for row in range(len(q)):
                pool = _Pool(
                    [x[row, place] for x in memory[group]], [x[row, head] for x in stream.held],
                    first - window, q.shape[2],
                )  # fmt: skip
                _attend(
                    q[row, queries], pool, window, scoring.of_heads(queries), None if valid is None else valid[row],
                    output[row, queries], None if lse is None else lse[row, queries],
                )  # fmt: skip
                pool.keep([x[row, place] for x in after[group]])
                if evict:
                    pool.evict(gone[2][row, head], [x[row, head] for x in (*gone[:2], *gone[3:])])
    return output, lse, tuple(after), gone


class _Pool:
    """What one head can keep: its memory and, behind it, the token that leaves the window before each of T queries.

    Attributes:
        held, text: keys, values, priorities (and logits) of the memory and of the whole text, [count, ...], [S, ...].
        start: which token of the text leaves before the first query; one below 0 is not there.
        length: T. count: of the memory.
        since, until: of `lifetimes`.
    """

    def __init__(self, held: list, text: list, start: int, length: int):
        self.held, self.text, self.start, self.length, self.count = held, text, start, length, len(held[2])
        leaving = text[2][max(start, 0) : max(start + length, 0)].numpy()
        missing = numpy.full(length - len(leaving), EMPTY)
        self.priority = numpy.concatenate([held[2].numpy(), missing, leaving])
        self.since, self.until = lifetimes(self.priority, self.count)

    def take(self, index, which: int):
        """Keys (0), values (1), priorities (2) or logits (3) of places that are there, those of the memory first."""
        own = int((index < self.count).sum())
        index = torch.from_numpy(index)
        held, text = self.held[which], self.text[which]
        found = text.new_empty(len(index), *text.shape[1:])
        torch.index_select(held, 0, index[:own], out=found[:own])
        torch.index_select(text, 0, index[own:] + (self.start - self.count), out=found[own:])
        return found

    def spans(self):
        """Cut the rows where `count` new tokens have been kept, but not below BLOCK rows or above SPAN."""
        taken = (self.since[self.count :] != NEVER).cumsum()
        start, most = 0, max(self.count, BLOCK)
        while start < self.length:
            before = taken[start - 1] if start else 0
            full = int(numpy.searchsorted(taken, before + most, side="right"))
            full -= (full - start) % ROWS_OF_HEAD if full < self.length else 0
            stop = min(max(start + BLOCK, full), start + SPAN, self.length)
            yield start, stop
            start = stop

    def alive(self, start: int, stop: int):
        """Places of the tokens kept at some time in these rows, those of the memory first; and the slice of them that
        is not kept all the time."""
        index = ((self.since < stop) & (self.until > start)).nonzero()[0]
        throughout = (self.since[index] <= start) & (self.until[index] >= stop)
        own = index < self.count
        first, second, third = (index[part] for part in (own & throughout, ~throughout, ~own & throughout))
        return numpy.concatenate([first, second, third]), slice(len(first), len(first) + len(second))

    def keep(self, targets: list) -> None:
        """Write what is kept behind the last query; what is free stays as it is."""
        index = ((self.since != NEVER) & (self.until == NEVER)).nonzero()[0]
        for which, target in enumerate(targets):
            target[: len(index)] = self.take(index, which)

    def evict(self, there, targets: list) -> None:
        """Write which rows evict a token, and the token, where it is not the one that leaves the window just then."""
        places = departures(self.priority, self.since, self.until, self.count)
        there.copy_(torch.from_numpy(places >= 0))
        rows = ((places >= 0) & (places != numpy.arange(self.length) + self.count)).nonzero()[0]
        rows = rows[places[rows].argsort()]
        for which, target in zip((0, 1, 3), targets, strict=False):
            target[torch.from_numpy(rows)] = self.take(places[rows], which)


def _attend(q, pool: _Pool, window: int, scoring: Scoring, valid, output, lse) -> None:
    """One head's queries [G, T, D]: `output` [G, T, D] and `lse` [G, T] are written."""
    first, back = pool.start + window, whole_blocks(window, ROWS_OF_HEAD)
    for begin, end in pool.spans():
        index, varying = pool.alive(begin, end)
        keys, values = (pool.take(index, which).float() for which in (0, 1))
        since, until = (x[index[varying]] for x in (pool.since, pool.until))
        length, past = end - begin, first + begin
        for offset, blocks, rows in segments(length, past, ROWS_OF_HEAD, back // ROWS_OF_HEAD, piece=length):
            at = begin + offset
            here = slice(at, at + blocks * rows)
            near = slice(max(first + at - back, 0), first + here.stop)
            _segment(
                q[:, here], [x[near] for x in pool.text[:2]], blocks, window, scoring,
                None if valid is None else valid[near], (keys, values), varying, (since - at, until - at),
                output[:, here], None if lse is None else lse[:, here],
            )  # fmt: skip


def _segment(q, near, blocks: int, window, scoring, valid, kept, varying, lifetime, output, lse) -> None:
    """Queries [G, N, D] in equal blocks.

    Args:
        near: keys and values of the blocks and of what lies before the first of them.
        kept: keys and values of P kept tokens. varying: those that are not kept all the time.
        lifetime: since and until which query these are kept.
    """
    rows = q.shape[1] // blocks
    size = len(near[0]) - (blocks - 1) * rows
    k, v = (x.float().unfold(0, size, rows) for x in near)  # [N / rows, D, size]
    count = len(kept[0])
    scores = torch.empty(*q.shape[:2], size + count)
    q = q.float()
    near_scores(
        q.unflatten(1, (blocks, rows))[None], k[None, None], window, scoring, None if valid is None else valid[None],
        out=scores[..., :size].unflatten(1, (blocks, rows))[None],
    )  # fmt: skip
    if count:
        scaled = kept[0].T * scoring.scaling
        for part, target in zip(q, scores, strict=True):
            torch.mm(part, scaled, out=target[:, size:])
        if scoring.softcap is not None:
            target = scores[..., size:]
            target.copy_(soft_capped(target, 0.0, 1.0, scoring.softcap))
        if varying.stop > varying.start:
            since, until = map(torch.from_numpy, lifetime)
            now = torch.arange(q.shape[1], dtype=torch.int32).unsqueeze(1)
            hidden = torch.where((now >= since) & (now < until), torch.zeros(()), torch.finfo(torch.float32).min)
            scores[..., size + varying.start : size + varying.stop] += hidden
    logits = None if scoring.sink_logits is None else scoring.sink_logits.float().view(-1, 1)
    weights, denominators = softmax_weights(scores, logits, lse is not None, scoring.dropout)
    for part, target in zip(weights, output, strict=True):
        torch.bmm(part[:, :size].unflatten(0, (blocks, rows)), v.mT, out=target.view(blocks, rows, -1))
        if count:
            target.addmm_(part[:, size:], kept[1])
    if lse is not None:
        lse.copy_(denominators)


def lifetimes(priority, count: int):
    """When each token of a pool is kept, if the `count` best so far are: since and until which row.

    Args:
        priority: numpy [count + T] int64: of what was kept, then of one token a row; EMPTY is never kept.
    Returns:
        since, until: numpy [count + T] int32; NEVER for both where a token is not kept, until where it still is.
    """
    since = numpy.full(len(priority), NEVER, dtype=numpy.int32)
    until = since.copy()
    heap = [(value, place) for place, value in enumerate(priority[:count].tolist()) if value > EMPTY]
    heapq.heapify(heap)
    since[[place for _, place in heap]] = 0
    for start in range(count, len(priority) if count else 0, CHUNK):
        part = priority[start : start + CHUNK]
        # A token that is no better than the worst one kept by now never will be.
        better = part > (heap[0][0] if len(heap) == count else EMPTY)
        for offset in better.nonzero()[0].tolist():
            entry = (int(part[offset]), start + offset)
            row = start + offset - count
            if len(heap) < count:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                until[heapq.heapreplace(heap, entry)[1]] = row
            else:
                continue
            since[start + offset] = row
    return since, until


def departures(priority, since, until, count: int):
    """Which token of the pool of `lifetimes` is evicted at each row, -1 for none. numpy [T] int64"""
    places, length = numpy.arange(len(priority)), len(priority) - count
    never_kept = (since == NEVER) & (priority > EMPTY)
    found = numpy.full(length + 1, -1)
    found[numpy.where(never_kept, places - count, until).clip(max=length)] = places
    return found[:length]
