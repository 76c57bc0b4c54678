"""The two branches of Liger attention and their sum (arXiv 2503.01496, eq. 9): o = mix * GRM + (1 - mix) * SWA."""

import math
from dataclasses import dataclass, fields, replace

import numpy
import torch
from torch.utils.checkpoint import checkpoint

from .liger_backend import recurrence
from .liger_cache import LigerCacheLayer, first_tokens
from .liger_config import LayerSpec
from .liger_gates import GATES
from .liger_kept import add_kept, attend_kept, attend_step, empty_memories, priorities
from .liger_rest import add_rest, empty_rest
from .liger_window import leaving, reach, window_attention

# Tokens worked through at a time when no gradient is wanted: both branches of a piece stay in the CPU's caches. A GPU
# has no use for small pieces; there they only bound the memory.
PIECE_SIZE = 1024
CUDA_PIECE_SIZE = 16384


@dataclass(frozen=True)
class Tokens:
    """What a layer's attention reads of T new tokens.

    Attributes:
        q: [B, Hq, T, F] and k: [B, Hkv, T, F], read by the recurrence; F is D in k where there is a `key_map`. With a
            rest state q is the query before RoPE.
        v: [B, Hkv, T, D].
        rotated_q: [B, Hq, T, D] and rotated_k: [B, Hkv, T, D], after RoPE, read by the window.
        gate: [B, Hkv, T, W], the gate's logits; [B, Hq, T, W] where query heads of a group differ.
        scores: [B, Hkv, T, 1], by which tokens are kept (see `liger_kept`), or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rotated_q: torch.Tensor
    rotated_k: torch.Tensor
    gate: torch.Tensor
    scores: torch.Tensor | None = None

    def changed(self, function) -> "Tokens":
        """With every tensor changed by the function."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Tokens(**{name: None if x is None else function(x) for name, x in values.items()})

    def of_heads(self, heads, queries) -> "Tokens":
        """Those of some key/value heads and of their query heads."""
        count = self.rotated_q.shape[1]
        return self.changed(lambda x: x[:, queries if x.shape[1] == count else heads])


@dataclass(frozen=True)
class Settings:
    """How a layer attends.

    Attributes:
        spec: the layer's settings; `window` and `mix` are those in use.
        scaling, softcap, sink_logits, dropout: of the window, see `window_attention`.
        scales: coefficients of the recurrence and of the window, [Hq] each, in place of `mix` where both run.
        key_map: [Hq, F, D], a linear map of the recurrence's keys for each query head, or None.
        rest: `rest_mass` and `rest_slope` (see `liger_rest`) where a rest state is in use, or None.
        local_window: the base's own window, which the layer's softmax heads keep; None where they see the whole text.
        recompute: run each branch again in backward instead of keeping what it computes on the way, which is more than
            a layer's MLP keeps.
    """

    spec: LayerSpec
    window: int
    mix: float
    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    dropout: float = 0.0
    scales: tuple | None = None
    key_map: torch.Tensor | None = None
    rest: tuple | None = None
    local_window: int | None = None
    recompute: bool = False

    def of_heads(self, spec: LayerSpec, queries) -> "Settings":
        """Those of some query heads; spec is that of their key/value heads."""
        pick = lambda x: None if x is None else x[queries]  # noqa: E731
        pair = lambda x: None if x is None else tuple(map(pick, x))  # noqa: E731
        own = {"sink_logits": pick(self.sink_logits), "key_map": pick(self.key_map)}
        return replace(self, spec=spec, scales=pair(self.scales), rest=pair(self.rest), **own)


