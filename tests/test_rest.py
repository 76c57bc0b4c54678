"""The rest state: against its definition, against full attention where it is exact, in models, with gradients.

Tolerance 1e-5: float32 sums of a few hundred terms of size 1, taken in another order.
"""

import json

import pytest
import torch
from test_extras import converted, shaken
from test_model import close, in_pieces, tokens

from liger_cli.checkpoint.model_code import load_model
from liger_cli.templates.liger_branches import Settings, Tokens, mixed_attention
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, check_heads, layer_specs, liger_block
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_rest import rest_attention
from liger_cli.templates.liger_window import Scoring

SCALING, LOWEST = 0.3, torch.finfo(torch.float32).min


def weights(heads: int, dim: int):
    return 0.3 * torch.randn(heads, dim + 3), torch.rand(heads) + 0.5


@pytest.mark.parametrize("gate", ["none", "mamba2", "retnet"])
def test_definition(gate):
    """Sums over the tokens that entered, each token's decay applied when it enters: whole, in pieces, in steps."""
    torch.manual_seed(0)
    length, dim, spec = 90, 8, LayerSpec(rest=True, gate=gate)
    q, plain_q = torch.randn(2, 2, 4, length, dim).unbind()
    keys, values = torch.randn(2, 2, 2, length, dim).unbind()
    there = torch.rand(2, 2, length) > 0.4
    there[0, :, :20] = False
    mass, slope = weights(4, dim)
    pooled = GATES[gate].pool(plain_q if GATES[gate].per_query_head else keys, spec)

    def run(at, states):
        tensors = (x[:, :, at] for x in (q, plain_q, keys, values, there, pooled))
        return rest_attention(*tensors, states, mass, slope, spec, SCALING)

    output, lse, _ = run(slice(None), None)
    for piece in (1, 7, 64):
        states, parts = None, []
        for start in range(0, length, piece):
            *part, states = run(slice(start, start + piece), states)
            parts.append(part)
        for whole, cut in zip((output, lse), zip(*parts, strict=True), strict=True):
            close(torch.cat(cut, dim=2), whole, 1e-5)

    decays = GATES[gate].inputs(pooled, pooled, pooled, pooled, spec).log_decay.double().squeeze(-1)
    for row, head, time in [(r, h, t) for r in (0, 1) for h in range(4) for t in range(0, length, 7)]:
        group = head // 2
        places = [place for place in range(time + 1) if there[row, group, place]]
        if not places:
            assert lse[row, head, time] == LOWEST and not output[row, head, time].any()
            continue
        log_decay = decays[row, head if decays.shape[1] == 4 else group]
        weight = torch.stack([log_decay[[p for p in places if p > place]].sum().exp() for place in places])
        k, v = keys[row, group, places].double(), values[row, group, places].double()
        logits = SCALING * k @ q[row, head, time].double()
        n = weight.sum()
        mean_value, mean_logit = weight @ v / n, weight @ logits / n
        covariance = (weight * logits) @ v / n - mean_logit * mean_value
        close(output[row, head, time].double(), mean_value + slope[head] * covariance, 1e-5)
        terms = torch.cat(
            [torch.stack([torch.ones(()), mean_logit, n.log() - 6]), SCALING**0.5 * plain_q[row, head, time]]
        )
        close(lse[row, head, time].double(), n.log() + mass[head].double() @ terms.double(), 1e-5)


@pytest.mark.parametrize("kept", [0, 5])
@torch.no_grad()
def test_exact_where_the_logits_of_the_rest_are_equal(kept):
    """Keys beyond the window that are all alike: full attention, whatever is kept of them."""
    torch.manual_seed(0)
    spec = LayerSpec(window=16, kept=kept, sinks=2, rest=True, gate="none")
    q, v = torch.randn(1, 4, 80, 8), torch.randn(1, 2, 80, 8)
    k = torch.randn(1, 2, 1, 8).expand(-1, -1, 80, -1).contiguous()
    mass = torch.zeros(4, 11)
    mass[:, 1] = 1
    settings = Settings(spec, 16, 0.0, Scoring(SCALING), rest=(mass, torch.ones(4)))
    scores = torch.randn(1, 2, 80, 1) if kept else None
    found = mixed_attention(Tokens(q, k, v, q, k, torch.zeros(1, 2, 80, 1), scores), settings)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALING, is_causal=True, enable_gqa=True)
    close(found.transpose(1, 2), wanted, 1e-5)


