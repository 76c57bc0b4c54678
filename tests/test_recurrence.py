"""The recurrences against their definition in float64: outputs, final states and gradients, by relative RMS error.

float64 to 1e-10. float32 to 1e-5: some hundred roundings of 2^-24, in sums over a chunk of 64 and exponents up to 15.
"""

import os

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recurrence_examples import example, relative_rms, rms, run, tuple_of

from liger_cli.templates import liger_recurrence as recurrence
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES

# The nox session `fuzz` asks for many more.
FUZZ_EXAMPLES = int(os.environ.get("LIGER_FUZZ_EXAMPLES", "60"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LENGTHS = (1, 2, 63, 64, 65, 200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("magnitude", [1.0, 20.0, 300.0])
@pytest.mark.parametrize("name", sorted(GATES))
def test_chunked_is_the_definition(name, magnitude, dtype):
    for length in LENGTHS:
        for initial in (False, True):
            rule, inputs, state = example(name, length, magnitude, initial=initial)
            expected = run("naive", rule, inputs, state, torch.float64, gradients=True)
            actual = run("chunk", rule, inputs, state, dtype, gradients=True)
            for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
                assert a.isfinite().all()
                assert relative_rms(a, e) < TOLERANCE[dtype], (length, initial, index)


@pytest.mark.parametrize("magnitude", [1.0, 300.0])
@pytest.mark.parametrize("name", sorted(GATES))
def test_pieces_carry_the_state(name, magnitude):
    """Chunks of a first part, then single steps, then chunks again: one text."""
    rule, inputs, state = example(name, 150, magnitude)
    expected, *final = run("naive", rule, inputs, state, torch.float64)
    outputs = []
    for start, stop in ((0, 70), (70, 71), (71, 72), (72, 150)):
        part = [x[:, :, start:stop] for x in inputs]
        form = "step" if stop - start == 1 else "chunk"
        output, state = getattr(rule.forms, form)(*part, state)
        outputs.append(output)
    assert relative_rms(torch.cat(outputs, 2), expected) < 1e-10
    for actual, wanted in zip(tuple_of(state), final, strict=True):
        assert relative_rms(actual, wanted) < 1e-10


@pytest.mark.parametrize("name", sorted(GATES))
def test_long_text_in_pieces(name, monkeypatch):
    """Without gradients the text is worked through in pieces; the result is that of one piece."""
    rule, inputs, state = example(name, 500, 20.0)
    expected = run("chunk", rule, inputs, state, torch.float64)
    monkeypatch.setattr(recurrence, "PIECE_SIZE", 128)
    with torch.no_grad():
        actual = run("chunk", rule, inputs, state, torch.float64)
    for a, e in zip(actual, expected, strict=True):
        assert relative_rms(a, e) < 1e-10


@pytest.mark.parametrize("name", sorted(GATES))
def test_empty(name):
    """No tokens, or no rows: the state passes through."""
    for length, batch in ((0, 2), (3, 0)):
        rule, inputs, state = example(name, length, 1.0, batch=batch)
        output, final = rule.forms.chunk(*inputs, state)
        assert output.shape == inputs[0].shape[:3] + inputs[2].shape[-1:]
        for a, e in zip(tuple_of(final), tuple_of(state), strict=True):
            assert a.shape == e.shape and (length > 0 or torch.equal(a, e))


@pytest.mark.parametrize("name", sorted(GATES))
def test_masked_positions_change_nothing(name):
    """Padding neither writes nor decays: the state after it is the state before it."""
    spec = LayerSpec(gate=name, slots=8)
    gate, generator = GATES[name], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    valid = torch.rand(2, 70, generator=generator) > 0.4
    inputs = gate.rule.arguments(gate.inputs(q, k, v, gate.pool(k, spec), spec).masked(valid))
    output, final = gate.rule.forms.chunk(*inputs)
    for row in range(2):
        kept = [x[row : row + 1, :, valid[row]] for x in inputs]
        alone, state = gate.rule.forms.chunk(*kept)
        assert relative_rms(output[row : row + 1, :, valid[row]], alone) < 1e-10
        for a, e in zip(tuple_of(final), tuple_of(state), strict=True):
            assert relative_rms(a[row : row + 1], e) < 1e-10


def padding(kind: str, batch: int, length: int, seed: int):
    """[batch, length] bool, false at padding, or None."""
    if kind == "none":
        return None
    generator, place = torch.Generator().manual_seed(seed), torch.arange(length)
    if kind == "anywhere":
        return torch.rand(batch, length, generator=generator) > 0.4
    kept = torch.randint(0, length + 1, (batch, 1), generator=generator)
    return place >= length - kept if kind == "left" else place < kept


@settings(max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@hypothesis.example("mamba2", 58, 1.0, 1, 3, 1, 1, 3, False, "anywhere", 0.0, False)  # 0.05, of 58 tokens of 1
@given(
    name=st.sampled_from(sorted(GATES)),
    length=st.integers(1, 140),
    magnitude=st.sampled_from([0.0, 1e-40, 1e-30, 1.0, 10.0, 100.0, 300.0]),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 8, 24]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**16),
    initial=st.booleans(),
    pad=st.sampled_from(["none", "left", "right", "anywhere"]),
    cut=st.floats(0, 1),
    gradients=st.booleans(),
)
def test_fuzz(name, length, magnitude, kv_heads, groups, dim, batch, seed, initial, pad, cut, gradients):
    """Any shape, length, magnitude, state and padding, cut in two anywhere: chunked = naive, in float64 and float32."""
    rule, inputs, state = example(
        name, length, magnitude, batch, kv_heads * groups, kv_heads, dim, seed, initial,
        valid=padding(pad, batch, length, seed),
    )  # fmt: skip
    expected = run("naive", rule, inputs, state, torch.float64, gradients)
    # A state of one number may cancel out: its error is then one of what a token adds.
    floor = max(rms(inputs[1]) * rms(inputs[2]), 1e-30) if dim == 1 else 1e-30
    for dtype, tolerance in TOLERANCE.items():
        values = 3 if rule.by_slot else 2
        # A gradient may cancel out: its error is then one of the others' size.
        least = max((0.1 * rms(e) for e in expected[values:]), default=0.0)
        for index, (a, e) in enumerate(zip(run("chunk", rule, inputs, state, dtype, gradients), expected, strict=True)):
            assert a.isfinite().all()
            assert relative_rms(a, e, max(least, 1e-30) if index >= values else floor) < tolerance
        middle = int(cut * length)
        output, *final = run("chunk", rule, [x[:, :, :middle] for x in inputs], state, dtype)
        then = rule.initial(tuple(final))
        rest, *final = run("chunk", rule, [x[:, :, middle:] for x in inputs], then, dtype)
        for a, e in zip([torch.cat([output, rest], 2), *final], expected[: 1 + len(final)], strict=True):
            assert relative_rms(a, e, floor) < tolerance
