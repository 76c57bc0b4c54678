"""fla's and flash-attn's kernels against the definitions, on a CUDA device: pytest -m gpu.

Relative RMS errors. Triton's float32 products are TF32, 10 bits after the point: 2^-11 for each factor, and sums over a
text that add up to some 1e-3; 5e-3 for outputs and states and 2e-2 for gradients, which pass through two such chains.
The one-token kernels have no such products: 1e-5. bfloat16 has 8 bits: 2e-2, gradients 5e-2.
"""

import pytest
import torch
from recurrence_examples import example, relative_rms, run, tuple_of
from test_model import linearized

from liger_cli.templates.liger_backend import choose, flash_attn_function
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_window import Scoring, window_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {torch.float32: (5e-3, 2e-2), torch.bfloat16: (2e-2, 5e-2)}


def on_fla(rule, inputs, dtype=torch.float32):
    pytest.importorskip("fla")
    choice = choose(rule, *rule.kind(inputs[0], inputs[3]), True, "fla", dtype)
    assert choice.backend == "fla"
    return choice


def on_device(rule, inputs, state, gradients):
    leaves = [x.float().cuda().requires_grad_(gradients) for x in inputs]
    states = None if state is None else tuple(x.float().cuda().requires_grad_(gradients) for x in tuple_of(state))
    return leaves, states, rule.initial(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", sorted(GATES))
def test_chunks(name, groups, initial, dtype):
    """Outputs, final states and gradients over a length that is no multiple of a chunk."""
    outputs, gradients = TOLERANCE[dtype]
    for length, dim in ((150, 64), (64, 128), (1, 64)):
        spec = LayerSpec(gate=name, slots=64)
        sizes = {"query_heads": 2 * groups, "kv_heads": 2, "dim": dim, "initial": initial, "spec": spec}
        rule, inputs, state = example(name, length, 2.0, **sizes)
        expected = run("naive", rule, inputs, state, torch.float64, gradients=True)
        leaves, states, first = on_device(rule, inputs, state, gradients=True)
        output, final = on_fla(rule, leaves, dtype).chunk(*leaves, first)
        found = [output, *tuple_of(final)]
        values = len(found)
        loss = sum((x * torch.linspace(-1, 1, x.numel(), device="cuda").view(x.shape)).sum() for x in found)
        found += torch.autograd.grad(loss, leaves + list(states or ()), allow_unused=True)
        for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            actual = torch.zeros(1) if actual is None else actual.detach().cpu()
            assert actual.isfinite().all()
            tolerance = outputs if index < values else gradients
            assert relative_rms(actual, wanted) < tolerance, (length, index)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", sorted(GATES))
def test_steps(name, groups):
    spec = LayerSpec(gate=name, slots=64)
    rule, inputs, state = example(name, 1, 2.0, query_heads=2 * groups, kv_heads=2, dim=64, spec=spec)
    leaves, _, first = on_device(rule, inputs, state, gradients=False)
    with torch.no_grad():
        output, final = on_fla(rule, leaves).step(*leaves, first)
    wanted, states = rule.forms.step(*inputs, state)
    for actual, e in zip([output, *tuple_of(final)], [wanted, *tuple_of(states)], strict=True):
        assert relative_rms(actual.cpu(), e) < 1e-5


@pytest.mark.parametrize("name", sorted(GATES))
def test_steps_go_on_from_chunks(name):
    """A text of 100 tokens at once, then 10 one by one, is a text of 110."""
    spec = LayerSpec(gate=name, slots=64)
    rule, inputs, _ = example(name, 110, 20.0, query_heads=4, kv_heads=2, dim=64, initial=False, spec=spec)
    expected, *states = run("naive", rule, inputs, None, torch.float64)
    leaves, _, _ = on_device(rule, inputs, None, gradients=False)
    choice, outputs = on_fla(rule, leaves), []
    with torch.no_grad():
        output, final = choice.chunk(*(x[:, :, :100] for x in leaves))
        outputs.append(output)
        for t in range(100, 110):
            output, final = choice.step(*(x[:, :, t : t + 1] for x in leaves), final)
            outputs.append(output)
    assert relative_rms(torch.cat(outputs, 2).cpu(), expected) < 5e-3
    for actual, wanted in zip(tuple_of(final), states, strict=True):
        assert relative_rms(actual.cpu(), wanted) < 5e-3


@pytest.mark.parametrize("magnitude", [20.0, 300.0])
@pytest.mark.parametrize("name", sorted(GATES))
def test_large_keys(name, magnitude):
    """Decays down to exp(-300) and below: no NaN, and still the definition's."""
    spec = LayerSpec(gate=name, slots=64)
    rule, inputs, _ = example(name, 200, magnitude, dim=64, initial=False, spec=spec)
    expected, *_ = run("naive", rule, inputs, None, torch.float64)
    leaves, _, _ = on_device(rule, inputs, None, gradients=False)
    output, _ = on_fla(rule, leaves).chunk(*leaves)
    assert output.isfinite().all() and relative_rms(output.cpu(), expected) < 5e-3


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_window(dtype, tolerance, softcap):
    """flash-attn's window and torch's are the same tokens: outputs and gradients, with keys from before the queries."""
    if flash_attn_function()[0] is None:
        pytest.skip("needs flash-attn")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 64, generator=generator) for heads, n in ((8, 200), (2, 263), (2, 263)))
    results = {}
    for backend, device, kind in (("auto", "cuda", dtype), ("torch", "cpu", torch.float64)):
        leaves = [x.to(dtype).to(device, kind).requires_grad_() for x in (q, k, v)]
        output, _ = window_attention(*leaves, 64, Scoring(0.125, softcap), backend=backend)
        results[backend] = [output, *torch.autograd.grad(output.float().square().sum(), leaves)]
    for actual, expected in zip(results["auto"], results["torch"], strict=True):
        assert relative_rms(actual.detach().cpu(), expected.detach()) < 2 * tolerance