@torch.no_grad()
def test_modes(tiny_base, tmp_path):
    """`exact` is the same layer without a rest state, `window` without kept tokens; a head without one has none."""
    model = shaken(converted(tiny_base(), tmp_path / "rest", kept=6, sinks=2, rest=[True, False], gate="none"))
    without = load_model(converted(tiny_base(), tmp_path / "without", kept=6, sinks=2, mix=0.0), dtype=torch.float32)
    values = model.state_dict()
    without.load_state_dict({name: values[name] for name in without.state_dict()})
    ids = tokens(90, batch=2)
    found = model(ids).logits
    for mode in ("exact", "window"):
        model.set_attention_mode(mode)
        without.set_attention_mode("liger" if mode == "exact" else "window")
        assert torch.equal(model(ids).logits, without.eval()(ids).logits)
        close(in_pieces(model, ids, 13), without(ids).logits)
    model.set_attention_mode("liger")
    assert torch.equal(model(ids).logits, found)
    for attention in model.model.liger_attentions():
        attention.rest_mass[:2, 0] = -1e4  # of the only head that has a state: it takes no part
    without.set_attention_mode("liger")
    close(model(ids).logits, without(ids).logits)


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "gpt_oss"])
@torch.no_grad()
def test_families(tiny_base, tmp_path, model_type):
    settings = {"window": 8, "kept": 4, "sinks": 1, "rest": True, "gate": "mamba2"}
    model = shaken(converted(tiny_base(model_type), tmp_path, **settings))
    ids = tokens(150, batch=2)
    whole = model(ids).logits
    for piece in (1, 23, 70):
        close(in_pieces(model, ids, piece), whole)


def test_gradients(tiny_base, tmp_path):
    """Every parameter gets one, finite; those of the state against differences."""
    model = shaken(converted(tiny_base(), tmp_path, kept=4, sinks=2, rest=True, gate="mamba2")).train()
    ids = tokens(90, batch=2)
    loss = lambda: model(ids, labels=ids, use_cache=False).loss  # noqa: E731
    loss().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
    attention = model.model.layers[-1].self_attn  # whatever changes there changes nobody's choice of kept tokens
    for parameter in (attention.rest_mass, attention.rest_slope):
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            ends = []
            for step in (0.1, -0.1):
                parameter += step * direction
                ends.append(loss().double())
                parameter -= step * direction
        slope = (ends[0] - ends[1]) / 0.2
        assert abs(slope - parameter.grad.norm()) < 0.02 * parameter.grad.norm() + 1e-6


@torch.no_grad()
def test_half_precision(tiny_base, tmp_path):
    """bfloat16: finite, and near float32's logits (8 bits, through four layers)."""
    folder = converted(tiny_base(), tmp_path, kept=4, sinks=2, rest=True, gate="none")
    ids = tokens(90)
    found = load_model(folder, dtype=torch.bfloat16).eval()(ids).logits.float()
    wanted = load_model(folder, dtype=torch.float32).eval()(ids).logits
    assert found.isfinite().all() and (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gate": "gla"}, "gate is 'gla', but has to be one with one decay a head .*: mamba2, mlstm, retention, none"),
        ({"gate": "gdn"}, "gate is 'gdn'"),
        ({"normalizer": "joint"}, "normalizer"),
        ({"branch_scales": True}, "branch_scales"),
        ({"feature_params": "learned"}, "feature_params"),
        ({"window": 0}, "window is 0"),
        ({"rest": [True, 1]}, "rest"),
        ({"rest": "yes"}, "rest"),
        ({"rest": [True, False, True]}, "rest of layer 0 has 3 values"),
    ],
)
def test_what_cannot_be_combined(settings, sentence):
    with pytest.raises(LigerConfigError, match=sentence):
        check_heads([LayerSpec(**{"rest": True, "gate": "none"} | settings)], 2)


def test_json_round_trip():
    spec = LayerSpec(rest=[True, False], gate="none", kept=[1, 2])
    assert layer_specs(json.loads(json.dumps(liger_block([spec]))), 1) == [spec]
    assert LayerSpec(rest=[True, True], gate="none").rest is True
