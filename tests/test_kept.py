"""Kept tokens: the choice against its definition, in pieces, with gradients, in models of several families.

Tolerance 1e-5: float32 sums of a few hundred terms of size 1, taken in another order.
"""

import json

import pytest
import torch
from test_extras import converted, shaken
from test_model import close, in_pieces, tokens
from transformers import AutoModelForCausalLM

from liger_cli.checkpoint.model_code import load_model
from liger_cli.commands.convert import convert
from liger_cli.templates import liger_spans
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, check_heads, layer_specs, liger_block
from liger_cli.templates.liger_kept import (
    EMPTY,
    Stream,
    add_kept,
    keep_scores,
    kept_attention,
    priorities,
)
from liger_cli.templates.liger_spans import attend_by_spans, departures, lifetimes
from liger_cli.templates.liger_window import Scoring, window_attention

WINDOW, COUNT, SCALING = 16, 8, 0.3
SCORING = Scoring(SCALING)


def example(length=200, dim=8, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, dim, dtype=dtype) for heads in (4, 2, 2))
    scores = (torch.randn(2, 2, length) * 4).round() / 4  # many equal ones
    valid = torch.arange(length) >= torch.tensor([[30], [0]])
    return q, k, v, priorities(scores, torch.arange(length).expand(2, -1), valid=valid)


def kept_at(priority, time: int) -> list[int]:
    """The definition: places of the tokens kept for the query at `time`. priority [S]."""
    left = [place for place in range(time - WINDOW + 1) if priority[place] > EMPTY]
    return sorted(left, key=lambda place: -priority[place].item())[:COUNT]


def in_blocks(q, k, v, priority, first=0, memory=None, scoring=SCORING, evict=False, count=COUNT):
    """Window and kept tokens each by itself, then under one softmax: the portable form, and what gradients go through.

    As `attend_by_spans` with every argument: o, lse, memory and what is evicted.
    """
    last = first + q.shape[2]
    valid = priority[:, 0, :last] > EMPTY
    window = window_attention(q, k[:, :, :last], v[:, :, :last], WINDOW, scoring, valid=valid, need_lse=True)
    stream = Stream(k, v, priority)
    kept, kept_lse, memory, gone = kept_attention(q, stream, first, memory, WINDOW, count, scoring, evict)
    return *add_kept(*window, kept, kept_lse), memory, gone


@torch.no_grad()
def in_spans(q, k, v, priority, first=0, memory=None, scoring=SCORING, evict=False, count=COUNT):
    """The form of a CPU without gradients."""
    valid = priority[:, 0] > EMPTY
    stream, counts = Stream(k, v, priority), (count,) * k.shape[1]
    return attend_by_spans(q, stream, first, memory, WINDOW, counts, scoring, valid, evict, need_lse=True)


def check_same_memory(first, second):
    """The same tokens, in any order."""
    orders = [memory[2].argsort(dim=2) for memory in (first, second)]
    for a, b in zip(first, second, strict=True):
        index = orders if a.ndim == 3 else [order.unsqueeze(-1).expand_as(a) for order in orders]
        assert torch.equal(a.gather(2, index[0]), b.gather(2, index[1]))


