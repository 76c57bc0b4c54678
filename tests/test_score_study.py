"""The study of scores: what each one is, on random heads and on attention whose future is known."""

from types import SimpleNamespace

import pytest
import torch

from liger_cli.calibration.layerwise import Layer
from study import scores
from study.scores import FITTED, OTHERS, fitted_scores, lacking, table, visible

HEADS, GROUPS, DIM, LENGTH, WINDOW, SINKS = 2, 2, 16, 192, 16, 2
LOST, SO_FAR, LATEST, TO_COME = OTHERS[1:]


@pytest.fixture
def made(monkeypatch):
    """A row of a layer whose every query after the first half looks at tokens 20, 25 ... 55, and its hidden states."""
    monkeypatch.setattr(scores, "LENGTH", LENGTH)
    monkeypatch.setattr(scores, "QUERIES", 100)
    monkeypatch.setattr(scores, "DIRECTIONS", 4)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, LENGTH, DIM) for heads in (HEADS * GROUPS, HEADS, HEADS))
    k[..., 0], q[..., 0] = 0.0, 0.0
    k[:, :, 20:60:5, 0], q[:, :, LENGTH // 2 :, 0] = 12.0, 4.0
    every = {"is_causal": True, "enable_gqa": True, "scale": DIM**-0.5}
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, **every)
    spec = SimpleNamespace(softmax_kv_heads=(), sinks=SINKS)
    attention = SimpleNamespace(
        scaling=DIM**-0.5, liger_spec=spec, liger_window=WINDOW, dense=None,
        o_proj=torch.nn.Linear(HEADS * GROUPS * DIM, 24, bias=False),
    )  # fmt: skip
    hidden = torch.randn(1, LENGTH, 24)
    return Layer(attention, q, k, q, k, v, heads, torch.randn_like(heads)), hidden


@torch.no_grad()
def test_visible_is_the_window_the_sinks_and_the_best_of_the_rest():
    score = torch.tensor([5.0, 4.0, 0.0, 3.0, 1.0, 2.0, 9.0, 9.0]).expand(2, -1)
    found = visible(score, torch.tensor([3, 7]), window=2, sinks=1, kept=2)
    assert found.int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 1, 1]]


@torch.no_grad()
def test_scores_keep_what_they_know_of(made):
    """Tokens that their keys show are kept by every score that sees keys; room for all leaves nothing to lack."""
    layer, hidden = made
    weights = fitted_scores(layer, hidden)
    found = lacking(layer, hidden, weights, kept=8)
    assert set(found) == {*FITTED, *OTHERS}
    for name in ("key", "key and value", "key and the attention it got in the window", TO_COME):
        assert found[name][0] < 0.5 * found["hidden state"][0], name  # random: it knows nothing
    assert found[TO_COME][0] <= 1.05 * min(error for error, _ in found.values())
    for error, nats in lacking(layer, hidden, weights, kept=LENGTH).values():
        assert error < 1e-10 and nats < 1e-10


@torch.no_grad()
def test_a_lost_token_does_not_come_back(made):
    """Nobody looks at the tokens in the first half: a mean over what is kept has lost some, one over all has not."""
    layer, hidden = made
    found = lacking(layer, hidden, fitted_scores(layer, hidden), kept=8)
    assert found[SO_FAR][0] < 0.5 * found[LOST][0] and found[LATEST][0] < 0.5 * found[LOST][0]


def test_the_table_sums_divergences_and_averages_errors():
    names = (*FITTED, *OTHERS)
    rows = table({0: dict.fromkeys(names, [0.1, 0.02]), 3: dict.fromkeys(names, [0.3, 0.01])}).rows
    assert rows[0] == ["key", "20.0%", "0.030"] and [row[0] for row in rows] == list(names)
