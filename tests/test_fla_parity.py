"""The recurrences against fla's own definitions: outputs, final states and gradients, for every gate.

fla's naive functions are plain torch in float32, each in a file of its own: importing fla needs Triton, loading the
file does not. float32 against float64 agrees to 1e-5, relative RMS.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from recurrence_examples import example, relative_rms, run, tuple_of

from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_rules import Rule

# By rule, and whether a head has one decay: fla's operation and function.
DEFINITIONS = {
    ("decay", True): ("simple_gla", "naive_recurrent_simple_gla"),
    ("decay", False): ("gla", "naive_recurrent_gla"),
    ("delta", True): ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
    ("delta", False): ("kda", "naive_recurrent_kda"),
    ("slots", False): ("gsa", "naive_recurrent_gsa"),
}


def definition(operation: str, function: str):
    """A naive function of fla, by its file."""
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("fla-core is not installed")
    path = Path(found.submodule_search_locations[0], "ops", operation, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def by_fla(rule: Rule, inputs, states):
    """Output and final states of fla's definition, in our layout. fla has the heads behind the tokens."""
    q, k, v, log_decay, *rest = (x.transpose(1, 2) for x in inputs)
    groups = q.shape[2] // k.shape[2]
    one_decay, *_ = rule.kind(q, log_decay)
    function = definition(*DEFINITIONS[rule.name, one_decay])
    shared = lambda x: x.repeat_interleave(groups, dim=2)  # noqa: E731
    if rule.by_slot:
        output, final = function(q, k, v, rest[0], log_decay, 1.0, states, output_final_state=True)
        return output.transpose(1, 2), *final
    k, v, log_decay = shared(k), shared(v), shared(log_decay)
    log_decay = log_decay.squeeze(-1) if one_decay else log_decay
    initial = None if states is None else states[0].repeat_interleave(groups, dim=1)
    if rule.inputs:
        beta = shared(rest[0]).squeeze(-1)
        given = (q, k, v, log_decay, beta) if not one_decay else (q, k, v, beta, log_decay)
        output, final = function(*given, scale=1.0, initial_state=initial, output_final_state=True)
    else:
        q = q * q.shape[-1] ** 0.5  # both scale queries down
        output, final = function(q, k, v, log_decay, initial_state=initial, output_final_state=True)
    # The query heads of a group have one state between them; each row of fla's gives its share of the gradient.
    return output.transpose(1, 2), final.unflatten(1, (-1, groups)).mean(2)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", sorted(GATES))
def test_gate_is_flas(name, groups, initial):
    """The naive form and the chunked one, of a text longer than a chunk."""
    spec = LayerSpec(gate=name, slots=8)
    rule, inputs, state = example(name, 70, 3.0, query_heads=2 * groups, kv_heads=2, dim=8, initial=initial, spec=spec)
    leaves = [x.float().requires_grad_() for x in inputs]
    states = None if state is None else tuple(x.float().requires_grad_() for x in tuple_of(state))
    results = list(by_fla(rule, leaves, states))
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in results]
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    given = torch.autograd.grad(loss, leaves + list(states or ()), allow_unused=True)
    expected = results + [torch.zeros(1) if x is None else x for x in given]
    for form in ("naive", "chunk"):
        actual = run(form, rule, inputs, state, torch.float64, gradients=True)
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert ours.shape == theirs.shape
            assert relative_rms(theirs.detach().double(), ours) < 1e-5, (form, index)
