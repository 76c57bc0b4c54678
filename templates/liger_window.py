"""Sliding-window attention, block by block: time and memory O(T w), never a T x T mask.

Queries are cut into blocks; a block of c queries attends to the key blocks that hold its own c tokens and the w - 1
before them. The query heads of a group are stacked into the rows of a block, so keys are never repeated.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .liger_backend import flash_window

# Queries worked through at a time when no gradient is wanted: their scores stay in the CPU's caches.
PIECE_SIZE = 2048
CUDA_PIECE_SIZE = 16384
# Queries in a block where a query head is multiplied by itself: of 16 + 64 keys a window of 64 leaves four fifths.
ROWS_OF_HEAD = 16
FIRST = 64  # queries in a block at the start of the text


@dataclass(frozen=True)
class Scoring:
    """How the products of queries and keys become weights, as the family has it.

    Attributes:
        scaling: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sink_logits: [Hq] learned logits that take part in the softmax's denominator only (GPT-OSS).
        dropout: probability of dropping a softmax weight.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    dropout: float = 0.0

    def of_heads(self, queries) -> "Scoring":
        """That of some query heads."""
        return self if self.sink_logits is None else replace(self, sink_logits=self.sink_logits[queries])

    def logits(self, products):
        """Products of queries and keys, scaled and soft-capped."""
        if self.softcap is None:
            return products * self.scaling
        return soft_capped(products, 0.0, self.scaling, self.softcap)


