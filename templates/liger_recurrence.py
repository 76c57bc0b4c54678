"""The recurrences, in plain torch: each as a naive twin (the definition), a chunked parallel form and a one-token step.

Layout: q [B, Hq, T, K]; k, log_decay and v [B, Hkv, T, K or V]; state [B, Hkv, K, V]. The G = Hq / Hkv query heads of a
group read one shared state, so nothing is repeated to query heads. Queries are not scaled (Liger uses scale 1).

Numerics: an exponential is only ever taken of a sum of log decays *between* two positions, added up from the nearer
end, so that neither a long text nor keys in the hundreds can overflow it or round it away. Inside a chunk the pairs of
positions are split in halves around a pivot; the last, small blocks are factored around their middle where the decay
inside them allows it, and are split further where it does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

CHUNK_SIZE = 64
# Tokens worked through at a time when no gradient is wanted: the intermediates of a piece stay in the CPU's caches.
PIECE_SIZE = 4096
# Largest exponent of a factored block: exp(15) * exp(-15) loses 15 * 2^-24 * 2, about 2e-6 in float32.
FACTOR_LIMIT = 15.0


def naive_decay(q, k, v, log_decay, initial_state=None):
    """Step by step: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t, o_t = q_t S_t (Liger, eq. 5; GLA, eq. 3).

    Args:
        q: [B, Hq, T, K]; k: [B, Hkv, T, K]; v: [B, Hkv, T, V].
        log_decay: [B, Hkv, T, K], or [B, Hkv, T, 1] for one decay a head.
        initial_state: [B, Hkv, K, V] or None for zeros.
    Returns:
        o [B, Hq, T, V] and the final state [B, Hkv, K, V].
    """
    state = _initial(k, v, initial_state)
    outputs = []
    for t in range(q.shape[2]):
        output, state = step_decay(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1],
                                   log_decay[:, :, t : t + 1], state)  # fmt: skip
        outputs.append(output)
    return _concat(outputs, q, v), state


def step_decay(q, k, v, log_decay, state):
    """One token of `naive_decay`; T is 1 in every argument."""
    state = torch.addcmul(log_decay.transpose(-1, -2).exp() * state, k.transpose(-1, -2), v)
    return _read(q, state), state


def naive_delta(q, k, v, log_decay, beta, initial_state=None):
    """Step by step: S_t = (I - beta_t k_t^T k_t) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t^T v_t, o_t = q_t S_t.

    With a scalar decay the gated delta rule (Gated DeltaNet, arXiv 2412.06464, eq. 10), with one decay a channel
    Kimi Delta Attention (arXiv 2510.26692, eq. 1). beta: [B, Hkv, T, 1]; everything else as `naive_decay`.
    """
    state = _initial(k, v, initial_state)
    outputs = []
    for t in range(q.shape[2]):
        at = slice(t, t + 1)
        output, state = step_delta(q[:, :, at], k[:, :, at], v[:, :, at], log_decay[:, :, at], beta[:, :, at], state)
        outputs.append(output)
    return _concat(outputs, q, v), state


def step_delta(q, k, v, log_decay, beta, state):
    """One token of `naive_delta`; T is 1 in every argument."""
    state = log_decay.transpose(-1, -2).exp() * state
    state = torch.addcmul(state, k.transpose(-1, -2), beta * (v - k @ state))
    return _read(q, state), state


def naive_slots(q, k, v, log_decay, write, initial_state=None):
    """Step by step gated slot attention (arXiv 2409.07146, eq. 6): slots of keys are read, softmaxed, read for values.

        K_t = K_{t-1} diag(a_t) + k_t^T write_t      p_t = softmax(q_t K_t)
        V_t = diag(a_t) V_{t-1} + write_t^T v_t      o_t = p_t V_t

    Args:
        q: [B, Hq, T, K], already scaled; k: [B, Hkv, T, K]; v: [B, Hkv, T, V].
        log_decay, write: [B, Hkv, T, M].
        initial_state: the pair ([B, Hkv, K, M], [B, Hkv, M, V]) or None.
    Returns:
        o [B, Hq, T, V] and the final pair of states.
    """
    states = initial_state or (_initial(k, write), _initial(write, v))
    outputs = []
    for t in range(q.shape[2]):
        at = slice(t, t + 1)
        output, states = step_slots(q[:, :, at], k[:, :, at], v[:, :, at], log_decay[:, :, at], write[:, :, at], states)
        outputs.append(output)
    return _concat(outputs, q, v), states


def step_slots(q, k, v, log_decay, write, states):
    """One token of `naive_slots`; T is 1 in every argument."""
    keys, values = states
    decay = log_decay.exp()
    keys = torch.addcmul(keys * decay, k.transpose(-1, -2), write)
    values = torch.addcmul(decay.transpose(-1, -2) * values, write.transpose(-1, -2), v)
    return _read(_read(q, keys).softmax(-1), values), (keys, values)


def chunk_decay(q, k, v, log_decay, initial_state=None):
    """`naive_decay` in parallel over chunks (GLA, arXiv 2312.06635, section 4.3); same arguments and results."""
    return _by_pieces(_chunk_decay, (q, k, v, log_decay), _initial(k, v, initial_state))


def chunk_delta(q, k, v, log_decay, beta, initial_state=None):
    """`naive_delta` in parallel over chunks (Gated DeltaNet, section 3.3: the WY form); same arguments and results."""
    return _by_pieces(_chunk_delta, (q, k, v, log_decay, beta), _initial(k, v, initial_state))


def chunk_sum(q, k, v, initial_state=None):
    """`naive_decay` without a decay, in parallel over chunks: S_t = S_{t-1} + k_t^T v_t, o_t = q_t S_t."""
    return _by_pieces(_chunk_sum, (q, k, v), _initial(k, v, initial_state))


def chunk_slots(q, k, v, log_decay, write, initial_state=None):
    """`naive_slots` as two chunked passes with a softmax over slots between them; same arguments and results."""
    keys, values = initial_state or (_initial(k, write), _initial(write, v))
    logits, keys = _by_pieces(_chunk_value_decay, (q, k, write, log_decay), keys)
    output, values = chunk_decay(logits.softmax(-1), write, v, log_decay, values)
    return output, (keys, values)


class Forms(NamedTuple):
    """The three forms of a recurrence: the same arguments and results, but that a step is of one token."""

    naive: Callable
    chunk: Callable
    step: Callable


FORMS = {
    "decay": Forms(naive_decay, chunk_decay, step_decay),
    "delta": Forms(naive_delta, chunk_delta, step_delta),
    "slots": Forms(naive_slots, chunk_slots, step_slots),
}


def _initial(k, v, initial_state=None):
    if initial_state is not None:
        return initial_state
    return k.new_zeros(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])


def _concat(outputs, q, v):
    return torch.cat(outputs, dim=2) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])


def _read(q, state):
    """q [B, Hq, 1, K] @ state [B, Hkv, K, V] for every query head of a group. [B, Hq, 1, V]"""
    batch, kv_heads = state.shape[:2]
    return (q.reshape(batch, kv_heads, -1, q.shape[-1]) @ state).view(*q.shape[:3], state.shape[-1])


def _by_pieces(chunked, inputs, state):
    """Pad to whole chunks (zeros neither write nor decay), and work piece by piece where no gradient is wanted."""
    length = inputs[0].shape[2]
    if inputs[0].numel() == 0:
        q, _, v = inputs[:3]
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, state))
    piece = length if needs_grad else PIECE_SIZE
    outputs = []
    for start in range(0, length, piece):
        part = [x[:, :, start : start + piece] for x in inputs]
        tokens = part[0].shape[2]
        padding = -tokens % CHUNK_SIZE
        if padding:
            part = [torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in part]
        output, state = chunked(*part, state)
        outputs.append(output[:, :, :tokens])
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)), state


def _chunks(x, heads: int):
    """[B, heads * G, T, D] -> [B, heads, N, G * C, D], the rows of a chunk's query heads under one another."""
    batch, _, length, dim = x.shape
    if x.shape[1] == heads:
        return x.reshape(batch, heads, length // CHUNK_SIZE, CHUNK_SIZE, dim)
    x = x.view(batch, heads, -1, length // CHUNK_SIZE, CHUNK_SIZE, dim).transpose(2, 3)
    return x.reshape(batch, heads, x.shape[2], -1, dim)


def _unchunk(o, q):
    """The inverse of `_chunks` for an output. [B, Hq, T, V]"""
    batch, heads, chunks, _, dim = o.shape
    if heads == q.shape[1]:
        return o.flatten(2, 3)
    o = o.view(batch, heads, chunks, -1, CHUNK_SIZE, dim).transpose(2, 3)
    return o.reshape(batch, q.shape[1], q.shape[2], dim)


def _scale_rows(x, factor):
    """x [..., G * C, D] times factor [..., C, D or 1]."""
    shape = x.shape
    return (x.view(*shape[:-2], -1, factor.shape[-2], shape[-1]) * factor.unsqueeze(-3)).view(shape)


def _sums(log_decay, size: int):
    """Sums of log decays inside blocks of `size` rows, without cancellation: from the start up to and with each row,
    and from behind each row to the end. log_decay [..., C, D] -> two of [..., C / size, size, D]"""
    blocks = log_decay.unflatten(-2, (-1, size))
    ones = torch.ones(size, size, dtype=log_decay.dtype, device=log_decay.device)
    return ones.tril() @ blocks, ones.triu(1) @ blocks


def _leaf_size(log_decay) -> int:
    """The largest block that may be factored around its middle: half its decay stays within FACTOR_LIMIT.

    Off a CPU none is: to look would be to wait for the device.
    """
    for size in (CHUNK_SIZE, 16) if log_decay.device.type == "cpu" else ():
        sums = log_decay.detach().unflatten(-2, (-1, size // 2)).sum(-2)
        if sums.numel() == 0 or sums.amin() >= -FACTOR_LIMIT:
            return size
    return 1


def _decayed_scores(q, k, log_decay, diagonal: int = 0):
    """A_ij = sum_d q_id k_jd exp(log_decay_{j+1} + ... + log_decay_i)_d for j <= i - |diagonal|, else 0.

    q [..., G * C, D], k [..., C, D], log_decay [..., C, D or 1] -> [..., G * C, C]
    """
    rows, size = q.shape[-2], k.shape[-2]
    if log_decay.shape[-1] == 1:
        decay = _pairwise(log_decay, diagonal)
        scores = q @ k.transpose(-1, -2)
        return _scale_rows(scores, decay)
    leaf = _leaf_size(log_decay)
    q = q.unflatten(-2, (rows // size, size))
    if leaf == 1:
        scores = (q * k.unsqueeze(-3)).sum(-1)[..., None, None] * float(diagonal == 0)
    else:
        centered = _centering(leaf, log_decay.dtype, log_decay.device) @ log_decay.unflatten(-2, (-1, leaf))
        left = q.unflatten(-2, (-1, leaf)) * centered.exp().unsqueeze(-4)
        right = k.unflatten(-2, (-1, leaf)) * (-centered).exp()
        scores = (left @ right.transpose(-1, -2).unsqueeze(-4)).tril(diagonal)
    # scores: [..., G, C / block, block, block]; neighbours are joined until one block spans the chunk.
    block = leaf
    while block < size:
        forward, backward = _sums(log_decay, block)
        left = q.unflatten(-2, (-1, 2, block))[..., 1, :, :] * forward[..., 1::2, :, :].exp().unsqueeze(-4)
        right = k.unflatten(-2, (-1, 2, block))[..., 0, :, :] * backward[..., 0::2, :, :].exp()
        cross = left @ right.transpose(-1, -2).unsqueeze(-4)
        upper, lower = scores[..., 0::2, :, :], scores[..., 1::2, :, :]
        upper = torch.cat([upper, torch.zeros_like(cross)], dim=-1)
        scores = torch.cat([upper, torch.cat([cross, lower], dim=-1)], dim=-2)
        block *= 2
    return scores.reshape(*scores.shape[:-4], rows, size)


def _pairwise(log_decay, diagonal: int = 0):
    """exp(log_decay_{j+1} + ... + log_decay_i) for j <= i - |diagonal|, else 0. [..., C, 1] -> [..., C, C]"""
    size = log_decay.shape[-2]
    ones = torch.ones(size, size, dtype=log_decay.dtype, device=log_decay.device)
    # Row i of the product adds, in column j, the log decays behind j up to i.
    between = ones.tril() @ (log_decay * ones.tril(-1))
    return between.exp() * ones.tril(diagonal)


def _chunk_decay(q, k, v, log_decay, state):
    """Chunks in parallel; T is a multiple of CHUNK_SIZE. Returns o [B, Hq, T, V] and the final state."""
    heads = k.shape[1]
    k, v, log_decay = (_chunks(x, heads) for x in (k, v, log_decay))
    if factors := _factors(log_decay):
        queries, right = _scaled_chunks(q, factors.left), k / factors.left
        scores = _lower(queries @ right.mT)
        updates = (right.mT @ v) * factors.behind
        ahead, total = factors.ahead, factors.total
    else:
        queries = _chunks(q, heads)
        from_start, to_end = (x.squeeze(-3) for x in _sums(log_decay, CHUNK_SIZE))
        scores = _decayed_scores(queries, k, log_decay)
        updates = (k * to_end.exp()).mT @ v
        queries = _scale_rows(queries, from_start.exp())
        ahead, total = None, from_start[..., -1, :, None].exp()
    states, state = _scan(total, updates, state)
    states = states if ahead is None else states * ahead
    return _unchunk(_sum_of_products(queries, states, scores, v), q), state


def _chunk_sum(q, k, v, state):
    """Chunks in parallel; T is a multiple of CHUNK_SIZE. Returns o [B, Hq, T, V] and the final state."""
    heads = k.shape[1]
    queries, k, v = (_chunks(x, heads) for x in (q, k, v))
    scores = _lower(queries @ k.mT)
    states = torch.cat([state.unsqueeze(2), k.mT @ v], dim=2).cumsum(2)
    return _unchunk(_sum_of_products(queries, states[:, :, :-1], scores, v), q), states[:, :, -1].clone()


def _sum_of_products(a, b, c, d):
    """a @ b + c @ d, added up in place."""
    output = a @ b
    output.flatten(0, -3).baddbmm_(c.flatten(0, -3), d.flatten(0, -3))
    return output


def _scan(decays, updates, state):
    """States before each chunk, stacked, and the one behind the last: S_{n+1} = decay_n S_n + update_n.

    decays [B, H, N, K or 1, 1], updates [B, H, N, K, V], state [B, H, K, V].
    """
    if torch.is_grad_enabled():
        states = []
        for decay, update in zip(decays.unbind(2), updates.unbind(2), strict=True):
            states.append(state)
            state = torch.addcmul(update, decay, state)
        return torch.stack(states, dim=2), state
    states = updates.new_empty(*updates.shape[:2], updates.shape[2] + 1, *updates.shape[3:])
    states[:, :, 0] = state
    every = states.unbind(2)
    for n, (decay, update) in enumerate(zip(decays.unbind(2), updates.unbind(2), strict=True)):
        torch.addcmul(update, decay, every[n], out=every[n + 1])
    return states[:, :, :-1], every[-1].clone()


@dataclass
class _Factors:
    """exp(sum of log decays between two tokens of a chunk) as left_i / left_j, factored around the chunk's middle.

    left: [B, H, N, C, K or 1]. ahead, from the chunk's start to its middle, behind, from there to its end, and
    total, from start to end: [B, H, N, K or 1, 1].
    """

    left: torch.Tensor
    ahead: torch.Tensor
    behind: torch.Tensor
    total: torch.Tensor


def _factors(log_decay) -> _Factors | None:
    """Factors of whole chunks, or None where a chunk decays too much for them (see FACTOR_LIMIT); off a CPU, too, where
    to look would be to wait for the device."""
    if log_decay.device.type != "cpu":
        return None
    size = CHUNK_SIZE
    centered = _centering(size, log_decay.dtype, log_decay.device) @ log_decay
    lowest, highest = centered.detach().aminmax()
    if not (lowest >= -FACTOR_LIMIT and highest <= FACTOR_LIMIT):
        return None
    # The first row's sum is that of the others up to the middle, negative.
    ahead, behind = log_decay[..., :1, :] - centered[..., :1, :], centered[..., -1:, :]
    ends = [x.transpose(-1, -2).exp() for x in (ahead, behind, ahead + behind)]
    return _Factors(centered.exp(), *ends)


@lru_cache(maxsize=16)
def _centering(size: int, dtype, device):
    """[C, C] weights that turn log decays into their sums from a block's middle to each row: negative behind it."""
    middle = size // 2
    # Cached, so it must not be an inference tensor, which no later training could use.
    with torch.inference_mode(False):
        weights = torch.ones(size, size).tril()
        weights[:middle] -= weights[middle - 1].clone()
        weights[middle:, :middle] = 0
        return weights.to(device, dtype)


def _lower(scores):
    """Zero the pairs whose key comes behind the query. [..., G * C, C]"""
    keep = _causal(scores.shape[-2], scores.shape[-1], scores.dtype, scores.device)
    return scores * keep if torch.is_grad_enabled() else scores.mul_(keep)


@lru_cache(maxsize=16)
def _causal(rows: int, size: int, dtype, device):
    with torch.inference_mode(False):
        return torch.ones(size, size).tril().repeat(rows // size, 1).to(device, dtype)


def _scaled_chunks(q, factor):
    """`_chunks(q)` times factor [B, Hkv, N, C, K or 1], or [B, Hq, N, C, K]."""
    batch, heads, chunks, size, _ = factor.shape
    q = q.reshape(batch, heads, -1, chunks, size, q.shape[-1])
    return (q.transpose(2, 3) * factor.unsqueeze(3)).flatten(3, 4)


def _chunk_value_decay(q, k, v, log_decay, state):
    """As `_chunk_decay`, with one decay for every *value* channel: S_t = S_{t-1} diag(a_t) + k_t^T v_t."""
    heads = k.shape[1]
    queries, k, v, log_decay = (_chunks(x, heads) for x in (q, k, v, log_decay))
    from_start, to_end = (x.squeeze(-3) for x in _sums(log_decay, CHUNK_SIZE))
    updates = k.transpose(-1, -2) @ (v * to_end.exp())
    states, state = _scan(from_start[..., -1:, :].exp(), updates, state)
    output = _scale_rows(queries @ states, from_start.exp())
    output = output + _value_decayed_products(queries @ k.transpose(-1, -2), v, log_decay)
    return _unchunk(output, q), state


def _value_decayed_products(scores, v, log_decay):
    """o_im = sum_{j <= i} scores_ij v_jm exp(log_decay_{j+1} + ... + log_decay_i)_m.

    scores [..., G * C, C], v and log_decay [..., C, M] -> [..., G * C, M]
    """
    rows, size = scores.shape[-2:]
    leaf = _leaf_size(log_decay)
    scores = scores.unflatten(-2, (rows // size, size))
    # blocks: the square blocks on the diagonal of every query head's scores. [..., G, C / leaf, leaf, leaf]
    blocks = scores.unflatten(-2, (-1, leaf)).unflatten(-1, (-1, leaf)).diagonal(0, -4, -2).movedim(-1, -3)
    values = v.unflatten(-2, (-1, leaf))
    if leaf == 1:
        output = blocks * values.unsqueeze(-4)
    else:
        centered = _centering(leaf, log_decay.dtype, log_decay.device) @ log_decay.unflatten(-2, (-1, leaf))
        output = blocks.tril() @ (values * (-centered).exp()).unsqueeze(-4) * centered.exp().unsqueeze(-4)
    output = output.flatten(-3, -2)
    block = leaf
    while block < size:
        forward, backward = _sums(log_decay, block)
        cross = scores.unflatten(-2, (-1, 2, block)).unflatten(-1, (-1, 2, block))
        cross = cross[..., 1, :, :, 0, :].diagonal(0, -4, -2).movedim(-1, -3)
        past = v.unflatten(-2, (-1, 2, block))[..., 0, :, :] * backward[..., 0::2, :, :].exp()
        lower = cross @ past.unsqueeze(-4) * forward[..., 1::2, :, :].exp().unsqueeze(-4)
        pairs = output.unflatten(-2, (-1, 2, block))
        output = torch.stack([pairs[..., 0, :, :], pairs[..., 1, :, :] + lower], dim=-3).flatten(-4, -2)
        block *= 2
    return output.flatten(-3, -2)


def _chunk_delta(q, k, v, log_decay, beta, state):
    """Chunks in parallel, but for the state they pass on. With u_t the corrected write of token t,

    (I + L) u = beta (v - (k exp(b)) S_0),   L_ij = beta_i k_i . k_j exp(b_i - b_j) for j < i.
    """
    heads = k.shape[1]
    k, v, log_decay, beta = (_chunks(x, heads) for x in (k, v, log_decay, beta))
    if factors := _factors(log_decay):
        queries, start, end = _scaled_chunks(q, factors.left), k * factors.left, k / factors.left
        scores, inner = _lower(queries @ end.mT), start @ end.mT
        ahead, behind, total = factors.ahead, factors.behind, factors.total
    else:
        queries = _chunks(q, heads)
        from_start, to_end = (x.squeeze(-3) for x in _sums(log_decay, CHUNK_SIZE))
        scores, inner = _decayed_scores(queries, k, log_decay), _decayed_scores(k, k, log_decay, diagonal=-1)
        queries, start, end = _scale_rows(queries, from_start.exp()), k * from_start.exp(), k * to_end.exp()
        ahead = behind = torch.ones_like(log_decay[..., :1, :1])
        total = from_start[..., -1, :, None].exp()
    # Only what lies below the diagonal is read, and ones are taken to be on it: the I of I + L.
    solved = torch.linalg.solve_triangular(
        beta * inner, torch.cat([beta * v, beta * start], dim=-1), upper=False, unitriangular=True
    )
    writes, corrections = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    # The factors' two halves are applied to the states, which are smaller than the queries and keys.
    corrections, end = corrections * ahead.transpose(-1, -2), (end * behind.transpose(-1, -2)).transpose(-1, -2)
    states, corrected = [], []
    flat = state.flatten(0, 1)
    pieces = (x.expand(*k.shape[:3], *x.shape[3:]).flatten(0, 1).unbind(1) for x in (writes, corrections, end, total))
    for write, correction, key, decay in zip(*pieces, strict=True):
        states.append(flat)
        corrected.append(torch.baddbmm(write, correction, flat, alpha=-1))
        flat = torch.baddbmm(decay * flat, key, corrected[-1])
    states, corrected = (torch.stack(x, dim=1).unflatten(0, state.shape[:2]) for x in (states, corrected))
    return _unchunk(_sum_of_products(queries, states * ahead, scores, corrected), q), flat.view_as(state)
