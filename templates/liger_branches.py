"""The two branches of Liger attention and their sum (arXiv 2503.01496, eq. 9): o = mix * GRM + (1 - mix) * SWA."""

import math
from dataclasses import dataclass, fields, replace

import numpy
import torch
from torch.utils.checkpoint import checkpoint

from .liger_backend import flash_window, on_cuda, recurrence, takes_documents
from .liger_cache import LigerCacheLayer, appended, first_tokens
from .liger_config import LayerSpec
from .liger_gates import GATES, feature_width
from .liger_kept import BLOCK, EMPTY, Stream, add_kept, attend_kept, empty_memories, priorities
from .liger_rest import add_rest, chosen_heads, counted_states, empty_rest, state_counts, step_rest
from .liger_spans import attend_by_spans
from .liger_step import (
    evicted_so_far,
    exact_attention,
    exact_scores,
    once,
    replace_token,
    sink_rows,
    weighted_values,
)
from .liger_window import Scoring, by_heads, flash_documents, leaving, reach, softmax_weights, window_attention

# Tokens worked through at a time when no gradient is wanted: both branches of a piece stay in the CPU's caches. A GPU
# has no use for small pieces; there they only bound the memory.
PIECE_SIZE = 2048
CUDA_PIECE_SIZE = 16384
VARIED = "flash_attn_varlen_func"  # of flash-attn, for documents of any length one behind another