def window_attention(
    q, k, v, window: int, scoring: Scoring, valid=None, sinks=None, need_lse: bool | str = False, backend: str = "auto"
):
    """Causal softmax attention over the last `window` tokens, the token itself included (Liger, eq. 8).

    Args:
        q: [B, Hq, T, D], the last T of the S = P + T tokens whose keys are given.
        k, v: [B, Hkv, S, D]; the P past tokens first.
        window: tokens visible to a query, itself included; at least 1.
        valid: [B, S] bool, false at padding; None where there is none.
        sinks: (keys, values, age) of the first tokens of the text, [B, Hkv, N, D] twice and [B, N] int: how far each
            lies before query 0, hugely negative where the slot is empty. Visible once they have left the window.
        need_lse: also return the log of the softmax's denominator, in float32 or better; `relative` returns that of
            its sum of exp(s - max s).
        backend: `torch` keeps flash-attn out; else it is used where it can be (see `liger_backend.flash_window`).
    Returns:
        o [B, Hq, T, D] in q's dtype, and lse [B, Hq, T] or None.
    """
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if q.numel() == 0:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32) if need_lse else None
    if valid is None and sinks is None and scoring.sink_logits is None and not need_lse:
        flash = flash_window(q, q.shape[-1], backend)
        if flash is not None:
            return _flash(flash, q, k, v, window, scoring), None
    # float16 never goes to torch's attention: scores may be larger than what its lowest number, as a bias, could hide.
    explicit = q.dtype == torch.float16 or (q.device.type == "cpu" and q.dtype != torch.bfloat16)
    explicit = explicit or scoring.softcap is not None or scoring.sink_logits is not None or need_lse
    block = _block(window)
    if explicit and sinks is None and by_heads(q):
        block = min(block, ROWS_OF_HEAD)
    back = whole_blocks(window, block) // block
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    piece = length if needs_grad else max(1, (CUDA_PIECE_SIZE if q.is_cuda else PIECE_SIZE) // block)
    outputs, denominators = [], []
    for start, blocks, rows in segments(length, past, block, back, piece):
        last = past + start + blocks * rows
        first = max(past + start - back * block, 0)
        o, lse = _attend(
            q[:, :, start : start + blocks * rows],
            k[:, :, first:last],
            v[:, :, first:last],
            blocks,
            window,
            scoring,
            None if valid is None else valid[:, first:last],
            None if sinks is None else (sinks[0], sinks[1], sinks[2] + start),
            need_lse,
            explicit,
        )
        outputs.append(o)
        denominators.append(lse)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return o, torch.cat(denominators, dim=2) if need_lse else None


def _flash(function, q, k, v, window, scoring):
    """flash-attn's kernel, [B, T, H, D]: it shares keys among query heads, and counts the window from the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return function(q, k, v, **_flash_settings(window, scoring)).transpose(1, 2)


def flash_documents(function, q, k, v, window: int, scoring: Scoring, bounds, longest: int):
    """The window in documents one behind another, by flash-attn's kernel, which is told where they begin.

    Args:
        q: [1, Hq, T, D]. k, v: [1, Hkv, T, D]. bounds: [N + 1], where documents begin, and the end.
        longest: no document has more tokens.
    """
    bounds = bounds.to(torch.int32)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    o = function(q, k, v, bounds, bounds, longest, longest, **_flash_settings(window, scoring))
    return o.transpose(0, 1).unsqueeze(0)


def _flash_settings(window: int, scoring: Scoring) -> dict:
    return {
        "dropout_p": scoring.dropout,
        "softmax_scale": scoring.scaling,
        "causal": True,
        "window_size": (window - 1, 0),
        "softcap": scoring.softcap or 0.0,
    }


def _block(window: int) -> int:
    return min(max(window, 32), 128)


def reach(window: int) -> int:
    """Past tokens that whole blocks of queries are given: those the window sees, rounded up to blocks."""
    return whole_blocks(window, _block(window))


def leaving(keys, values, valid, past: int, start: int, rows: int, window: int, sinks=None):
    """The tokens that leave the window, one a query: behind the one that leaves before query i, no query from i on
    sees it in the window.

    Args:
        keys, values: [B, Hkv, P + T, D], P = `past` tokens before query 0. valid: [B, P + T] bool or None.
        start, rows: for the queries from `start` on.
        sinks: as `window_attention` takes them; they never leave.
    Returns:
        keys and values [B, Hkv, rows, D], and [B, rows] bool, false where no token leaves; None where all do.
    """
    first = past + start - window
    missing = min(max(-first, 0), rows)
    at = slice(first + missing, first + rows)
    keys, values = (torch.nn.functional.pad(x[:, :, at], (0, 0, missing, 0)) for x in (keys, values))
    if valid is None and sinks is None and not missing:
        return keys, values, None
    there = torch.ones_like(keys[:, 0, missing:, 0], dtype=torch.bool) if valid is None else valid[:, at]
    there = torch.nn.functional.pad(there, (missing, 0), value=False)
    if sinks is not None:
        age = torch.arange(window - start, window - start - rows, -1, device=there.device)
        there = there & ~(sinks[2].unsqueeze(2) == age).any(1)
    return keys, values, there


def whole_blocks(window: int, block: int) -> int:
    return -(-(window - 1) // block) * block


def segments(length: int, past: int, block: int, back: int, piece: int):
    """Cut T queries into (start, blocks, rows a block): whole blocks with all their past in batches of at most `piece`,
    those at the start of the text, which have less past, and the last, shorter one, alone."""
    start = 0
    while start < length and (past + start < back * block or length - start < block):
        rows = min(max(block, FIRST), length - start)
        yield start, 1, rows
        start += rows
    while start < length:
        blocks = min(piece, (length - start) // block)
        if blocks == 0:
            yield start, 1, length - start
            return
        yield start, blocks, block
        start += blocks * block


def _attend(q, k, v, blocks, window, scoring, valid, sinks, need_lse, explicit):
    """Blocks of one size; the keys are those of the blocks and of what lies before the first of them."""
    batch, kv_heads, _, dim = k.shape
    groups, rows = q.shape[1] // kv_heads, q.shape[2] // blocks
    back = (k.shape[2] - blocks * rows) // rows if blocks > 1 else 0
    if explicit and q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    if explicit and sinks is None and blocks > 1 and by_heads(q):
        return _attend_by_heads(q, k, v, blocks, window, scoring, valid, need_lse)
    q = q.reshape(batch, kv_heads, groups, blocks, rows, dim).transpose(2, 3)
    q = q.reshape(batch, kv_heads, blocks, groups * rows, dim)
    k, v = (_with_past(x, blocks, back) for x in (k, v))
    bias = _band(groups, rows, k.shape[3], window, q.dtype, q.device)
    if valid is not None:
        there = _with_past(valid[:, None, :, None], blocks, back)[..., 0].unsqueeze(3)
        bias = bias.masked_fill(~there, torch.finfo(q.dtype).min)
    if sinks is not None:
        k, v, bias = _append_sinks(k, v, bias, sinks, groups, rows, window)
    if explicit:
        o, lse = _explicit(q, k, v, bias, scoring, groups, need_lse)
    else:
        o, lse = _fused(q, k, v, bias, scoring), None
    o = o.view(batch, kv_heads, blocks, groups, rows, dim).transpose(2, 3)
    if lse is not None:
        lse = lse.view(batch, kv_heads, blocks, groups, rows).transpose(2, 3).reshape(batch, -1, blocks * rows)
    return o.reshape(batch, kv_heads * groups, blocks * rows, dim), lse


def _attend_by_heads(q, k, v, blocks, window, scoring, valid, need_lse):
    """`_attend` for every query head by itself, on overlapping views of the keys and values: nothing is copied."""
    rows = q.shape[2] // blocks
    size = k.shape[2] - (blocks - 1) * rows
    blocked = q.unflatten(2, (blocks, rows))
    k, v = (x.unfold(2, size, rows) for x in (k, v))  # [B, Hkv, N, D, S]
    scores = near_scores(blocked, k, window, scoring, valid)
    logits = None if scoring.sink_logits is None else scoring.sink_logits.to(scores.dtype).view(1, -1, 1, 1)
    weights, lse = softmax_weights(scores, logits, need_lse, scoring.dropout)
    o = _products(weights.to(v.dtype), v.mT)
    return o.view(q.shape), None if lse is None else lse.flatten(2)


def near_scores(q, k, window: int, scoring: Scoring, valid=None, out=None):
    """Scores of blocks of queries with the keys that lie near them; what is outside of the window is lowest.

    Args:
        q: [B, Hq, N, c, D]. k: [B, Hkv, N, D, S], overlapping views; the queries are the last of their block's S.
        valid: [B, (N - 1) * c + S] bool, false at padding; None where there is none.
        out: [B, Hq, N, c, S], written to and returned where it is given.
    """
    rows, size = q.shape[3], k.shape[4]
    bias = _band(1, rows, size, window, q.dtype, q.device)
    if valid is not None:
        there = valid.unfold(1, size, rows)[:, None, :, None]
        bias = bias.masked_fill(~there, torch.finfo(q.dtype).min)
    scores = _products(q, k)
    out = scores if out is None else out
    if scoring.softcap is None:
        return torch.add(bias, scores, alpha=scoring.scaling, out=out)
    return out.copy_(soft_capped(scores, bias, scoring.scaling, scoring.softcap))


def by_heads(x) -> bool:
    """Whether query heads are multiplied one by one: on a CPU without gradients, where views then do."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def _products(a, b):
    """Each query head's product with what its group shares. a [B, Hq, N, M, K], b [B, Hkv, N, K, S]"""
    groups = a.shape[1] // b.shape[1]
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for lefts, rights, targets in zip(a, b, out, strict=True):
        for head, (left, target) in enumerate(zip(lefts, targets, strict=True)):
            torch.bmm(left, rights[head // groups], out=target)
    return out


def _with_past(x, blocks: int, back: int):
    """Blocks of keys behind the `back` blocks before each. [B, H, (N + back) * c, D] -> [B, H, N, (1 + back) * c, D]"""
    if blocks == 1:
        return x.unsqueeze(2)
    x = x.unflatten(2, (blocks + back, -1))
    return torch.cat([x[:, :, first : first + blocks] for first in range(back + 1)], dim=3)


@lru_cache(maxsize=256)
def _band(groups: int, rows: int, keys: int, window: int, dtype, device):
    """0 where a query may look, else the dtype's lowest; the queries are the last of the keys. [1, 1, 1, G * c, S]"""
    with torch.inference_mode(False):
        row = torch.arange(keys - rows, keys)[:, None]
        column = torch.arange(keys)
        hidden = (column > row) | (column <= row - window)
        bias = torch.zeros(rows, keys, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        return bias.repeat(groups, 1)[None, None, None].to(device)


def _append_sinks(k, v, bias, sinks, groups, rows, window):
    sink_k, sink_v, age = sinks
    batch, _, blocks = k.shape[:3]
    query = torch.arange(blocks * rows, device=age.device).view(1, blocks, rows, 1)
    hidden = (age[:, None, None, :] + query < window).repeat(1, 1, groups, 1).unsqueeze(1)
    sink_bias = torch.zeros_like(hidden, dtype=bias.dtype).masked_fill(hidden, torch.finfo(bias.dtype).min)
    k, v = (
        torch.cat([x, sink.to(x.dtype).unsqueeze(2).expand(-1, -1, blocks, -1, -1)], dim=3)
        for x, sink in ((k, sink_k), (v, sink_v))
    )
    return k, v, torch.cat([bias.expand(batch, 1, blocks, *bias.shape[3:]), sink_bias], dim=4)


def _fused(q, k, v, bias, scoring):
    """torch's attention, with the blocks as a batch."""
    shape = q.shape
    bias = bias.expand(shape[0], 1, shape[2], shape[3], k.shape[3])
    q, k, v, bias = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, bias))
    attend = torch.nn.functional.scaled_dot_product_attention
    o = attend(q, k, v, attn_mask=bias, scale=scoring.scaling, dropout_p=scoring.dropout)
    return o.unflatten(0, (shape[0], shape[2])).transpose(1, 2).reshape(shape)


def _explicit(q, k, v, bias, scoring, groups, need_lse):
    """Scores and softmax in float32 or better, spelt out: what torch's attention cannot do, or slower (a CPU)."""
    shape = (*q.shape[:-1], k.shape[-2])
    if scoring.softcap is None:
        bias = bias.expand(shape).reshape(-1, *shape[3:]) if bias.shape[0] * bias.shape[2] > 1 else bias.view(shape[3:])
        scores = torch.baddbmm(bias, q.flatten(0, 2), k.flatten(0, 2).transpose(-1, -2), alpha=scoring.scaling)
        scores = scores.view(shape)
    else:
        scores = soft_capped(q @ k.transpose(-1, -2), bias, scoring.scaling, scoring.softcap)
    logits = None
    if scoring.sink_logits is not None:
        logits = scoring.sink_logits.to(scores.dtype).view(1, k.shape[1], 1, groups, 1)
        logits = logits.expand(-1, -1, -1, -1, shape[3] // groups).reshape(1, k.shape[1], 1, -1)
    weights, lse = softmax_weights(scores, logits, need_lse, scoring.dropout)
    return weights.to(v.dtype) @ v, lse


def soft_capped(scores, bias, scaling, softcap):
    """softcap * tanh(scores * scaling / softcap) + bias (Gemma 2)."""
    return (scores * (scaling / softcap)).tanh() * softcap + bias


def log_denominator(scores, weights):
    """Log of the denominator of weights = softmax(scores), over the last dimension.

    From the largest of both: logsumexp would take exponentials of what is hidden, and of numbers that underflow a CPU
    (MKL) takes them at a hundredth of its usual speed.
    """
    return _LogDenominator.apply(scores, weights)


class _LogDenominator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, weights):
        ctx.save_for_backward(weights)
        return scores.amax(-1) - weights.amax(-1).log()

    @staticmethod
    def backward(ctx, gradient):
        (weights,) = ctx.saved_tensors
        return gradient.unsqueeze(-1) * weights, None


def softmax_weights(scores, sink_logits, need_lse, dropout):
    """Softmax weights, and the log of their denominator or None. sink_logits broadcast to the scores' rows, or None.

    The scores may be written over.
    """
    weights, lse = softmax_with_denominator(scores, need_lse is True or sink_logits is not None)
    if sink_logits is not None:
        weights = weights * (lse - sink_logits).sigmoid().unsqueeze(-1)
        lse = torch.logaddexp(lse, sink_logits)
    if need_lse == "relative":
        lse = -weights.amax(-1).log()
    if dropout > 0:
        weights = torch.nn.functional.dropout(weights, dropout)
    return weights, lse


def softmax_with_denominator(scores, need_lse: bool = True):
    """softmax(scores) and `log_denominator` of it or None; in the scores' place on a CPU without gradients, where new
    memory costs a fault for every page."""
    if not by_heads(scores):
        weights = scores.softmax(-1)
        return weights, log_denominator(scores, weights) if need_lse else None
    lse = scores.amax(-1) if need_lse else None
    weights = torch.softmax(scores, -1, out=scores)
    return weights, lse.sub_(weights.amax(-1).log_()) if need_lse else None
