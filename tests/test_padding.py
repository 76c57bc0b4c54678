"""Padding behind a text, between turns and in a step: what is seen depends on the tokens alone.

Tolerances as in test_model: logits of size about 1 in float32, the same sums in another order.
"""

import pytest
import torch
from test_extras import converted, shaken
from test_model import close, linearized, tokens
from transformers import DynamicCache, StaticCache

SETTINGS = {
    "gla": {},
    "gdn": {"gate": "gdn"},
    "sinks": {"sinks": 3, "mix": 0.0},
    "kept": {"kept": 8},
    "kept and sinks": {"kept": [8, 0], "sinks": 2, "normalizer": "joint"},
    "softmax head": {"kept": 8, "softmax_kv_heads": [1]},
    "delayed": {
        **{"gate": "none", "delayed": True, "sinks": 2, "normalizer": "joint", "positions": "rope"},
    },
    "delayed, kept": {
        **{"gate": "retnet", "delayed": True, "kept": [5, 8], "sinks": 2, "normalizer": "joint", "positions": "rope"},
    },
    "rest": {"gate": "mamba2", "rest": True, "kept": [5, 8], "sinks": 2},
    "softmax": {},
}


@pytest.fixture(params=SETTINGS)
def model(request, tiny_base, tmp_path):
    found = shaken(converted(tiny_base(), tmp_path, **SETTINGS[request.param]))
    if request.param == "softmax":
        found.set_attention_mode("softmax")
    return found


@torch.no_grad()
def fed(model, rows, pieces):
    """Logits [T, V] of each row's tokens, fed in pieces of slots that hold so many tokens a row, False for padding.

    rows: token ids of each text. pieces: for each forward pass a list of slots a row.
    """
    cache, places, masks = DynamicCache(config=model.config), [0] * len(rows), [[] for _ in rows]
    logits = [[] for _ in rows]
    for piece in pieces:
        ids, positions = [], []
        for row, slots in enumerate(piece):
            at = places[row]
            positions.append([max(at + sum(slots[: slot + 1]) - 1, 0) for slot in range(len(slots))])
            ids.append(
                [int(rows[row][place]) if there else 0 for place, there in zip(positions[-1], slots, strict=True)]
            )
            places[row] += sum(slots)
            masks[row] += slots
        settings = {"attention_mask": torch.tensor(masks).long(), "position_ids": torch.tensor(positions)}
        found = model(torch.tensor(ids), past_key_values=cache, use_cache=True, **settings).logits
        for row, slots in enumerate(piece):
            logits[row].append(found[row, torch.tensor(slots)])
    return [torch.cat(one) for one in logits]


def check(model, rows, pieces):
    for row, found in zip(rows, fed(model, rows, pieces), strict=True):
        assert len(found) == len(row)
        with torch.no_grad():
            close(found, model(row[None]).logits[0])


def test_decoding_after_right_padding(model):
    """100 and 60 tokens, padded to 100 on the right, and ten steps."""
    rows = [tokens(110)[0], tokens(70, seed=1)[0]]
    prompt = [[True] * 100, [True] * 60 + [False] * 40]
    check(model, rows, [prompt] + [[[True], [True]]] * 10)


def test_padding_between_turns(model):
    """Turns of several lengths, shorter and longer than the window, padded behind, before, inside and not at all."""
    pieces = [
        [[True] * 5 + [False] * 3, [True] * 8],
        [[False] * 20 + [True] * 30, [True] * 7 + [False] * 43],
        [[True, False, True, False, True] * 4, [False] * 20],
        [[True], [False]],
        [[False], [True]],
        [[True] * 40, [True, False] * 20],
        *[[[True], [True]]] * 3,
    ]
    lengths = [sum(sum(piece[row]) for piece in pieces) for row in (0, 1)]
    check(model, [tokens(length, seed=seed)[0] for seed, length in enumerate(lengths)], pieces)


@torch.no_grad()
def test_a_static_cache_of_windows_alone(tiny_base):
    """A mask as long as the base's own window is one of the tokens so far, not of a cache that is no longer."""
    _, found = linearized(tiny_base("mistral", sliding_window=7, num_hidden_layers=1), window=5, mix=0.0)
    for weight in (found.model.layers[0].self_attn.v_proj.weight, found.model.layers[0].self_attn.o_proj.weight):
        weight.mul_(8)
    ids = tokens(26)
    whole, row = found(ids).logits, torch.cat([torch.zeros(1, 67, dtype=torch.long), ids], dim=1)
    mask = (row > 0).long()
    places, cache, start, logits = (mask.cumsum(1) - 1).clamp_min(0), StaticCache(found.config, max_cache_len=95), 0, []
    for size in (5, 1, 1, 66, 20):
        stop = start + size
        settings = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]}
        logits.append(found(row[:, start:stop], past_key_values=cache, use_cache=True, **settings).logits)
        start = stop
    close(torch.cat(logits, dim=1)[:, 67:], whole)


def test_training_sees_the_tokens_alone(model):
    """Without a cache, with gradients: padding inside a row changes neither its logits nor their gradient."""
    ids, mask = tokens(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[0, 20:33], mask[1, ::3] = 0, 0
    weight = model.model.layers[0].self_attn.v_proj.weight
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    alone = torch.cat([model(row[seen][None]).logits[0] for row, seen in zip(ids, mask.bool(), strict=True)])
    close(padded, alone)
    gradients = [torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (padded, alone)]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
