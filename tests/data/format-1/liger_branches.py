"""The two branches of Liger attention and their sum (arXiv 2503.01496, eq. 9): o = mix * GRM + (1 - mix) * SWA."""

import math

import torch

from .liger_cache import LigerCacheLayer, first_tokens
from .liger_config import LayerSpec
from .liger_gates import GATES
from .liger_recurrence import chunk_decay, chunk_delta, chunk_slots, step_decay, step_delta, step_slots
from .liger_window import reach, window_attention

RULES = {
    "decay": (chunk_decay, step_decay),
    "delta": (chunk_delta, step_delta),
    "slots": (chunk_slots, step_slots),
}
# Tokens worked through at a time when no gradient is wanted: both branches of a piece stay in the CPU's caches.
PIECE_SIZE = 2048


def mixed_attention(
    q, k, v, rotated_q, rotated_k, spec: LayerSpec, window: int, mix: float, scaling: float, valid=None,
    cache: LigerCacheLayer | None = None, softcap=None, sink_logits=None, dropout: float = 0.0, within_window=None,
):  # fmt: skip
    """Both branches over T new tokens.

    Args:
        q: [B, Hq, T, D] and k: [B, Hkv, T, D] before RoPE, read by the recurrence; rotated_q, rotated_k after it.
        v: [B, Hkv, T, D].
        spec: the layer's settings; `window` and `mix` are those in use.
        scaling, softcap, sink_logits, dropout: of the window, see `window_attention`.
        valid: [B, T] bool, false at padding; None where there is none.
        cache: what came before; it is updated.
        within_window: (valid) -> [B, Hq, T, D], used instead of the window where no token can see beyond it.
    Returns:
        [B, T, Hq, D] in v's dtype.
    """
    length = q.shape[2]
    past = 0 if cache is None else cache.get_seq_length()
    sinks = _sinks(rotated_k, v, valid, cache, past, spec.sinks) if spec.sinks and mix < 1 else None
    keys, values, seen = (rotated_k, v, valid) if cache is None else cache.update(rotated_k, v, valid)
    states = None if cache is None else cache.states
    joint = spec.normalizer == "joint" and mix > 0
    whole = past == 0 and length <= window and within_window is not None and not joint
    size = length if torch.is_grad_enabled() or whole or mix == 0 else PIECE_SIZE
    output = v.new_empty(q.shape[0], length, q.shape[1], v.shape[-1]) if length > size else None
    before = keys.shape[2] - length
    for start in range(0, max(length, 1), max(size, 1)):
        at = slice(start, start + size)
        recurrent = local = total = lse = None
        if mix > 0:
            here = None if valid is None else valid[:, at]
            recurrent, total, states = _recurrent(q[:, :, at], k[:, :, at], v[:, :, at], spec, here, states)
        if whole:
            local = within_window(valid)
        elif window == 0 and mix < 1:
            local = torch.zeros_like(rotated_q)
        elif mix < 1:
            seen_from = slice(max(before + start - reach(window), 0), before + start + size)
            local, lse = window_attention(
                rotated_q[:, :, at],
                keys[:, :, seen_from],
                values[:, :, seen_from],
                window,
                scaling,
                None if seen is None else seen[:, seen_from],
                softcap,
                sink_logits,
                None if sinks is None else (sinks[0], sinks[1], sinks[2] + start),
                need_lse=joint,
                dropout=dropout,
            )
        piece = _combine(recurrent, total, local, lse, mix).to(v.dtype).transpose(1, 2)
        if output is None:
            output = piece
        else:
            output[:, at] = piece
    if cache is not None:
        cache.states = states
    return output


