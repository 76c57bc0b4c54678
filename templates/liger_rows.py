"""What a call says of its rows - padding, and documents packed one behind another - and how it reaches the layers.

Documents share a row in one of two conventions: `position_ids` that start anew (transformers' padding-free collators),
or an `attention_mask` of document numbers 1, 1, 2, 2, 0 (sample packing in fine-tuning tools; 0 at padding).
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .liger_step import once

_found = WeakTensorKeyDictionary()  # of a call's mask, what was found for all its layers


def row_layout(attention_mask, position_ids, length: int):
    """Padding and the starts of packed documents.

    Beside a mask of ones positions that do not go on by one start a document, as transformers has it. Beside padding,
    whose positions mean nothing, a token does whose position is not above that of the token before it.

    Args:
        attention_mask: [B, S], zero at padding, or None; document numbers where one is above 1.
        position_ids: [B or 1, T] of the last T = `length` tokens, or None.
    Returns:
        padding [B, S] bool, false at padding, or None; starts [B, T] bool, true where a document begins, or None where
        every row is one text. With starts there is no padding: it stands in documents of its own. And whether it is
        known that none of the last T tokens is padding. With more than one token padding is None where there is none.
    Raises:
        ValueError: padding inside a packed document.
    """
    padding = None if attention_mask is None else attention_mask.bool()
    if length < 2:
        return padding, None, False
    told = {}
    if padding is not None:
        told |= {"whole": padding.all(), "seen": padding[:, -length:].all()}
        if attention_mask.dtype != torch.bool:
            told["numbered"] = (attention_mask > 1).any()
    if position_ids is not None and position_ids.shape == (len(position_ids), length):
        apart = position_ids.diff(dim=1) != 1
        told["apart"] = apart.any()
    told = _answers(told)
    padding, numbered, seen = None if told.get("whole") else padding, told.get("numbered"), told.get("seen", True)
    if not numbered and seen:
        if not told.get("apart"):
            return padding, None, seen
        starts = torch.nn.functional.pad(apart, (1, 0), value=True)
        return None, starts.expand(len(position_ids if attention_mask is None else attention_mask), -1), True
    if not numbered and "apart" not in told:
        return padding, None, False
    seen = attention_mask[:, -length:].bool()
    place = torch.arange(length, device=seen.device)
    latest = torch.where(seen, place, -1).cummax(dim=1).values[:, :-1]  # token, not padding, before each but the first
    told_by = attention_mask[:, -length:] if numbered else position_ids.expand(len(seen), -1)
    before, now = told_by.gather(1, latest.clamp_min(0)), told_by[:, 1:]
    begins = seen[:, 1:] & (latest >= 0) & (now != before if numbered else now <= before)
    torn = (seen[:, 1:] & ~seen[:, :-1] & (latest >= 0) & ~begins).any()
    told = _answers({"packed": begins.any(), "torn": torn, "seen": seen.all()})
    if not told["packed"]:
        return padding, None, told["seen"]
    if told["torn"]:
        raise ValueError("packed documents with padding inside one of them: padding belongs between documents")
    starts = torch.nn.functional.pad(begins | (seen[:, 1:] != seen[:, :-1]), (1, 0), value=True)
    return None, starts, True


def _answers(questions: dict) -> dict[str, bool]:
    """Of [] bool tensors, all at once: a GPU is waited for."""
    return dict(zip(questions, torch.stack(list(questions.values())).tolist(), strict=True)) if questions else {}


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


def documents(mask) -> list:
    """Where the documents of a mask of `pack_rows` lie, found once for all layers that are given it.

    They are taken out of the rows and run side by side, those of similar length together, so that less than half of
    what is computed is padding.

    Returns:
        for each bucket of N documents with at most L tokens the place of each token among all B * T, [N, L], and which
        of the N * L are tokens, [M]; and at last the inverse of all these places, [B * T].
    """
    return once_a_call(mask, "documents", lambda: _find_documents(unpack_rows(mask)[1]))


def document_bounds(mask):
    """Where the documents of a mask of `pack_rows` begin among all B * T tokens, and the end. [N + 1] int64"""

    def find():
        starts = unpack_rows(mask)[1].flatten()
        return torch.nn.functional.pad(starts.nonzero().squeeze(1), (0, 1), value=len(starts))

    return once_a_call(mask, "bounds", find)


def once_a_call(mask, name, find):
    """What `find` returns, kept under a name for all layers that are given the mask of `pack_rows`."""
    if mask is None or torch.compiler.is_compiling():
        return find()
    return once(_found.setdefault(mask, {}), name, find)


def _find_documents(starts) -> list:
    batch, length = starts.shape
    first = starts.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([batch * length]))
    buckets = torch.ceil(torch.log2(lengths.float()))
    found, places = [], []
    for bucket in buckets.unique():
        members = buckets == bucket
        offsets = torch.arange(int(lengths[members].max()), device=first.device)
        inside = offsets < lengths[members, None]
        index = torch.where(inside, first[members, None] + offsets, 0)
        found.append((index, inside.flatten().nonzero().squeeze(1)))
        places.append(index[inside])
    return [*found, torch.cat(places).argsort()]
