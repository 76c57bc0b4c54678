"""The two branches of Liger attention and their sum (arXiv 2503.01496, eq. 9): o = mix * GRM + (1 - mix) * SWA."""

import math

import numpy
import torch
from torch.utils.checkpoint import checkpoint

from .liger_backend import recurrence
from .liger_cache import LigerCacheLayer, first_tokens
from .liger_config import LayerSpec
from .liger_gates import GATES
from .liger_heads import with_softmax_heads
from .liger_kept import add_kept, attend_kept, empty_memories, priorities
from .liger_window import leaving, reach, window_attention

# Tokens worked through at a time when no gradient is wanted: both branches of a piece stay in the CPU's caches. A GPU
# has no use for small pieces; there they only bound the memory.
PIECE_SIZE = 1024
CUDA_PIECE_SIZE = 16384


def mixed_attention(
    q, k, v, rotated_q, rotated_k, gate, scores, spec: LayerSpec, window: int, mix: float, scaling: float, valid=None,
    cache: LigerCacheLayer | None = None, scales=None, softcap=None, sink_logits=None, dropout: float = 0.0,
    within_window=None, local_window=None, recompute: bool = False, key_map=None,
):  # fmt: skip
    """Both branches over T new tokens.

    Args:
        q: [B, Hq, T, F] and k: [B, Hkv, T, F], read by the recurrence; F is D in k where there is a `key_map`.
        v: [B, Hkv, T, D].
        rotated_q: [B, Hq, T, D] and rotated_k: [B, Hkv, T, D], after RoPE, read by the window.
        gate: [B, Hkv, T, W], the gate's logits; [B, Hq, T, W] where query heads of a group differ.
        scores: [B, Hkv, T, 1], by which tokens are kept (see `liger_kept`), or None.
        spec: the layer's settings; `window` and `mix` are those in use.
        scales: coefficients of the recurrence and of the window, [Hq] each, in place of `mix` where both run.
        scaling, softcap, sink_logits, dropout: of the window, see `window_attention`.
        valid: [B, T] bool, false at padding; None where there is none.
        cache: what came before; it is updated.
        within_window: (valid) -> [B, Hq, T, D], used instead of the window where no token can see beyond it.
        local_window: the base's own window, which the layer's softmax heads keep; None where they see the whole text.
        recompute: run each branch again in backward instead of keeping what it computes on the way, which is more than
            a layer's MLP keeps.
        key_map: [Hq, F, D], a linear map of the recurrence's keys for each query head, or None.
    Returns:
        [B, T, Hq, D] in v's dtype.
    """
    if spec.softmax_kv_heads:
        return with_softmax_heads(
            mixed_attention, q, k, v, rotated_q, rotated_k, gate, scores, spec, valid, cache, scales, sink_logits,
            within_window, local_window, key_map, window=window, mix=mix, scaling=scaling, softcap=softcap,
            dropout=dropout, recompute=recompute,
        )  # fmt: skip
    length = q.shape[2]
    past = 0 if cache is None else cache.get_seq_length()
    sinks = memory = priority = None
    counts = tuple(count + spec.sinks for count in spec.kept_by_head(k.shape[1]))
    if scores is not None:
        scores = scores.squeeze(-1)
        priority = priorities(scores, _places(valid, cache, scores), spec.sinks, valid)
        memory = None if cache is None else cache.kept
    elif spec.sinks and mix < 1:
        sinks = _sinks(rotated_k, v, valid, cache, spec.sinks)
    keys, values, seen = rotated_k, v, valid
    if cache is not None:
        keys, values, seen, priority = cache.update(keys, values, seen, priority)
    states = None if cache is None else cache.states
    joint = spec.joint and mix > 0
    whole = past == 0 and length <= window and within_window is not None and (spec.delayed or not joint)
    size = CUDA_PIECE_SIZE if v.is_cuda else PIECE_SIZE
    if torch.is_grad_enabled() or whole or (mix == 0 and scores is None):
        size = length
    run = _twice if recompute and torch.is_grad_enabled() else _once
    output = _empty_output(v, (q.shape[0], length, q.shape[1], v.shape[-1])) if length > size else None
    before = keys.shape[2] - length
    for start in range(0, max(length, 1), max(size, 1)):
        at = slice(start, start + size)
        recurrent = local = total = lse = evicted = None
        rows = min(size, length - start)
        if whole:
            local = within_window(valid)
        elif window == 0 and mix < 1:
            local = torch.zeros_like(rotated_q)
        elif mix < 1:
            seen_from = slice(max(before + start - reach(window), 0), before + start + size)
            local, lse = run(
                window_attention,
                rotated_q[:, :, at],
                keys[:, :, seen_from],
                values[:, :, seen_from],
                window,
                scaling,
                None if seen is None else seen[:, seen_from],
                softcap,
                sink_logits,
                None if sinks is None else (sinks[0], sinks[1], sinks[2] + start),
                need_lse="relative" if joint and spec.normalizer == "joint-max" else joint or scores is not None,
                dropout=dropout,
                backend=spec.backend,
            )
            if scores is not None:
                kept, kept_lse, memory, evicted = run(
                    attend_kept, rotated_q[:, :, at], keys, values, priority, before + start, memory, window,
                    counts, scaling, softcap, dropout=dropout, scores=None if past else scores,
                    evict=spec.delayed and mix > 0,
                )  # fmt: skip
                local, lse = add_kept(local, lse, kept, kept_lse)
                lse = lse if joint else None
        remembers = not spec.delayed or states is not None or before + start + rows > window
        if mix == 1 or (mix > 0 and remembers):
            entering = (k[:, :, at], v[:, :, at], None if valid is None else valid[:, at])
            if evicted is not None:
                entering = evicted
            elif spec.delayed:
                entering = leaving(keys, values, seen, before, start, rows, window, sinks)
            recurrent, total, states = run(_recurrent, q[:, :, at], *entering, gate[:, :, at], key_map, spec, states)
        if output is None:
            output = _combine(recurrent, total, local, lse, mix, scales).to(v.dtype).transpose(1, 2)
        else:
            _combine(recurrent, total, local, lse, mix, scales, out=output[:, at].transpose(1, 2))
    if cache is not None:
        cache.states = states
        if scores is not None:
            cache.kept = empty_memories(keys, values, counts) if memory is None else memory
    return output