def document_starts(position_ids, batch: int):
    """Where a new document begins in packed rows: [B, T] bool, or None where each row is one text.

    The convention of transformers' padding-free collators: positions that do not go on by one start a document.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    jumps = position_ids.diff(dim=1) != 1
    if not jumps.any():
        return None
    starts = torch.nn.functional.pad(jumps, (1, 0), value=True)
    return starts.expand(batch, -1)


def packed_attention(starts, q, k, v, rotated_q, rotated_k, **settings):
    """`mixed_attention` of every document by itself: state and window begin anew where `starts` ([B, T]) is true.

    Documents are taken out of the rows and run side by side, those of similar length together, so that less than half
    of what is computed is padding. No cache, no other padding. Returns [B, T, Hq, D].
    """
    batch, length = starts.shape
    first = starts.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([batch * length]))
    buckets = torch.ceil(torch.log2(lengths.float()))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, rotated_q, rotated_k)]
    places, outputs = [], []
    for bucket in buckets.unique():
        members = buckets == bucket
        offsets = torch.arange(int(lengths[members].max()), device=first.device)
        inside = offsets < lengths[members, None]
        index = torch.where(inside, first[members, None] + offsets, 0)
        # Padding comes behind each document, where nothing looks.
        output = mixed_attention(*(x[index].transpose(1, 2) for x in flat), **settings)
        places.append(index[inside])
        outputs.append(output[inside])
    # The places are a permutation of the tokens; sorting them puts the outputs back in order.
    output = torch.cat(outputs)[torch.cat(places).argsort()]
    return output.unflatten(0, (batch, length))


def _combine(recurrent, total, local, lse, mix: float):
    """The weighted sum of the branches that are there; with `lse`, over one denominator. [B, Hq, T, D]"""
    if recurrent is None:
        return local
    if local is None:
        return mix * recurrent
    if lse is not None:
        # The recurrence's share of mix * total + (1 - mix) * exp(lse), without taking the exponential.
        weight = torch.log(total.clamp_min(torch.finfo(total.dtype).tiny)) - lse.unsqueeze(-1)
        mix = (weight + math.log(mix / (1 - mix))).sigmoid()
    return torch.lerp(local.float(), recurrent, mix)


def _recurrent(q, k, v, spec, valid, states):
    """The gated recurrence in float32. Output [B, Hq, T, D], its denominator [B, Hq, T, 1] or None, and the states."""
    gate = GATES[spec.gate]
    q, k, v = q.float(), k.float(), v.float()
    source = {"k": k, "v": v, "q": q}[spec.gate_source]
    if spec.gate_source == "q":
        source = q.unflatten(1, (k.shape[1], -1)).mean(2)
    denominator = gate.denominator or (spec.normalizer if spec.normalizer != "none" else None)
    if denominator:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    inputs = gate.inputs(q, k, v, source, spec)
    if valid is not None:
        inputs = inputs.masked(valid)
    arguments = [inputs.q, inputs.k, inputs.v, inputs.log_decay]
    if gate.rule != "decay":
        arguments.append(inputs.beta if gate.rule == "delta" else inputs.write)
    chunk, step = RULES[gate.rule]
    if states is not None and gate.rule != "slots":
        (states,) = states
    output, states = (step if q.shape[2] == 1 and states is not None else chunk)(*arguments, states)
    states = states if gate.rule == "slots" else (states,)
    if not denominator:
        return output, None, states
    output, total = output[..., :-1], output[..., -1:]
    # max1: mLSTM (arXiv 2405.04517, eq. 21). Else nothing has been written yet where the sum is 0.
    floor = 1.0 if denominator == "max1" else torch.finfo(output.dtype).tiny
    return output / total.abs().clamp_min(floor), total, states


def _sinks(k, v, valid, cache, past: int, count: int):
    """Keys and values of the first tokens, and how far each lies before the first query (see `window_attention`)."""
    if cache is not None:
        keys, values, positions = cache.update_sinks(k, v, valid)
    else:
        positions = torch.arange(k.shape[2], device=k.device)[None].expand(k.shape[0], -1)
        if valid is not None:
            positions = positions.masked_fill(~valid, LigerCacheLayer.EMPTY)
        keys, values, positions = first_tokens(k, v, positions, count)
    return keys, values, torch.where(positions >= 0, past - positions, LigerCacheLayer.EMPTY)
