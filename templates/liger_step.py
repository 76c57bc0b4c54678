"""One token after others, without gradients: what `liger_branches.mixed_attention` computes, in as few operations as
there are, each of the same shapes whatever the position. So a step can be compiled once, or captured as a CUDA graph.
"""

import torch

from .liger_kept import priorities, score_bounds
from .liger_memory import LAST, ring_slot
from .liger_window import soft_capped, softmax_weights


def replace_token(tokens, spec, valid, cache, shared: dict, evicts: bool):
    """Write a token into the slot of the one that goes.

    Args:
        tokens: `liger_branches.Tokens` of one token. valid: [B, 1] bool, false where it is padding, or None.
        cache: the `LigerCacheLayer`, which has counted the token. shared: of its `advance`.
        evicts: whether what goes is asked for.
    Returns:
        keys and values of what goes, [B, Hkv, 2, D], zero where nothing does, and of the gate's logits [B, Hkv, 1] or
        None; or None twice.
    """
    layout = cache.layout
    pairs = torch.cat([tokens.rotated_k, tokens.v], dim=2)  # [B, Hkv, 2, D]
    shape = (len(pairs), layout.rows, len(layout.beyond) // layout.rows)
    held, new = [cache.pairs], [pairs.view(*shape, 2, -1)]
    if layout.scored:
        held.append(cache.priority)
        new.append(
            _priority(tokens.scores, spec, valid, cache, shared).expand(len(pairs), len(layout.beyond), -1).view(shape)
        )
        slot = _lowest(cache, shared)
    else:
        slot = once(shared, f"ring {layout.window} {layout.beyond[0]}",
                     lambda: ring_slot(_place(cache, shared), layout.window, layout.beyond[0]))  # fmt: skip
        slot = slot.unsqueeze(2).expand(shape)
    if cache.logits is not None:
        held.append(cache.logits)
        new.append(tokens.gate.view(shape).to(cache.logits.dtype))
    index = [slot if x.ndim == 3 else slot[..., None, None].expand(x.shape) for x in new]
    old = [None] * len(held)
    if valid is not None:
        old = [x.gather(2, at) for x, at in zip(held, index, strict=True)]
        keep = [valid.view(-1, *[1] * (x.ndim - 1)) for x in new]
        new = [torch.where(*each) for each in zip(keep, new, old, strict=True)]
    elif evicts:
        old = [x.gather(2, at) if x.dtype != torch.int64 else None for x, at in zip(held, index, strict=True)]
    for x, at, value in zip(held, index, new, strict=True):
        x.scatter_(2, at, value)
    if not evicts:
        return None, None
    return old[0].flatten(1, 2), None if cache.logits is None else old[-1].flatten(1, 2).unsqueeze(2)


def visible_bias(cache, shared: dict, dtype):
    """0 where a slot is taken, and behind them where anything was evicted; else the lowest. [B, 1, 1 or Hq, S + 1]"""
    return once(shared, f"bias {cache.window} {cache.beyond} {dtype}", lambda: _bias(cache, dtype))


def _bias(cache, dtype):
    taken = cache.numbers < cache.tokens.view(-1, 1, 1, 1)
    return torch.zeros_like(taken, dtype=dtype).masked_fill(~taken, torch.finfo(dtype).min)


def exact_scores(q, cache, shared: dict, scoring):
    """Scores of the tokens that are visible, in float32. q [B, Hq, 1, D] -> [B * M, Hq / M, S]"""
    rows, slots = cache.layout.rows, cache.layout.slots
    bias = once(
        shared,
        f"rows of bias {cache.window} {cache.beyond}",
        lambda: visible_bias(cache, shared, torch.float32)[..., :slots].expand(-1, rows, -1, -1).flatten(0, 1),
    )
    q = q.reshape(len(q) * rows, -1, q.shape[-1]).float()
    keys = cache.pairs[:, :, :, 0].flatten(0, 1).float()
    if scoring.softcap is None:
        return torch.baddbmm(bias, q, keys.mT, alpha=scoring.scaling)
    return soft_capped(q @ keys.mT, bias, scoring.scaling, scoring.softcap)


def weighted_values(weights, cache):
    """weights [B * M, R, S] -> [B * M, R, D] float32"""
    return weights @ cache.pairs[:, :, :, 1].flatten(0, 1).float()


def exact_attention(q, cache, shared: dict, scoring, need_lse: bool | str):
    """Softmax attention to what is visible. q [B, Hq, 1, D] -> the same shape, and lse [B, Hq, 1] or None."""
    shape = q.shape
    if scoring.softcap is None and scoring.sink_logits is None and not need_lse and q.dtype != torch.float16:
        bias = once(
            shared,
            f"mask {cache.window} {cache.beyond} {q.dtype}",
            lambda: visible_bias(cache, shared, q.dtype)[..., : cache.layout.slots].contiguous(),
        )
        q = q.reshape(len(q), cache.layout.rows, -1, shape[-1])
        keys, values = cache.pairs.unbind(3)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, keys, values, attn_mask=bias, scale=scoring.scaling).view(shape), None
    scores = exact_scores(q, cache, shared, scoring)
    weights, lse = softmax_weights(scores, sink_rows(scoring.sink_logits, scores), need_lse, 0.0)
    return weighted_values(weights, cache).view(shape), None if lse is None else lse.view(shape[:3])


def sink_rows(sink_logits, scores):
    """Logits [Hq] for the rows of scores [B * M, Hq / M, S]; None for None."""
    if sink_logits is None:
        return None
    return sink_logits.float().view(-1, scores.shape[1]).repeat(len(scores) * scores.shape[1] // len(sink_logits), 1)


def evicted_so_far(cache, shared: dict, valid=None):
    """Which heads evict a token in this step. [B, Hkv] bool"""
    return once(shared, f"evicts {cache.window} {cache.beyond}", lambda: _evicts(cache, valid))


def _evicts(cache, valid):
    found = cache.tokens.unsqueeze(1) > cache.sizes
    return found if valid is None else found & valid


def _place(cache, shared: dict):
    """Which token of the text the newest is; of a row of padding, whatever. [B, 1]"""
    return once(shared, "place", lambda: (cache.tokens.unsqueeze(1) - 1).clamp_min(0))


def _priority(scores, spec, valid, cache, shared: dict):
    """Of the newest token. [B, Hkv or 1, 1]"""
    place = _place(cache, shared)
    bounds = once(shared, f"bounds {spec.sinks}", lambda: score_bounds(place, spec.sinks))
    if scores is not None:
        return priorities(scores.squeeze(-1), place, spec.sinks, valid, bounds)
    zeros = lambda: torch.zeros_like(place, dtype=torch.float32).unsqueeze(1)  # noqa: E731
    return once(shared, f"priority {spec.sinks}", lambda: priorities(zeros(), place, spec.sinks, valid, bounds))


def _lowest(cache, shared: dict):
    """The slot that each head gives up: its first free one, or that of the lowest token beyond the window. [B, M, R]"""
    window = cache.layout.window
    oldest = once(shared, f"oldest {window}", lambda: (_place(cache, shared) - window).unsqueeze(2) << 32)
    held = (cache.priority << 32) > oldest  # an int64 holds the places below the scores
    if not cache.layout.ragged:
        return cache.priority.masked_fill(held, LAST).argmin(2, keepdim=True)
    held = held.unsqueeze(2) | cache.foreign
    return cache.priority.unsqueeze(2).masked_fill(held, LAST).argmin(3)


def once(shared: dict, name: str, make):
    if name not in shared:
        shared[name] = make()
    return shared[name]