@pytest.fixture(params=[in_blocks, in_spans])
def attend(request, monkeypatch):
    monkeypatch.setattr(liger_spans, "SPAN", 100)
    return request.param


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal"])
def test_definition(attend, order):
    q, k, v, scores = example()
    if order != "random":
        step = {"rising": 1.0, "falling": -1.0, "equal": 0.0}[order]
        ordered = priorities(torch.arange(200.0).expand(2, 2, -1) * step, torch.arange(200).expand(2, -1))
        scores = torch.where(scores > EMPTY, ordered, scores)
    output, lse, *_ = attend(q, k, v, scores)
    for row, head, time in [(r, h, t) for r in (0, 1) for h in range(4) for t in range(30 * (r == 0), 200, 3)]:
        near = [place for place in range(max(time - WINDOW + 1, 0), time + 1) if scores[row, 0, place] > EMPTY]
        places = near + kept_at(scores[row, head // 2], time)
        logits = k[row, head // 2, places] @ q[row, head, time] * SCALING
        close(lse[row, head, time], logits.logsumexp(0), 1e-5)
        close(output[row, head, time], logits.softmax(0) @ v[row, head // 2, places], 1e-5)


@pytest.mark.parametrize("piece", [1, 37, 64, 130])
def test_pieces(piece, attend):
    """However the queries are cut, each sees the same tokens."""
    q, k, v, scores = example()
    seen = scores[:, :1].repeat_interleave(4, dim=1) > EMPTY  # of padding nothing is said
    whole, _, memory, _ = attend(q, k, v, scores)
    parts, carried = [], None
    for start in range(0, 200, piece):
        output, _, carried, _ = attend(q[:, :, start : start + piece], k, v, scores, start, carried)
        parts.append(output)
    close(torch.cat(parts, dim=2)[seen], whole[seen], 1e-5)
    check_same_memory(carried, memory)


@pytest.mark.parametrize("piece", [1, 37, 64, 200])
def test_evicted_tokens(piece, attend):
    """From each query on the token that is in neither the window nor the memory, and was before: all of them once."""
    q, k, v, priority = example()
    found, carried = [], None
    for start in range(0, 200, piece):
        *_, carried, evicted = attend(q[:, :, start : start + piece], k, v, priority, start, carried, evict=True)
        found.append(evicted)
    keys, values, there = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    for row, head in [(r, h) for r in (0, 1) for h in (0, 1)]:
        gone: set[int] = set()
        for time in range(200):
            left = {place for place in range(time - WINDOW + 1) if priority[row, head, place] > EMPTY}
            new = left - set(kept_at(priority[row, head], time)) - gone
            assert len(new) == int(there[row, head, time])
            for place in new:
                assert torch.equal(keys[row, head, time], k[row, head, place])
                assert torch.equal(values[row, head, time], v[row, head, place])
            gone |= new
        assert len(gone) == 200 - 30 * (row == 0) - WINDOW - COUNT


def test_nothing_kept_evicts_what_leaves_the_window(attend):
    q, k, v, priority = example(40)
    output, _, memory, (keys, _, there) = attend(q, k, v, priority, evict=True, count=0)
    assert memory[0].shape[2] == 0
    close(output[1], window_attention(q[1:], k[1:], v[1:], WINDOW, SCORING)[0][0], 1e-5)
    assert there.sum() == 2 * (40 - WINDOW) and torch.equal(keys[1, :, WINDOW:], k[1, :, : 40 - WINDOW])


def test_both_ways():
    """Soft-capped, with a sink of the family's, from a memory that is not full: the same output, denominators, memory
    and evicted tokens."""
    q, k, v, scores = example()
    scoring = Scoring(SCALING, 2.0, torch.tensor([0.5, -1.0, 2.0, 0.0]))
    memory = in_blocks(q[:, :, :40], k, v, scores, scoring=scoring)[2]
    blocks, spans = (
        attend(q[:, :, 40:], k, v, scores, 40, memory, scoring, evict=True) for attend in (in_blocks, in_spans)
    )
    for a, b in zip(blocks[:2], spans[:2], strict=True):
        close(a, b, 1e-5)
    check_same_memory(blocks[2], spans[2])
    there = blocks[3][2]
    assert torch.equal(there, spans[3][2])
    for a, b in zip(blocks[3][:2], spans[3][:2], strict=True):
        assert torch.equal(a[there], b[there])


@pytest.mark.parametrize("sinks", [1, 4])
@torch.no_grad()
def test_sinks_beside_kept_tokens(tiny_base, tmp_path, sinks):
    """From equal scores the latest tokens are kept: the base under a mask of sinks, kept tokens and window, each seen
    once, and no sink in the place of a kept token; padded, in pieces, and with a softmax head."""
    settings = {"window": 16, "kept": 10, "sinks": sinks, "mix": 0.0}
    base = AutoModelForCausalLM.from_pretrained(tiny_base()).eval()
    model = load_model(converted(tiny_base(), tmp_path, **settings), dtype=torch.float32).eval()
    ids = tokens(120)
    row, column = torch.arange(120)[:, None], torch.arange(120)
    seen = (column <= row) & ((column > row - 26) | (column < sinks))
    wanted = base(ids, attention_mask=seen[None, None]).logits
    close(model(ids).logits, wanted, 1e-5)
    with torch.enable_grad():
        close(model(ids).logits.detach(), wanted, 1e-5)
    for piece in (1, 7, 50):
        close(in_pieces(model, ids, piece), wanted)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(129) >= 9).long()[None]
    close(in_pieces(model, padded, 11, attention_mask=mask)[:, 9:], wanted)
    model.set_attention_mode("window")
    seen = (column <= row) & ((column > row - 16) | (column < sinks))
    close(in_pieces(model, ids, 7), base(ids, attention_mask=seen[None, None]).logits)


@torch.no_grad()
def test_heads_that_keep_different_numbers(tiny_base, tmp_path):
    """From equal scores: each head the base under a mask of its own; the memory is as small as each head's number."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base(), attn_implementation="eager").eval()
    folder = converted(tiny_base(), tmp_path, window=16, kept=[2, 10], sinks=1, mix=0.0)
    model = load_model(folder, dtype=torch.float32).eval()
    assert model.config.liger["layers"][0]["kept"] == [2, 10]
    ids = tokens(170, batch=2)
    row, column = torch.arange(170)[:, None], torch.arange(170)
    seen = torch.stack([(column <= row) & ((column > row - 16 - n) | (column < 1)) for n in (2, 2, 10, 10)])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None]
    wanted = base(ids, attention_mask=mask).logits
    close(model(ids).logits, wanted, 1e-5)
    with torch.enable_grad():
        close(model(ids).logits.detach(), wanted, 1e-5)
    for piece in (1, 23, 70):
        close(in_pieces(model, ids, piece), wanted)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].pairs.shape == (2, 1, (16 + 3) + (16 + 11), 2, 16)


@pytest.mark.parametrize("kept", [[], [1, -1], [1, 2.0], "8", [True, 2], [[1]], [1, 2, 3]])
def test_numbers_of_kept_tokens_that_cannot_be_read(kept):
    with pytest.raises(LigerConfigError, match="kept"):
        check_heads([LayerSpec(kept=kept)], 2)


def test_numbers_of_kept_tokens_in_json():
    spec = LayerSpec(kept=[1, 2, 3], softmax_kv_heads=[1])
    assert layer_specs(json.loads(json.dumps(liger_block([spec]))), 1) == [spec] and spec.kept_by_head(3) == (1, 3)
    assert LayerSpec(kept=[4, 4]).kept == 4 and LayerSpec(kept=4).kept_by_head(2) == (4, 4)


def test_lifetimes():
    """Two are kept; of equal scores the later one; what is not there never is; one is evicted a row, once two are."""
    scores = torch.tensor([[[0.0, 1.0, 3.0, 2.0, 0.0, 3.0, 0.0, 3.0]]])
    valid = torch.tensor([[False, True, True, True, False, True, True, True]])
    priority = priorities(scores, torch.arange(8)[None], valid=valid)[0, 0].numpy()
    since, until = lifetimes(priority, 2)
    never = 2**31 - 1
    assert since.tolist() == [never, 0, 0, 1, never, 3, never, 5]
    assert until.tolist() == [never, 1, 5, 3, never, never, never, never]
    assert departures(priority, since, until, 2).tolist() == [-1, 1, -1, 3, 6, 2]


def test_priorities():
    """Sinks before every score, a higher score before a later place, padding never."""
    scores = torch.tensor([[[-2000.0, 0.5, 0.5, 0.5 - 1 / 1024, 1e30, -1e30, 7.0]]])
    valid = torch.tensor([[True, True, True, True, True, True, False]])
    found = priorities(scores, torch.arange(7)[None], sinks=1, valid=valid)[0, 0]
    assert found.argsort().tolist() == [6, 5, 3, 1, 2, 4, 0] and found[6] == EMPTY


def test_one_softmax_over_window_and_kept_tokens(attend):
    """With room for every token, window and kept tokens together are causal softmax attention."""
    q, k, v, _ = example(length=100)
    priority = priorities(torch.randn(2, 2, 100), torch.arange(100).expand(2, -1))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALING, is_causal=True, enable_gqa=True)
    close(attend(q, k, v, priority, count=100)[0], wanted, 1e-5)


def test_gradients():
    """Against numerical ones for q, k, v; the scores' are those of logits that the score were added to."""
    q, k, v, scores = example(length=40, dim=3, dtype=torch.float64)
    q, k, v = (x[:1].clone().requires_grad_() for x in (q, k, v))
    run = lambda q, k, v: kept_attention(q, Stream(k, v, scores[1:]), 0, None, WINDOW, COUNT, SCORING)[0]  # noqa: E731
    # The attention itself runs in float32: steps of 1e-3, to 1e-2.
    assert torch.autograd.gradcheck(run, (q, k, v), eps=1e-3, atol=1e-2, rtol=1e-2, fast_mode=True)
    weight = torch.zeros(2, 3, requires_grad=True)
    score = keep_scores(k[:, :, :, :3].float().detach(), weight).squeeze(-1)
    priority = priorities(score, torch.arange(40)[None])
    output, lse, *_ = kept_attention(q, Stream(k, v, priority, score), 0, None, WINDOW, COUNT, SCORING)
    output.square().sum().backward()
    assert weight.grad.abs().sum() > 0 and weight.grad.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_scores_are_rounded_and_pass_gradients():
    k = torch.randn(1, 2, 5, 4)
    weight = torch.randn(2, 4, requires_grad=True)
    scores = keep_scores(k, weight)
    close(scores * 1024, (scores * 1024).round(), 1e-2)
    close(scores.squeeze(-1), torch.einsum("bhtd,hd->bht", k, weight), 1e-3)
    scores.sum().backward()
    close(weight.grad, k.sum((0, 2)), 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "gpt_oss", "olmo2"])
@torch.no_grad()
def test_families(tiny_base, tmp_path, model_type):
    """Whole = in pieces = token by token; with room for all, the model is the base."""
    base = tiny_base(model_type)
    has_local = model_type in ("gemma2", "gpt_oss")
    settings = {"window": 16, "kept": 200, "mix": 0.0}
    convert(str(base), str(tmp_path / "all"), settings=settings, linearize_local=has_local)
    model = shaken(tmp_path / "all")
    ids = tokens(150, batch=2)
    whole = model(ids).logits
    for piece in (1, 23, 70):
        close(in_pieces(model, ids, piece), whole)
    local = [attention.local_window for attention in model.model.liger_attentions()]
    model.set_attention_mode("softmax", [index for index, window in enumerate(local) if window is not None])
    kept = model(ids).logits
    model.set_attention_mode("softmax")
    close(kept, model(ids).logits, 1e-4)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("rest", [{}, {"rest": True, "gate": "mamba2"}])
@torch.no_grad()
def test_generation_with_beams_and_padding(tiny_base, tmp_path, sinks, rest):
    """Beams reorder the memory: beam search is the same with the cache and without."""
    model = shaken(converted(tiny_base(), tmp_path, kept=8, sinks=sinks, **rest))
    ids = tokens(50, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=mask, **settings)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(cached, again)
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].pairs.shape == (2, 2, cache.layers[0].window + 8 + sinks, 2, 16)
