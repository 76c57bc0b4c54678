"""Inputs of every gate's recurrence, and running its forms on them."""

import torch

from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_rules import Rule


def rms(x) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_rms(actual, expected, least: float = 1e-30) -> float:
    """RMS of the difference over that of `expected`, or over `least` where that is more."""
    return rms(actual.double() - expected) / max(rms(expected), least)


def tuple_of(state):
    return state if isinstance(state, tuple) else (state,)


def example(
    name, length, magnitude, batch=2, query_heads=4, kv_heads=2, dim=16, seed=0, initial=True, spec=None, valid=None
):
    """A gate's recurrence inputs, from keys up to about `magnitude`, and an initial state, in float64.

    Positions where `valid` ([batch, length] bool) is false are padding.
    """
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    spec = spec or LayerSpec(gate=name, slots=8)
    gate = GATES[name]
    q, v = random(batch, query_heads, length, dim), random(batch, kv_heads, length, dim)
    k = random(batch, kv_heads, length, dim)
    k = k / k.abs().amax().clamp_min(1e-9) * magnitude if k.numel() else k
    inputs = gate.inputs(q, k, v, gate.pool(k, spec), spec)
    if valid is not None:
        inputs = inputs.masked(valid)
    if gate.rule.by_slot:
        inputs.k = inputs.k / max(magnitude, 1)
    state = None
    if initial:
        state = tuple(random(batch, kv_heads, *shape) for shape in gate.state_shapes(spec, dim))
        state = tuple(x if gate.rule.by_slot else x[..., : v.shape[-1]] for x in state)
        state = gate.rule.initial(state)
    return gate.rule, gate.rule.arguments(inputs), state


def run(form: str, rule: Rule, inputs, state, dtype, gradients=False):
    """Output, states, and the gradients of a fixed loss of both with regard to the inputs and the initial state.

    Without gradients the operations run as in inference, where a CPU takes other ways through them.
    """
    leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in inputs]
    states = None if state is None else tuple(x.to(dtype).requires_grad_(gradients) for x in tuple_of(state))
    initial = rule.initial(states)
    with torch.set_grad_enabled(gradients):
        output, final = getattr(rule.forms, form)(*leaves, initial_state=initial)
    results = [output, *tuple_of(final)]
    if gradients:
        weights = [torch.linspace(-1, 1, x.numel(), dtype=dtype).view(x.shape) for x in results]
        loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
        found = torch.autograd.grad(loss, leaves + list(states or ()), allow_unused=True)
        results += [torch.zeros(1) if x is None else x for x in found]
    return [x.detach() for x in results]