def _once(function, *args, **settings):
    return function(*args, **settings)


def _twice(function, *args, **settings):
    """The function's value; what it computes on the way is forgotten, and computed again where backward needs it."""
    random = settings.get("dropout", 0.0) > 0
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **settings)


def _empty_output(like, shape: tuple[int, ...]):
    """An uninitialised tensor. On a CPU in numpy's memory, which asks Linux for huge pages: a long text's output is
    written once, and three quarters of that time would go into faults of small pages."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    memory = numpy.empty(math.prod(shape) * like.element_size(), numpy.uint8)
    return torch.from_numpy(memory).view(like.dtype).view(shape)


def packed_attention(starts, *tensors, **settings):
    """`mixed_attention` of every document by itself: state and window begin anew where `starts` ([B, T]) is true.

    `tensors` are those of `mixed_attention`. Documents are taken out of the rows and run side by side, those of
    similar length together, so that less than half of what is computed is padding. No cache, no other padding. Returns
    [B, T, Hq, D].
    """
    batch, length = starts.shape
    first = starts.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([batch * length]))
    buckets = torch.ceil(torch.log2(lengths.float()))
    flat = [None if x is None else x.transpose(1, 2).flatten(0, 1) for x in tensors]
    places, outputs = [], []
    for bucket in buckets.unique():
        members = buckets == bucket
        offsets = torch.arange(int(lengths[members].max()), device=first.device)
        inside = offsets < lengths[members, None]
        index = torch.where(inside, first[members, None] + offsets, 0)
        # Padding comes behind each document, where nothing looks.
        output = mixed_attention(*(None if x is None else x[index].transpose(1, 2) for x in flat), **settings)
        places.append(index[inside])
        outputs.append(output[inside])
    # The places are a permutation of the tokens; sorting them puts the outputs back in order.
    output = torch.cat(outputs)[torch.cat(places).argsort()]
    return output.unflatten(0, (batch, length))


def _combine(recurrent, total, local, lse, mix: float, scales=None, out=None):
    """The weighted sum of the branches that are there; with `lse`, over one denominator. [B, Hq, T, D]

    out: written to where it is given, whatever its dtype.
    """
    if out is not None and out.dtype != torch.float32:
        return out.copy_(_combine(recurrent, total, local, lse, mix, scales))
    if recurrent is None:
        return local if out is None else out.copy_(local)
    if scales is not None:
        ours, theirs = (scale.float()[:, None, None] for scale in scales)
        if local is None:
            return torch.mul(recurrent, ours, out=out)
        if lse is None:
            return torch.addcmul(theirs * local.float(), ours, recurrent, out=out)
        tiny = torch.finfo(torch.float32).tiny
        odds = ours.clamp_min(tiny).log() - theirs.clamp_min(tiny).log()
    elif local is None:
        return torch.mul(recurrent, mix, out=out)
    elif lse is not None:
        odds = math.log(mix / (1 - mix))
    if lse is not None:
        # The recurrence's share of mix * total + (1 - mix) * exp(lse), without taking the exponential.
        weight = torch.log(total.clamp_min(torch.finfo(total.dtype).tiny)) - lse.unsqueeze(-1)
        mix = (weight + odds).sigmoid()
    return torch.lerp(local.float(), recurrent, mix, out=out)


def _recurrent(q, k, v, valid, gate_logits, key_map, spec, states):
    """The gated recurrence in float32: query t reads the state once k and v of row t are in it.

    Output [B, Hq, T, D], its denominator [B, Hq, T, 1] or None, and the states.
    """
    gate, dtype = GATES[spec.gate], v.dtype
    q, k, v = q.float(), k.float(), v.float()
    if key_map is not None:
        k = (k.unsqueeze(2) @ key_map.unflatten(0, (k.shape[1], -1)).mT).flatten(1, 2)
    heads = max(k.shape[1], gate_logits.shape[1])
    k, v, gate_logits = (_for_heads(x, heads) for x in (k, v, gate_logits))
    denominator = spec.normalizer if spec.divides else gate.denominator
    if denominator:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    inputs = gate.inputs(q, k, v, gate_logits.float(), spec)
    if valid is not None:
        inputs = inputs.masked(valid if valid.ndim == 2 else _for_heads(valid, inputs.k.shape[1]))
    # What is divided by is added up in float32, and float16 could overflow.
    dtype = dtype if dtype == torch.bfloat16 and not denominator else torch.float32
    output, states = recurrence(gate.rule, inputs, states, spec.backend, dtype)
    if not denominator:
        if spec.normalizer == "group":
            output = torch.nn.functional.layer_norm(output, output.shape[-1:])
        return output, None, states
    output, total = output[..., :-1], output[..., -1:]
    # max1: mLSTM (arXiv 2405.04517, eq. 21). Else nothing has been written yet where the sum is 0.
    floor = 1.0 if denominator == "max1" else torch.finfo(output.dtype).tiny
    return output / total.abs().clamp_min(floor), total, states


def _for_heads(x, heads: int):
    """[B, H, T, ...] -> [B, heads, T, ...]: what a group shares, for each of its heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _places(valid, cache, like):
    """Which tokens of the text these are, padding aside. valid [B, T] or None -> [B, T]; what it says of padding has
    no meaning."""
    batch, _, length = like.shape
    there = valid if valid is not None else torch.ones(batch, length, dtype=torch.bool, device=like.device)
    return there.cumsum(1) - 1 if cache is None else cache.places(there)


def _sinks(k, v, valid, cache, count: int):
    """Keys and values of the first tokens, and how far each lies before the first query (see `window_attention`)."""
    places = _places(valid, cache, k[..., 0])
    first = places[:, -1:] - places.shape[1] + 1  # of the first query, if there were no padding behind it
    places = places if valid is None else places.masked_fill(~valid, LigerCacheLayer.EMPTY)
    if cache is not None:
        keys, values, places = cache.update_sinks(k, v, places)
    else:
        keys, values, places = first_tokens(k, v, places, count)
    return keys, values, torch.where(places >= 0, first - places, LigerCacheLayer.EMPTY)