@pytest.mark.parametrize("name", sorted(GATES))
def test_packed_documents(name, tiny_base, monkeypatch):
    """By kernels that are told where documents begin, and side by side: logits and gradients (bfloat16, TF32)."""
    pytest.importorskip("fla")
    if flash_attn_function("flash_attn_varlen_func")[0] is None:
        pytest.skip("needs flash-attn")
    _, model = linearized(tiny_base(head_dim=32), specs=[LayerSpec(gate=name, window=16, slots=16)] * 4)
    model = model.to("cuda", torch.bfloat16)
    ids = torch.randint(4, 128, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    numbers = torch.ones_like(ids)
    numbers[0, 23:], numbers[1, 1:130], numbers[1, 130:] = 2, 2, 0
    found = []
    for backend in ("auto", "torch"):
        monkeypatch.setenv("LIGER_BACKEND", backend)
        logits = model(ids, attention_mask=numbers, use_cache=False).logits[numbers > 0].float()
        weight = model.model.layers[0].self_attn.k_proj.weight
        found.append((logits.detach().cpu(), torch.autograd.grad(logits.square().mean(), weight)[0].float().cpu()))
    for actual, expected in zip(*found, strict=True):
        assert relative_rms(actual, expected) < 1e-1


@pytest.mark.parametrize("name", sorted(GATES))
def test_model(name, tiny_base, tmp_path, monkeypatch):
    """A whole model gives the same logits on either backend (bfloat16, 1e-1 of their spread)."""
    pytest.importorskip("fla")
    from liger_cli.checkpoint.model_code import load_model
    from liger_cli.commands.convert import convert

    convert(str(tiny_base(head_dim=32)), str(tmp_path / "model"), settings={"gate": name})
    model = load_model(tmp_path / "model", dtype=torch.bfloat16).cuda().eval()
    ids = torch.randint(4, 128, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    logits = {}
    for backend in ("fla", "torch"):
        monkeypatch.setenv("LIGER_BACKEND", backend)
        with torch.no_grad():
            logits[backend] = model(input_ids=ids).logits.float().cpu()
    assert logits["fla"].isfinite().all()
    assert relative_rms(logits["fla"], logits["torch"].double()) < 0.1
