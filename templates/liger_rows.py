"""What a call says of its rows - padding, and documents packed one behind another - and how it reaches the layers.

Documents share a row in one of two conventions: `position_ids` that start anew (transformers' padding-free collators),
or an `attention_mask` of document numbers 1, 1, 2, 2, 0 (sample packing in fine-tuning tools; 0 at padding).
"""

import torch


def row_layout(attention_mask, position_ids, length: int):
    """Padding and the starts of packed documents.

    Beside a mask of ones positions that do not go on by one start a document, as transformers has it. Beside padding,
    whose positions mean nothing, a token does whose position is not above that of the token before it.

    Args:
        attention_mask: [B, S], zero at padding, or None; document numbers where one is above 1.
        position_ids: [B or 1, T] of the last T = `length` tokens, or None.
    Returns:
        padding [B, S] bool, false at padding, or None; starts [B, T] bool, true where a document begins, or None where
        every row is one text. With starts there is no padding: it stands in documents of its own.
    Raises:
        ValueError: padding inside a packed document.
    """
    padding = None if attention_mask is None else attention_mask.bool()
    if length < 2:
        return padding, None
    numbered = attention_mask is not None and attention_mask.dtype != torch.bool and bool((attention_mask > 1).any())
    if not numbered and (position_ids is None or position_ids.shape != (len(position_ids), length)):
        return padding, None
    seen = None if padding is None else padding[:, -length:]
    if not numbered and (seen is None or seen.all()):
        starts = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
        batch = len(position_ids if seen is None else seen)
        return (None, starts.expand(batch, -1)) if starts[:, 1:].any() else (padding, None)
    place = torch.arange(length, device=seen.device)
    latest = torch.where(seen, place, -1).cummax(dim=1).values[:, :-1]  # token, not padding, before each but the first
    told_by = attention_mask[:, -length:] if numbered else position_ids.expand(len(seen), -1)
    before, now = told_by.gather(1, latest.clamp_min(0)), told_by[:, 1:]
    begins = seen[:, 1:] & (latest >= 0) & (now != before if numbered else now <= before)
    if not begins.any():
        return padding, None
    if (seen[:, 1:] & ~seen[:, :-1] & (latest >= 0) & ~begins).any():
        raise ValueError("packed documents with padding inside one of them: padding belongs between documents")
    return None, torch.nn.functional.pad(begins | (seen[:, 1:] != seen[:, :-1]), (1, 0), value=True)


def document_positions(starts):
    """Positions that count from 0 in every document. [B, T] bool -> [B, T]"""
    place = torch.arange(starts.shape[1], device=starts.device)
    return place - torch.where(starts, place, 0).cummax(dim=1).values


def token_positions(padding, length: int):
    """Positions of the last `length` slots that count tokens, not padding. [B, S] bool -> [B, T]"""
    return (padding.long().cumsum(1) - 1).clamp_min(0)[:, -length:]


def tokens_last(valid):
    """Places of the padding, then of the tokens, each in their order. [B, T] bool -> [B, T]"""
    return valid.to(torch.uint8).sort(dim=1, stable=True).indices


def at_places(x, places, dim: int = 1):
    """x [B or 1, T, ...] at places [B, n] of its dimension `dim`, in every row."""
    x = x.expand(len(places), *x.shape[1:])
    index = places.view(len(places), *[1] * (dim - 1), -1, *[1] * (x.ndim - dim - 1))
    return x.gather(dim, index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def pack_rows(padding, starts, told: bool = False):
    """Carry padding [B, S] and starts [B, T], or None, past the family's mask code: it hands a 4-D mask on as it is.

    told: the new tokens are none of them padding.
    """
    if starts is not None:
        return starts[:, None, None, :].expand(-1, -1, 2, -1)
    if padding is None:
        return torch.ones(1, 1, 1, 0, dtype=torch.bool)
    return padding[:, None, None, :].expand(-1, -1, 3 if told else 1, -1)


def unpack_rows(mask):
    """The inverse of `pack_rows`: padding and starts, each None where there is none, and `told`."""
    if mask is None or mask.shape[-1] == 0:
        return None, None, True
    row, kind = mask[:, 0, 0, :], mask.shape[2]
    return (None, row, False) if kind == 2 else (row, None, kind == 3)
