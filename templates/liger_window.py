"""Sliding-window attention, block by block: time and memory O(T w), never a T x T mask.

Queries are cut into blocks; a block of c queries attends to the key blocks that hold its own c tokens and the w - 1
before them. The query heads of a group are stacked into the rows of a block, so keys are never repeated.
"""

import torch

# Queries worked through at a time when no gradient is wanted: their scores stay in the CPU's caches.
PIECE_SIZE = 4096


def window_attention(
    q, k, v, window: int, scaling: float, valid=None, softcap=None, sink_logits=None, sinks=None, need_lse: bool = False
):
    """Causal softmax attention over the last `window` tokens, the token itself included (Liger, eq. 8).

    Args:
        q: [B, Hq, T, D], the last T of the S = P + T tokens whose keys are given.
        k, v: [B, Hkv, S, D]; the P past tokens first.
        window: tokens visible to a query, itself included; at least 1.
        scaling: factor of the scores, the family's own.
        valid: [B, S] bool, false at padding; None where there is none.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sink_logits: [Hq] learned logits that take part in the softmax's denominator only (GPT-OSS).
        sinks: (keys, values, age) of the first tokens of the text, [B, Hkv, N, D] twice and [B, N] int: how far each
            lies before query 0, hugely negative where the slot is empty. Visible once they have left the window.
        need_lse: also return the log of the softmax's denominator, float32.
    Returns:
        o [B, Hq, T, D] in q's dtype, and lse [B, Hq, T] or None.
    """
    length = q.shape[2]
    block = min(max(window, 32), 128)
    blocks = -(-length // block)
    back = -(-(window - 1) // block)
    past = k.shape[2] - length
    left, right = back * block - past, blocks * block - length
    q = torch.nn.functional.pad(q, (0, 0, 0, right))
    k, v = (torch.nn.functional.pad(x, (0, 0, left, right)) for x in (k, v))
    if valid is not None:
        valid = torch.nn.functional.pad(valid, (left, right), value=False)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    step = blocks if needs_grad else max(1, PIECE_SIZE // block)
    outputs, denominators = [], []
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        rows = slice(first * block, last * block)
        keys = slice(first * block, (last + back) * block)
        o, lse = _attend(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], block, back, window, scaling,
            None if valid is None else valid[:, keys], left - first * block,
            softcap, sink_logits, sinks, first * block, need_lse,
        )  # fmt: skip
        outputs.append(o)
        denominators.append(lse)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    lse = torch.cat(denominators, dim=2)[:, :, :length] if need_lse else None
    return o[:, :, :length], lse


def _attend(q, k, v, block, back, window, scaling, valid, missing, softcap, sink_logits, sinks, offset, need_lse):
    """Whole blocks. The first `missing` of the keys do not exist; query 0 here is query `offset` of the caller."""
    batch, kv_heads, _, dim = k.shape
    groups, blocks = q.shape[1] // kv_heads, q.shape[2] // block
    q = q.view(batch, kv_heads, groups, blocks, block, dim).transpose(2, 3)
    q = q.reshape(batch, kv_heads, blocks, groups * block, dim)
    k, v = (_with_past(x, block, back) for x in (k, v))
    mask = _mask(block, back, window, blocks, valid, missing, q.device)
    if sinks is not None:
        sink_k, sink_v, age = sinks
        k = torch.cat([k, sink_k.unsqueeze(2).expand(-1, -1, blocks, -1, -1)], dim=3)
        v = torch.cat([v, sink_v.unsqueeze(2).expand(-1, -1, blocks, -1, -1)], dim=3)
        mask = torch.cat(
            [mask.expand(batch, -1, blocks, -1, -1), _sink_mask(age, blocks, block, window, offset)], dim=4
        )
    if softcap is None and sink_logits is None and not need_lse:
        o = _fused(q, k, v, mask.repeat(1, 1, 1, groups, 1), scaling)
        lse = None
    else:
        o, lse = _explicit(q, k, v, mask.repeat(1, 1, 1, groups, 1), scaling, softcap, sink_logits, block)
        lse = lse.view(batch, kv_heads, blocks, groups, block).transpose(2, 3).reshape(batch, -1, blocks * block)
    o = o.view(batch, kv_heads, blocks, groups, block, dim).transpose(2, 3)
    return o.reshape(batch, kv_heads * groups, blocks * block, dim), lse


def _with_past(x, block: int, back: int):
    """Blocks of keys behind the `back` blocks before each. [B, H, (N + back) * c, D] -> [B, H, N, (1 + back) * c, D]"""
    x = x.unflatten(2, (-1, block))
    count = x.shape[2] - back
    return torch.cat([x[:, :, first : first + count] for first in range(back + 1)], dim=3)


def _mask(block, back, window, blocks, valid, missing, device):
    """True where a query may look. [1 or B, 1, 1 or N, c, (1 + back) * c]"""
    row = torch.arange(block, device=device)[:, None] + back * block
    column = torch.arange((back + 1) * block, device=device)
    band = (column <= row) & (column > row - window)
    if missing > 0:
        exists = torch.arange((blocks + back) * block, device=device)[None] >= missing
        valid = exists if valid is None else valid & exists
    if valid is None:
        return band[None, None, None]
    return band & _with_past(valid[:, None, :, None], block, back).squeeze(-1).unsqueeze(-2)


def _sink_mask(age, blocks, block, window, offset):
    """True where a first token exists and has left the query's window. [B, 1, N, c, sinks]"""
    query = torch.arange(offset, offset + blocks * block, device=age.device).view(1, blocks, block, 1)
    age = age[:, None, None, :]
    return (age + query >= window).unsqueeze(1)


def _fused(q, k, v, mask, scaling):
    shape = q.shape
    mask = mask.expand(shape[0], 1, shape[2], *mask.shape[3:])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mask = mask.transpose(1, 2).flatten(0, 1)
    # A row without any key (padding) attends evenly instead: its output is read by nobody, but must not be NaN.
    mask = mask | ~mask.any(-1, keepdim=True)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return o.unflatten(0, (shape[0], shape[2])).transpose(1, 2).reshape(shape)


def _explicit(q, k, v, mask, scaling, softcap, sink_logits, block):
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    lse = scores.logsumexp(-1)
    if sink_logits is not None:
        kv_heads = k.shape[1]
        logits = sink_logits.float().view(1, kv_heads, 1, -1, 1)
        logits = logits.expand(1, kv_heads, 1, logits.shape[3], block).reshape(1, kv_heads, 1, -1)
        lse = torch.logaddexp(lse, logits)
    weights = (scores - lse.unsqueeze(-1)).exp()
    return weights.to(v.dtype) @ v, lse
