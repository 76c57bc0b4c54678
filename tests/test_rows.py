"""Padding and packed documents as a call tells them: one meaning for every layer, or a sentence."""

import pytest
import torch
from test_model import close, linearized, tokens
from transformers import DynamicCache

from liger_cli.templates import liger_attention, liger_rows
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_rows import row_layout

T, F = True, False
HYBRID = [LayerSpec(window=8, sinks=1), LayerSpec(kind="softmax"), LayerSpec(gate="gdn", window=8), LayerSpec(window=8)]


def layout(mask=None, positions=None, length=6):
    padding, starts, told = row_layout(
        None if mask is None else torch.tensor(mask), None if positions is None else torch.tensor(positions), length
    )
    assert told == (length > 1 and (mask is None or starts is not None or all(all(row[-length:]) for row in mask)))
    return tuple(None if x is None else x.tolist() for x in (padding, starts))


def test_one_text_a_row():
    ones = [[1] * 6]
    assert layout() == (None, None)
    assert layout(positions=[[0, 1, 2, 3, 4, 5]]) == (None, None)
    assert layout(ones, [[3, 4, 5, 6, 7, 8]]) == layout(ones) == (None, None)
    # Left padding, padding between turns, and right padding, as transformers and lm-eval number them.
    for mask, positions in (
        ([0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 2, 3]),
        ([1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 2, 3]),
        ([1, 1, 0, 0, 1, 1], [0, 1, 2, 3, 4, 5]),
        ([1, 1, 1, 1, 0, 0], [0, 1, 2, 3, 1, 1]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ):
        assert layout([mask], [positions]) == ([[bool(x) for x in mask]], None)
    assert layout([[2, 2, 2, 2, 0, 0]]) == ([[T, T, T, T, F, F]], None)
    assert layout([[1, 0, 1, 1]], length=1) == ([[T, F, T, T]], None)  # a step asks nothing
    # A mask of the whole text and the positions of its last tokens.
    assert layout([[0, 1, 1, 1, 1]], [[2, 3]], length=2) == ([[F, T, T, T, T]], None)


def test_documents():
    starts = [[T, F, T, F, F, T]]
    positions = [[0, 1, 0, 1, 2, 0]]
    assert layout(positions=positions) == layout([[1] * 6], positions) == (None, starts)
    assert layout([[1, 1, 2, 2, 2, 3]]) == (None, starts)
    assert layout([[1, 1, 2, 2, 2, 3]], [[0, 1, 2, 3, 4, 5]]) == (None, starts)
    assert layout([[1] * 6, [1] * 6], positions) == (None, starts * 2)
    # Padding stands by itself.
    assert layout([[1, 1, 2, 2, 0, 0]]) == (None, [[T, F, T, F, T, F]])
    assert layout([[1, 1, 1, 1, 0, 0]], [[0, 1, 0, 1, 0, 0]]) == (None, [[T, F, T, F, T, F]])
    assert layout([[0, 1, 1, 0, 2, 2]]) == (None, [[T, T, F, T, T, F]])
    for mask, positions in (([1, 0, 1, 2, 2, 2], None), ([1, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 2])):
        with pytest.raises(ValueError, match="padding belongs between documents"):
            layout([mask], None if positions is None else [positions])


@torch.no_grad()
def test_positions_changed_in_place_are_read_again(tiny_base):
    """A buffer that a training loop fills anew for every batch."""
    _, model = linearized(tiny_base(), specs=HYBRID)
    ids, positions = tokens(40), torch.arange(40)[None].clone()
    one = model(ids, position_ids=positions).logits
    close(one, model(ids).logits)
    positions[0, 15:] -= 15
    packed = model(ids, position_ids=positions).logits
    close(packed[:, :15], one[:, :15])
    close(packed[:, 15:], model(ids[:, 15:]).logits)
    positions[0, 15:] += 15
    close(model(ids, position_ids=positions).logits, one)


@torch.no_grad()
def test_a_mask_is_made_once_a_call(tiny_base, monkeypatch):
    """Of all softmax layers, and of all in softmax mode."""
    _, model = linearized(tiny_base(), specs=HYBRID)
    made, make = [], liger_attention.create_causal_mask
    monkeypatch.setattr(liger_attention, "create_causal_mask", lambda **given: made.append(given) or make(**given))
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, :5] = 0
    for count in (1, 2):
        model.set_attention_mode("softmax")
        model(tokens(40), attention_mask=mask)
        assert len(made) == count


@torch.no_grad()
def test_documents_are_looked_for_once_a_call(tiny_base, monkeypatch):
    """Each time a GPU would be waited for; all layers are told."""
    _, model = linearized(tiny_base(), specs=HYBRID)
    positions, found, find = torch.tensor([[*range(15), *range(25)]]), [], liger_rows._find_documents
    monkeypatch.setattr(liger_rows, "_find_documents", lambda starts: found.append(starts) or find(starts))
    for count in (1, 2):
        model(tokens(40), position_ids=positions)
        assert len(found) == count


@pytest.mark.parametrize(
    "how", ["positions beside ones", "positions beside padding", "numbers", "numbers, no positions"]
)
@torch.no_grad()
def test_documents_never_leak(tiny_base, how):
    """Each document's logits are those it has alone, in Liger and softmax layers, whichever way it is told."""
    _, model = linearized(tiny_base(), specs=HYBRID)
    ids, lengths = tokens(60, batch=2), [[20, 31, 9], [33, 27]]
    numbers = torch.stack([torch.cat([torch.full((n,), index + 1) for index, n in enumerate(row)]) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    mask = torch.ones_like(ids)
    real = mask.bool()
    if how == "positions beside padding":
        mask[0, 51:], positions[0, 51:] = 0, 0
        lengths[0].pop()
        real = mask.bool()
    call = {"attention_mask": mask if "beside" in how else numbers, "position_ids": positions}
    if how == "numbers, no positions":
        del call["position_ids"]
    packed = model(ids, **call).logits[real]
    parts = [part for row, sizes in zip(ids, lengths, strict=True) for part in row[: sum(sizes)].split(sizes)]
    close(packed, torch.cat([model(part[None]).logits[0] for part in parts]))


def test_documents_fill_no_cache(tiny_base):
    _, model = linearized(tiny_base())
    ids, positions = tokens(10), torch.arange(10)[None] % 5
    assert model.eval()(ids, position_ids=positions).past_key_values is None
    for call in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match="packed documents cannot fill a cache"):
            model(ids, position_ids=positions, **call)


@pytest.mark.parametrize("settings", [{}, {"feature_map": "relu"}, {"gate": "gdn"}], ids=str)
@torch.no_grad()
def test_left_padding_without_positions(tiny_base, settings):
    """Rotated queries and keys through a feature map: where a text stands in its row changes nothing."""
    _, model = linearized(tiny_base(), positions="rope", window=8, **settings)
    ids, mask = tokens(40), torch.ones(1, 53, dtype=torch.long)
    mask[:, :13] = 0
    padded = torch.cat([torch.zeros(1, 13, dtype=torch.long), ids], dim=1)
    alone = model(ids).logits
    close(model(padded, attention_mask=mask).logits[:, 13:], alone)
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, 53, 9):
        piece = padded[:, start : start + 9]
        logits.append(model(piece, attention_mask=mask[:, : start + 9], past_key_values=cache).logits)
    close(torch.cat(logits, dim=1)[:, 13:], alone)