def mixed_attention(
    tokens: Tokens, settings: Settings, valid=None, cache: LigerCacheLayer | None = None, within_window=None
):
    """Both branches over T new tokens.

    Args:
        valid: [B, T] bool, false at padding, which comes first; None where there is none.
        cache: what came before; it is updated.
        within_window: () -> [B, Hq, T, D], used instead of the window where no token can see beyond it.
    Returns:
        [B, T, Hq, D] in v's dtype.
    """
    spec, window, mix = settings.spec, settings.window, settings.mix
    q, k, v, gate, rotated_q = tokens.q, tokens.k, tokens.v, tokens.gate, tokens.rotated_q
    length, heads = q.shape[2], k.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    counts = tuple(count + spec.sinks for count in spec.kept_by_head(heads))
    holds = tokens.scores is not None or settings.rest is not None
    sinks = memory = priority = logits = scores = None
    if holds:
        scores = v.new_zeros(v.shape[:3], dtype=torch.float32) if tokens.scores is None else tokens.scores.squeeze(-1)
        sinks_went_by = valid is None and cache is not None and cache.tokens is None and past >= spec.sinks
        places = _places(valid, cache, scores)
        priority = priorities(scores, places, 0 if sinks_went_by else spec.sinks, valid)
        memory = None if cache is None else cache.kept
        if settings.rest is not None and not GATES[spec.gate].fixed:
            logits = gate.squeeze(-1)
    elif spec.sinks and mix < 1:
        sinks = _sinks(tokens.rotated_k, v, valid, cache, spec.sinks)
    keys, values, seen = tokens.rotated_k, v, valid
    if cache is not None:
        keys, values, seen, priority, logits = cache.update(keys, values, seen, priority, logits)
    states = None if cache is None else cache.states
    joint = spec.joint and mix > 0
    evicts = settings.rest is not None or (spec.delayed and mix > 0)
    whole = past == 0 and length <= window and within_window is not None and (spec.delayed or not joint)
    size = CUDA_PIECE_SIZE if v.is_cuda else PIECE_SIZE
    if torch.is_grad_enabled() or whole or (mix == 0 and not holds):
        size = length
    run = _twice if settings.recompute and torch.is_grad_enabled() else _once
    output = _empty_output(v, (q.shape[0], length, q.shape[1], v.shape[-1])) if length > size else None
    before = keys.shape[2] - length
    attended = {"scaling": settings.scaling, "softcap": settings.softcap, "dropout": settings.dropout}
    for start in range(0, max(length, 1), max(size, 1)):
        at = slice(start, start + size)
        recurrent = local = total = lse = evicted = None
        rows = min(size, length - start)
        if whole:
            local = within_window()
        elif window == 0 and mix < 1:
            local = torch.zeros_like(rotated_q)
        elif mix < 1 and length == 1 and memory is not None:
            local, lse, memory, evicted = run(
                attend_step, rotated_q, keys, values, priority, seen, memory, window, counts, **attended,
                sink_logits=settings.sink_logits, logits=logits, need_lse=joint or settings.rest is not None,
                evict=evicts,
            )  # fmt: skip
        elif mix < 1:
            seen_from = slice(max(before + start - reach(window), 0), before + start + size)
            local, lse = run(
                window_attention,
                rotated_q[:, :, at],
                keys[:, :, seen_from],
                values[:, :, seen_from],
                window,
                valid=None if seen is None else seen[:, seen_from],
                sink_logits=settings.sink_logits,
                sinks=None if sinks is None else (sinks[0], sinks[1], sinks[2] + start),
                need_lse="relative" if joint and spec.normalizer == "joint-max" else joint or holds,
                backend=spec.backend,
                **attended,
            )
            if holds:
                kept, kept_lse, memory, evicted = run(
                    attend_kept, rotated_q[:, :, at], keys, values, priority, before + start, memory, window, counts,
                    scores=None if past else scores, logits=logits, evict=evicts, **attended,
                )  # fmt: skip
                local, lse = add_kept(local, lse, kept, kept_lse)
        if settings.rest is not None and lse is not None:
            local, states = run(
                add_rest, local, lse, rotated_q[:, :, at], q[:, :, at], evicted, gate[:, :, at], states,
                *settings.rest, spec=spec, scaling=settings.scaling,
            )  # fmt: skip
        lse = lse if joint else None
        remembers = not spec.delayed or states is not None or before + start + rows > window
        if mix == 1 or (mix > 0 and remembers):
            entering = (k[:, :, at], v[:, :, at], None if valid is None else valid[:, at])
            if evicted is not None:
                entering = evicted[:3]
            elif spec.delayed:
                entering = leaving(keys, values, seen, before, start, rows, window, sinks)
            inputs = (q[:, :, at], *entering, gate[:, :, at], settings.key_map)
            recurrent, total, states = run(_recurrent, *inputs, spec, states)
        if output is None:
            output = _combine(recurrent, total, local, lse, mix, settings.scales).to(v.dtype).transpose(1, 2)
        else:
            _combine(recurrent, total, local, lse, mix, settings.scales, out=output[:, at].transpose(1, 2))
    if cache is not None:
        if settings.rest is not None and states is None:
            states = empty_rest(v, gate, spec)
        cache.states = states
        if holds:
            cache.kept = empty_memories(keys, values, counts, logits) if memory is None else memory
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


def by_documents(starts, tokens: Tokens, attend):
    """`attend` of every document by itself: state and window begin anew where `starts` ([B, T]) is true.

    Documents are taken out of the rows and run side by side, those of similar length together, so that less than half
    of what is computed is padding. No cache, no other padding.

    Args:
        attend: (Tokens) -> [B, T, Hq, D].
    Returns:
        [B, T, Hq, D].
    """
    batch, length = starts.shape
    first = starts.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([batch * length]))
    buckets = torch.ceil(torch.log2(lengths.float()))
    flat = tokens.changed(lambda x: x.transpose(1, 2).flatten(0, 1))
    places, outputs = [], []
    for bucket in buckets.unique():
        members = buckets == bucket
        offsets = torch.arange(int(lengths[members].max()), device=first.device)
        inside = offsets < lengths[members, None]
        index = torch.where(inside, first[members, None] + offsets, 0)
        # Padding comes behind each document, where nothing looks.
        output = attend(flat.changed(lambda x, index=index: x[index].transpose(1, 2)))
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
    if cache is not None:
        return cache.places(valid, like)
    return torch.arange(like.shape[2], device=like.device)[None] if valid is None else valid.cumsum(1) - 1


def _sinks(k, v, valid, cache, count: int):
    """Keys and values of the first tokens, and how far each lies before the first query (see `window_attention`)."""
    places = _places(valid, cache, k[..., 0])
    first = places[:, -1:] - places.shape[1] + 1  # of the first query, if there were no padding behind it
    places = places.expand(len(k), -1) if valid is None else places.masked_fill(~valid, LigerCacheLayer.EMPTY)
    if cache is not None:
        keys, values, places = cache.update_sinks(k, v, places)
    else:
        keys, values, places = first_tokens(k, v, places, count)
    return keys, values, torch.where(places >= 0, first - places, LigerCacheLayer.EMPTY)
