"""The study of states for what leaves exact memory: each is what it says, on random heads."""

from types import SimpleNamespace

import pytest
import torch

from liger_cli.calibration.layerwise import Layer
from study import rest_maps
from study.rest_maps import MAPS, errors, table

HEADS, GROUPS, DIM, LENGTH = 2, 2, 16, 96


@pytest.fixture
def layer(monkeypatch):
    """Two rows of a layer's attention; spread: of the logits."""
    monkeypatch.setattr(rest_maps, "LENGTH", LENGTH)
    monkeypatch.setattr(rest_maps, "QUERIES", 40)
    monkeypatch.setattr(rest_maps, "STEPS", 20)

    def make(spread: float) -> Layer:
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, heads, LENGTH, DIM) for heads in (HEADS * GROUPS, HEADS, HEADS))
        q, scaling = q * spread, DIM**-0.5
        every = {"is_causal": True, "enable_gqa": True, "scale": scaling}
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, **every)
        spec = SimpleNamespace(softmax_kv_heads=(), sinks=2, kept_by_head=lambda count: (4, 0))
        attention = SimpleNamespace(
            scaling=scaling, liger_spec=spec, liger_window=16, keep_score=torch.randn(HEADS, DIM), dense=None,
            o_proj=torch.nn.Linear(HEADS * GROUPS * DIM, 24, bias=False),
        )  # fmt: skip
        return Layer(attention, q, k, q, k, v, heads)

    return make


@torch.no_grad()
def test_equal_logits_are_a_number_and_a_mean_value(layer):
    """And then whatever adds to these adds nothing."""
    found = errors(layer(0.0), 1, learned=False)
    assert found["none"] > 0.1
    for name in ("mean value", "degree 1", "degree 2"):
        assert found[name] < 1e-4, name


@torch.no_grad()
def test_each_order_leaves_less_of_small_logits(layer):
    """On the row that is judged, too: 40 queries fit four numbers well; directions lie between their neighbours."""
    found = errors(layer(0.5), 1, learned=True)
    assert set(found) == set(MAPS)
    assert found["none"] > 5 * found["mean value"] > 20 * found["degree 1"] > 40 * found["degree 2"]
    assert found["degree 2"] < found["degree 1, and 2 in 10 directions"] < found["degree 1"]
    assert found["degree 1"] < found["degree 2 in 10 directions"] and found["degree 1"] < found["learned"]


def test_the_table_compares_layers_with_themselves():
    found = {3: {"none": 0.2, "degree 1": 0.1}, 4: {"none": 0.1, "degree 1": 0.08, "learned": 0.05}}
    assert table(found).rows == [
        ["none", "0", "100%", "100%", "100%", "2"],
        ["degree 1", "1", "65%", "50%", "80%", "2"],
        ["learned", "2", "50%", "50%", "50%", "1"],
    ]