@dataclass(frozen=True)
class Tokens:
    """What a layer's attention reads of T new tokens.

    Attributes:
        q: [B, Hq, T, F] and k: [B, Hkv, T, F], read by the recurrence; F is D in k where there is a `key_map`. With a
            rest state q is the query before RoPE.
        v: [B, Hkv, T, D].
        rotated_q: [B, Hq, T, D] and rotated_k: [B, Hkv, T, D], after RoPE, read by the window.
        gate: [B, Hkv, T, W], the gate's logits; [B, Hq, T, W] where query heads of a group differ; or None where
            nothing reads them.
        scores: [B, Hkv, T, 1], by which tokens are kept (see `liger_kept`), or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rotated_q: torch.Tensor
    rotated_k: torch.Tensor
    gate: torch.Tensor | None
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
        scoring: of the window and of what is kept.
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
    scoring: Scoring
    scales: tuple | None = None
    key_map: torch.Tensor | None = None
    rest: tuple | None = None
    local_window: int | None = None
    recompute: bool = False

    def of_heads(self, spec: LayerSpec, queries) -> "Settings":
        """Those of some query heads; spec is that of their key/value heads."""
        pick = lambda x: None if x is None else x[queries]  # noqa: E731
        pair = lambda x: None if x is None else tuple(map(pick, x))  # noqa: E731
        own = {"scoring": self.scoring.of_heads(queries), "key_map": pick(self.key_map)}
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
    past = cache is not None and cache.is_initialized
    if past and length == 0:
        return v.new_zeros(v.shape[0], 0, rotated_q.shape[1], v.shape[-1])
    if past and length == 1 and not torch.is_grad_enabled() and not settings.scoring.dropout:
        return step_attention(tokens, settings, valid, cache)
    counts = tuple(count + spec.sinks for count in spec.kept_by_head(heads))
    holds = tokens.scores is not None or settings.rest is not None
    sinks = memory = priority = logits = scores = None
    keys, values, seen, read = tokens.rotated_k, v, valid, None
    if past:
        read = cache.advance(length, valid)["read"]
        (*held, logits), sinks, memory = cache.recall(read)
    places = _places(valid, read, length, v.device)
    if holds:
        scores = v.new_zeros(v.shape[:3], dtype=torch.float32) if tokens.scores is None else tokens.scores.squeeze(-1)
        priority = priorities(scores, places, spec.sinks, valid)
        priority = priority.expand(len(v), -1, -1)
        before_logits, logits = logits, None
        if settings.rest is not None and not GATES[spec.gate].fixed:
            logits = gate.squeeze(-1)
    elif spec.sinks and mix < 1:
        sinks = _sinks(tokens.rotated_k, v, places, valid, sinks, spec.sinks)
    if past:
        keys_before, values_before, there, priority_before = held
        there = None if there.device.type == "cpu" and there.all() else there
        before = (keys_before, values_before, priority_before, before_logits if holds else None)
        (keys, values, priority, logits), seen = appended(before, (keys, values, priority, logits), there, valid)
    states = cache.states if past else None
    if states is not None and settings.rest is not None:
        states = counted_states(states, read, cache.sizes, spec)
    joint = spec.joint and mix > 0
    evicts = settings.rest is not None or (spec.delayed and mix > 0)
    whole = not past and length <= window and within_window is not None and (spec.delayed or not joint)
    size = CUDA_PIECE_SIZE if v.is_cuda else PIECE_SIZE
    if torch.is_grad_enabled() or whole or (mix == 0 and not holds):
        size = length
    run = _twice if settings.recompute and torch.is_grad_enabled() else _once
    output = _empty_output(v, (q.shape[0], length, q.shape[1], v.shape[-1])) if length > size else None
    before = keys.shape[2] - length
    stream = Stream(keys, values, priority, None if past else scores, logits) if holds else None
    for start in range(0, max(length, 1), max(size, 1)):
        at = slice(start, start + size)
        recurrent = local = total = lse = evicted = None
        rows = min(size, length - start)
        if whole:
            local = within_window()
        elif window == 0 and mix < 1:
            local = torch.zeros_like(rotated_q)
        elif holds and rows > BLOCK and by_heads(rotated_q):
            local, lse, memory, evicted = attend_by_spans(
                rotated_q[:, :, at], stream, before + start, memory, window, counts, settings.scoring, valid=seen,
                evict=evicts, need_lse=joint or settings.rest is not None,
            )  # fmt: skip
        elif mix < 1:
            seen_from = slice(max(before + start - reach(window), 0), before + start + size)
            local, lse = run(
                window_attention,
                rotated_q[:, :, at],
                keys[:, :, seen_from],
                values[:, :, seen_from],
                window,
                settings.scoring,
                valid=None if seen is None else seen[:, seen_from],
                sinks=None if sinks is None else (sinks[0], sinks[1], sinks[2] + start),
                need_lse="relative" if joint and spec.normalizer == "joint-max" else joint or holds,
                backend=spec.backend,
            )
            if holds:
                kept, kept_lse, memory, evicted = run(
                    attend_kept, rotated_q[:, :, at], stream, before + start, memory, window, counts, settings.scoring,
                    evict=evicts,
                )  # fmt: skip
                local, lse = add_kept(local, lse, kept, kept_lse)
        if settings.rest is not None and lse is not None:
            local, states = run(
                add_rest, local, lse, rotated_q[:, :, at], q[:, :, at], evicted,
                None if gate is None else gate[:, :, at], states,
                *settings.rest, spec=spec, scaling=settings.scoring.scaling,
            )  # fmt: skip
        lse = lse if joint else None
        remembers = not spec.delayed or states is not None or before + start + rows > window
        if mix > 0 and (remembers or cache is not None):
            entering = (k[:, :, at], v[:, :, at], None if valid is None else valid[:, at])
            if evicted is not None:
                entering = evicted[:3]
            elif spec.delayed:
                entering = leaving(keys, values, seen, before, start, rows, window, sinks)
            inputs = (q[:, :, at], *entering, gate[:, :, at], settings.key_map)
            recurrent, total, states = run(_recurrent, *inputs, spec, states)
            recurrent = recurrent if remembers else None
        if output is None:
            output = _combine(recurrent, total, local, lse, mix, settings.scales).to(v.dtype).transpose(1, 2)
        else:
            _combine(recurrent, total, local, lse, mix, settings.scales, out=output[:, at].transpose(1, 2))
    if cache is not None:
        if not past:
            cache.lazy_initialization(tokens.rotated_k, v, rotated_q.shape[1])
            cache.advance(length, valid)
        if settings.rest is not None and states is None:
            states = empty_rest(v, gate, spec)
        cache.keep_states(states)
        if holds and memory is None:
            memory = empty_memories(keys, values, counts, logits)
        cache.store(keys, values, seen, priority, logits, sinks, memory)
    return output


def step_attention(tokens: Tokens, settings: Settings, valid, cache: LigerCacheLayer):
    """`mixed_attention` of one token behind others, without gradients."""
    spec, mix = settings.spec, settings.mix
    q, v, rest = tokens.rotated_q, tokens.v, settings.rest
    shared = cache.advance(1, valid)
    delayed = spec.delayed and mix > 0
    evicted = local = lse = recurrent = total = None
    if cache.layout.slots:
        evicted, logits = replace_token(tokens, spec, valid, cache, shared, delayed or rest is not None)
    if mix > 0:
        entering = (tokens.k, v, valid)
        if delayed:
            entering = (evicted[:, :, :1], evicted[:, :, 1:], evicted_so_far(cache, shared, valid).unsqueeze(2))
        inputs = (tokens.q, *entering, tokens.gate, settings.key_map)
        recurrent, total, states = _recurrent(*inputs, spec, cache.states)
        cache.keep_states(states, moved=True)
    if rest is not None:
        local = _with_rest(tokens, settings, evicted, logits, valid, cache, shared)
    elif mix < 1 and not cache.layout.slots:
        local = torch.zeros_like(q, dtype=torch.float32)
    elif mix < 1:
        joint = spec.joint and mix > 0
        need = "relative" if joint and spec.normalizer == "joint-max" else joint
        local, lse = exact_attention(q, cache, shared, settings.scoring, need)
        lse = lse if joint else None
    return _combine(recurrent, total, local, lse, mix, settings.scales).to(v.dtype).transpose(1, 2)


def _with_rest(tokens: Tokens, settings: Settings, evicted, logits, valid, cache: LigerCacheLayer, shared: dict):
    """One softmax over the visible tokens and the rest state, for one token. [B, Hq, 1, D] float32"""
    spec, scaling, q = settings.spec, settings.scoring.scaling, tokens.rotated_q
    fades = GATES[spec.gate].fades
    evicts = evicted_so_far(cache, shared, valid) if fades or valid is not None else None
    batch, kv_heads = evicted.shape[:2]
    grouped = (batch, kv_heads, -1, evicted.shape[-1])
    queries = [x.reshape(grouped) for x in (q, tokens.q)]
    flags, each = spec.rest_by_head(kv_heads), queries[0].shape[2]
    heads, counted = chosen_heads(flags, q.device), None
    if not fades:

        def counts():
            sizes = cache.sizes if heads is None else cache.sizes[heads]
            return state_counts((cache.tokens.unsqueeze(1) - sizes)[:, :, None, None].float(), each, scaling)

        counted = once(shared, f"counts {cache.window} {cache.beyond} {flags} {each} {scaling}", counts)
    decays = (tokens.gate if logits is None else logits.unsqueeze(-1)) if fades else None
    output, rest_lse = step_rest(
        *queries, evicted, evicts, decays, cache.states[0], *settings.rest, spec, scaling, heads, counted
    )
    output, rest_lse = (x.view(batch, -1, each, x.shape[-1]) for x in (output, rest_lse))
    scores = exact_scores(q, cache, shared, settings.scoring)
    if heads is not None:
        # Written over by every layer with the same heads.
        lowest = torch.finfo(torch.float32).min
        every = lambda: rest_lse.new_full((batch, kv_heads, each, 1), lowest)  # noqa: E731
        every = once(shared, f"none of {flags} {each}", every)
        every[:, heads] = rest_lse
        rest_lse = every
    scores = torch.cat([scores, rest_lse.view(*scores.shape[:2], 1)], dim=2)
    weights, _ = softmax_weights(scores, sink_rows(settings.scoring.sink_logits, scores), False, 0.0)
    local = weighted_values(weights[..., :-1], cache).view(*grouped[:2], -1, grouped[-1])
    share = weights[..., -1:].reshape(*grouped[:2], -1, 1)
    if heads is None:
        local.addcmul_(share, output)
    elif isinstance(heads, slice):
        local[:, heads].addcmul_(share[:, heads], output)
    else:
        local.index_add_(1, heads, share[:, heads] * output)
    return local.view(q.shape)


def _once(function, *args, **settings):
    return function(*args, **settings)


def _twice(function, *args, **settings):
    """The function's value; what it computes on the way is forgotten, and computed again where backward needs it."""
    random = any(isinstance(one, Scoring) and one.dropout > 0 for one in args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **settings)


