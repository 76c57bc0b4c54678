"""The table of gates: each uses the settings that it says, has states of the sizes that it says, by its own head."""

import json
from dataclasses import replace

import pytest
import torch
from test_model import linearized, tokens
from test_precision import linearized_with_extras

from liger_cli.templates.liger_config import LayerSpec, LigerConfigError
from liger_cli.templates.liger_gates import GATES

OTHERWISE = {
    "feature_map": "relu",
    "slots": 8,
    "gate_lower_bound": 0.5,
    "gate_pooling": "max",
    "gate_normalizer": 3.0,
}


@pytest.mark.parametrize("name", sorted(GATES))
def test_settings_are_those_that_change_something(name):
    """What a gate does not name among its settings changes nothing, and is said to; what it names does."""
    gate, generator = GATES[name], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 160, generator=generator) for _ in range(3))

    def computed(spec):
        inputs = gate.inputs(q, k, v, gate.pool(k, spec), spec)
        return [x for x in vars(inputs).values() if x is not None]

    plain = LayerSpec(gate=name)
    assert plain.unused() == []
    for setting, value in OTHERWISE.items():
        spec = replace(plain, **{setting: value})
        pairs = zip(computed(spec), computed(plain), strict=True)
        changed = any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
        assert changed == (setting in gate.settings), setting
        assert spec.unused() == ([] if changed else [setting])
    assert replace(plain, gate_rank=4).unused() == ["gate_rank"]
    # Both settings of the logits' origin matter where the pooled logits do.
    moved = computed_with(gate, q, k, v, plain)
    assert moved == ("gate_source" in gate.settings) == ("gate_params" in gate.settings)


def computed_with(gate, q, k, v, spec) -> bool:
    """Whether other logits give another recurrence."""
    first, second = (gate.inputs(q, k, v, gate.pool(x, spec), spec) for x in (k, v))
    return not torch.equal(first.log_decay, second.log_decay)


@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if "gate_params" not in gate.settings])
def test_fixed_decays_are_not_learned(name):
    with pytest.raises(LigerConfigError, match=f"the decays of `{name}` are fixed"):
        LayerSpec(gate=name, gate_params="learned")


@pytest.mark.parametrize("settings", [{}, {"feature_map": "hedgehog"}, {"feature_params": "learned", "feature_dim": 6}])
@pytest.mark.parametrize("name", sorted(GATES))
@torch.no_grad()
def test_states_are_as_large_as_the_plan_says(tiny_base, name, settings):
    spec = LayerSpec(gate=name, window=8, slots=5, **settings)
    _, model = linearized_with_extras(tiny_base(), gate=name, window=8, slots=5, **settings)
    (first, *_) = model(tokens(20), use_cache=True).past_key_values.layers
    assert [tuple(state.shape[2:]) for state in first.states] == spec_shapes(spec, 16)


def spec_shapes(spec, head_dim: int):
    return GATES[spec.gate].state_shapes(spec, head_dim)


@pytest.mark.parametrize("name", sorted(GATES))
@torch.no_grad()
def test_softmax_heads_do_not_renumber_the_others(tiny_base, name):
    """The states of key/value head 1, one or one a query head, are the same whether head 0 is softmax or not."""
    ids, states = tokens(30), []
    for heads in ((), (0,)):
        _, model = linearized(tiny_base(), gate=name, window=8, slots=8, softmax_kv_heads=heads)
        states.append(model(ids, use_cache=True).past_key_values.layers[0].states)
    for every, rest in zip(*states, strict=True):
        torch.testing.assert_close(rest, every[:, -rest.shape[1] :], rtol=0, atol=1e-6)


def test_convert_says_what_is_of_no_use(tiny_base, liger, tmp_path):
    options = ("--gate", "gsa", "--feature-map", "relu", "--gate-lower-bound", "0.3", "--layer", "0:gate=gla,slots=9")
    done = liger("convert", tiny_base(), tmp_path / "out", *options, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert "--feature-map relu changes nothing with the gate gsa" in notes
    assert "--gate-lower-bound 0.3 changes nothing with the gate gsa" in notes
    assert "--slots 9 changes nothing with the gate gla" in notes
    assert not any("--feature-map" in note and "gla" in note for note in notes)
