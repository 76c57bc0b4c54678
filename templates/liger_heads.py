"""Softmax heads inside a Liger layer: some key/value heads, with their query heads, keep the base's full attention.

Their keys and values grow with the text, or fill a StaticCache, and are kept apart from the window and the state (see
`liger_cache`). The other heads run as Liger; the outputs are put back in the order of the heads.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from .liger_window import Scoring, window_attention

# Queries worked through at a time where a mask has to be made: bounds the mask and the scores to PIECE_SIZE x S.
PIECE_SIZE = 1024


def split_heads(spec, num_key_value_heads: int, groups: int, device):
    """The layer's softmax heads and its others.

    Args:
        spec: the layer's settings. groups: query heads of a key/value head.
    Returns:
        Twice the settings, the key/value heads and the query heads: of the softmax heads, then of the others.
    """
    chosen, others, chosen_queries, other_queries = _indices(spec.softmax_kv_heads, num_key_value_heads, groups, device)
    return (spec, chosen, chosen_queries), (_without(spec, num_key_value_heads), others, other_queries)


def softmax_heads(tokens, settings, valid=None, cache=None, within_window=None):
    """As `mixed_attention`, the base's own attention: over the whole text, or over the base's own window."""
    length, past = tokens.v.shape[2], cache is not None and cache.is_initialized
    keys, values, seen, before = tokens.rotated_k, tokens.v, valid, None
    if cache is not None:
        keys, values, seen, before = cache.update_softmax_heads(keys, values, valid)
    if not past and length <= settings.window and within_window is not None:
        return within_window().transpose(1, 2)
    output = softmax_attention(tokens.rotated_q, keys, values, settings.scoring, seen, settings.local_window, before)
    return output.transpose(1, 2)


def softmax_attention(q, k, v, scoring: Scoring, valid=None, local_window=None, before=None):
    """Causal softmax attention over the whole text, or over the last `local_window` tokens.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, S, D].
        valid: [B, S] bool, false at padding; None where there is none.
        before: [] int64, how many of the S tokens are before the queries' own; None where these are the last T.
    Returns:
        [B, Hq, T, D] in q's dtype.
    """
    length, total = q.shape[2], k.shape[2]
    if local_window is not None:
        return window_attention(q, k, v, local_window, scoring, valid)[0]
    plain = scoring.softcap is None and scoring.sink_logits is None
    settings = {"scale": scoring.scaling, "dropout_p": scoring.dropout, "enable_gqa": True}
    if valid is None and plain and before is None and length in (1, total):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1, **settings)
    pieces = []
    for start in range(0, length, PIECE_SIZE):
        part = q[:, :, start : start + PIECE_SIZE]
        first = start + (total - length if before is None else before)
        last = first + part.shape[2] if before is None else total
        places, own = torch.arange(last, device=q.device), torch.arange(part.shape[2], device=q.device)[:, None] + first
        seen = (places <= own)[None]
        if valid is not None:
            # A padded query sees itself, whatever comes of it: a row without any key would be NaN.
            seen = (seen & valid[:, None, :last]) | (places == own)
        seen = seen.view(-1, 1, *seen.shape[-2:])  # [B or 1, 1, t, s]
        keys, values = k[:, :, :last], v[:, :, :last]
        if plain:
            piece = torch.nn.functional.scaled_dot_product_attention(part, keys, values, attn_mask=seen, **settings)
        else:
            piece = masked_attention(part, keys, values, seen, scoring)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def masked_attention(q, k, v, seen, scoring: Scoring):
    """Scores, softmax and sum spelt out: does what torch's attention cannot. seen: [B or 1, 1, T, S] bool."""
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, T, D]
    scores = scoring.logits((q @ k.unsqueeze(2).mT).float())
    scores = scores.masked_fill(~seen.unsqueeze(2), torch.finfo(scores.dtype).min)
    if scoring.sink_logits is not None:
        logits = scoring.sink_logits.float().view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, logits], dim=-1)
    weights = torch.nn.functional.dropout(scores.softmax(-1), scoring.dropout)[..., : k.shape[2]]
    return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


@lru_cache(maxsize=256)
def _indices(chosen: tuple[int, ...], count: int, groups: int, device):
    """The chosen key/value heads and the others, then the query heads of both. Kept, since copying waits for a GPU."""
    with torch.inference_mode(False):
        others = [head for head in range(count) if head not in chosen]
        kv_heads = [torch.tensor(heads, device=device) for heads in (chosen, others)]
        offsets = torch.arange(groups, device=device)
        return *kv_heads, *((heads[:, None] * groups + offsets).flatten() for heads in kv_heads)


@lru_cache(maxsize=256)
def _without(spec, heads: int):
    return replace(spec, softmax_kv_heads=(), kept=spec.kept_by_head(heads), rest=spec.rest_by_head(heads))