def _empty_output(like, shape: tuple[int, ...]):
    """An uninitialised tensor. On a CPU in numpy's memory, which asks Linux for huge pages: a long text's output is
    written once, and three quarters of that time would go into faults of small pages."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    memory = numpy.empty(math.prod(shape) * like.element_size(), numpy.uint8)
    memory[:: 1 << 21] = memory[-1:] = 0  # each is faulted in by one thread: two at once hold each other up
    return torch.from_numpy(memory).view(like.dtype).view(shape)


def by_documents(documents: list[tuple], tokens: Tokens, attend):
    """`attend` of every document by itself: state and window begin anew with each. No cache, no other padding.

    Args:
        documents: of `liger_rows.documents`.
        attend: (Tokens) -> [B, T, Hq, D].
    Returns:
        [B, T, Hq, D].
    """
    batch, _, length = tokens.v.shape[:3]
    flat = tokens.changed(lambda x: x.transpose(1, 2).flatten(0, 1))
    *buckets, order = documents
    # Padding comes behind each document, where nothing looks.
    outputs = [
        attend(flat.changed(lambda x, index=index: x[index].transpose(1, 2))).flatten(0, 1)[inside]
        for index, inside in buckets
    ]
    return torch.cat(outputs)[order].unflatten(0, (batch, length))


def kernels_take_documents(tokens: Tokens, settings: Settings) -> bool:
    """Whether `packed_attention` can be used: fla and flash-attn are there, and what a layer's window and recurrence do
    is all that these know of."""
    spec, q = settings.spec, tokens.rotated_q
    simple = tokens.scores is None and settings.rest is None and settings.scoring.sink_logits is None
    if not on_cuda(q) or not simple or spec.sinks or (spec.joint and settings.mix > 0):
        return False
    windowed = settings.mix < 1 and settings.window > 0
    if windowed and flash_window(q, q.shape[-1], spec.backend, VARIED) is None:
        return False
    width = feature_width(spec, q.shape[-1])
    return settings.mix == 0 or takes_documents(GATES[spec.gate].rule, width, spec.slots, spec.backend)


def packed_attention(tokens: Tokens, settings: Settings, bounds):
    """Both branches over packed documents, in one call of each kernel, which is told where documents begin. No cache.

    Args:
        bounds: of `liger_rows.document_bounds`.
    Returns:
        [B, T, Hq, D] in v's dtype.
    """
    batch, _, length = tokens.v.shape[:3]
    flat = tokens.changed(lambda x: x.transpose(0, 1).flatten(1, 2).unsqueeze(0))
    spec, window, mix = settings.spec, settings.window, settings.mix
    run = _twice if settings.recompute and torch.is_grad_enabled() else _once
    q, k, v = flat.rotated_q, flat.rotated_k, flat.v
    recurrent = total = local = None
    if window == 0 and mix < 1:
        local = torch.zeros_like(q)
    elif mix < 1:
        function = flash_window(q, q.shape[-1], spec.backend, VARIED)
        local = flash_documents(function, q, k, v, window, settings.scoring, bounds, length)
    if mix > 0:
        inputs = (flat.q, flat.k, v, None, flat.gate, settings.key_map)
        recurrent, total, _ = run(_recurrent, *inputs, spec, None, bounds=bounds)
    output = _combine(recurrent, total, local, None, mix, settings.scales).to(v.dtype)
    return output.squeeze(0).transpose(0, 1).unflatten(0, (batch, length))


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


def _recurrent(q, k, v, valid, gate_logits, key_map, spec, states, bounds=None):
    """The gated recurrence in float32: query t reads the state once k and v of row t are in it.

    bounds: as of `liger_backend.recurrence`.

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
    output, states = recurrence(gate.rule, inputs, states, spec.backend, dtype, bounds)
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


def _places(valid, read, length: int, device):
    """Which tokens of the text these are, padding aside, [B or 1, T]; what it says of padding has no meaning.

    valid: [B, T] or None. read: [B], tokens before, or None.
    """
    places = torch.arange(length, device=device)[None] if valid is None else valid.cumsum(1) - 1
    return places if read is None else places + read.unsqueeze(1)


def _sinks(k, v, places, valid, sinks, count: int):
    """Keys and values of the first tokens, and how far each lies before the first query (see `window_attention`).

    sinks: those so far, as `liger_memory.from_ring` gives them, or None.
    """
    first = places[:, -1:] - places.shape[1] + 1  # of the first query, if there were no padding behind it
    places = places.expand(len(k), -1) if valid is None else places.masked_fill(~valid, EMPTY)
    found = (k, v, places)
    if sinks is not None:
        found = [torch.cat(both, dim=-1 if both[0].ndim == 2 else 2) for both in zip(sinks, found, strict=True)]
    keys, values, places = first_tokens(*found, count)
    return keys, values, torch.where(places >= 0, first - places, EMPTY)
