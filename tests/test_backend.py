"""Which kernels run, why, and that fla's are called in fla's layout. No GPU: fla is a module made here.

The stand-in computes with the definitions of `liger_recurrence` and refuses what fla 0.6's functions refuse: other
names of arguments, other head counts, states that are not float32, odd sizes.
"""

import json
import sys
import types

import pytest
import torch
from recurrence_examples import example, relative_rms, tuple_of
from test_model import linearized

from liger_cli.system.errors import guarded
from liger_cli.templates import liger_backend, liger_branches, liger_recurrence
from liger_cli.templates.liger_backend import LigerBackendError, choose, requested
from liger_cli.templates.liger_branches import Settings, Tokens, kernels_take_documents
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, layer_specs, liger_block
from liger_cli.templates.liger_gates import DECAY, DELTA, GATES, RULES, SLOTS
from liger_cli.templates.liger_rules import Rule
from liger_cli.templates.liger_window import Scoring, window_attention

# float32 sums of some hundred terms; bfloat16 rounds q, k and v to 8 bits, 2^-9 each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def stand_in(rule: Rule, step: bool, decay_name: str):
    """fla's function of a kernel, on the definitions of this project."""

    def function(q, k, v, *, scale, initial_state, output_final_state, cu_seqlens=None, **gates):
        expected = {decay_name} | ({"s"} if rule.by_slot else set(rule.inputs))
        assert set(gates) == expected and scale == 1.0 and output_final_state is (cu_seqlens is None)
        log_decay, states = gates[decay_name], tuple_of(initial_state) if initial_state is not None else ()
        assert log_decay.dtype == torch.float32 and all(state.dtype == torch.float32 for state in states)
        assert q.shape[-1] % 2 == 0 and v.shape[-1] % 2 == 0
        assert q.shape[:2] == k.shape[:2] == v.shape[:2] == log_decay.shape[:2]
        if rule.by_slot:
            assert not step or q.shape[1] == 1
            arguments = [q, k, v, log_decay, gates["s"]]
        else:
            assert q.shape[2] == k.shape[2] == log_decay.shape[2]
            arguments = [q, k, v, log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay]
            arguments += [gates[name].unsqueeze(-1) for name in rule.inputs]
        function.calls += 1
        arguments = [x.float().transpose(1, 2) for x in arguments]
        if cu_seqlens is not None:
            assert not step and len(q) == 1 and initial_state is None
            documents = zip(*(x.tensor_split(cu_seqlens[1:-1], dim=2) for x in arguments), strict=True)
            outputs = [rule.forms.naive(*document)[0] for document in documents]
            return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype), None
        output, final = rule.forms.naive(*arguments, initial_state=initial_state)
        return output.transpose(1, 2).to(v.dtype), list(final) if rule.by_slot else final

    function.calls = 0
    return function


@pytest.fixture
def fla(monkeypatch):
    """The stand-in as `fla`; returns its functions by name."""
    modules = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops")}
    modules["fla"].__version__ = "0.6.0"
    functions = {}
    for rule, kernel in [(one, kernel) for one in RULES for kernel in one.kernels.values()]:
        module = modules[kernel.module] = types.ModuleType(kernel.module)
        for name, step in ((kernel.chunk, False), (kernel.step, True)):
            functions[name] = stand_in(rule, step, kernel.step_decay if step else "g")
            setattr(module, name, functions[name])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    clear()
    yield functions
    clear()


@pytest.fixture
def nothing_installed(monkeypatch):
    """Neither fla nor flash-attn can be imported."""
    for name in ("fla", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    clear()
    yield
    clear()


def clear():
    for function in (choose, liger_backend.fla_functions, liger_backend.flash_attn_function):
        function.cache_clear()


def chosen(rule, inputs, on_cuda=True, dtype=torch.float32):
    return choose(rule, *rule.kind(inputs[0], inputs[3]), on_cuda, "auto", dtype)


def in_float32(rule, inputs, state):
    leaves = [x.float().requires_grad_() for x in inputs]
    states = None if state is None else tuple(x.float().requires_grad_() for x in tuple_of(state))
    return leaves, states, rule.initial(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("name", sorted(GATES))
def test_chunks_in_fla_layout(fla, name, initial, dtype):
    """Outputs, states and gradients are the definition's; head sizes that fla does not take are padded."""
    for groups, dim in ((1, 16), (3, 9)):
        spec = LayerSpec(gate=name, slots=16)
        rule, inputs, state = example(
            name, 20, 2.0, query_heads=2 * groups, kv_heads=2, dim=dim, initial=initial, spec=spec
        )
        choice = chosen(rule, inputs, dtype=dtype)
        assert choice.backend == "fla"
        leaves, states, first = in_float32(rule, inputs, state)
        results = {}
        for form, function in (("fla", choice.chunk), ("naive", rule.forms.naive)):
            output, final = function(*leaves, first)
            found = [output, *tuple_of(final)]
            loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in found)
            found += torch.autograd.grad(loss, leaves + list(states or ()), allow_unused=True)
            results[form] = found
        for actual, expected in zip(*results.values(), strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                assert actual.shape == expected.shape and actual.dtype == torch.float32
                assert relative_rms(actual.detach(), expected.detach().double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", sorted(GATES))
def test_steps_in_fla_layout(fla, name):
    """One token: the query heads of a group read one state, which is handed over as it is."""
    for groups in (1, 3):
        spec = LayerSpec(gate=name, slots=16)
        rule, inputs, state = example(name, 1, 2.0, query_heads=2 * groups, kv_heads=2, dim=12, spec=spec)
        leaves, _, first = in_float32(rule, inputs, state)
        with torch.no_grad():
            output, final = chosen(rule, inputs).step(*leaves, first)
            expected, *wanted = rule.forms.step(*leaves, first)
        assert sum(function.calls for function in fla.values()) == 1
        assert next(n for n, function in fla.items() if function.calls).startswith("fused_recurrent")
        for actual, e in zip([output, *tuple_of(final)], [expected, *tuple_of(wanted[0])], strict=True):
            assert actual.shape == e.shape
            torch.testing.assert_close(actual, e, atol=1e-5, rtol=1e-5)
        # With gradients the step is torch's: fla has none for the delta rule.
        output, _ = chosen(rule, inputs).step(*leaves, first)
        assert output.requires_grad and sum(function.calls for function in fla.values()) == 1
        for function in fla.values():
            function.calls = 0


@pytest.mark.parametrize("name", sorted(GATES))
def test_nothing_to_compute(fla, name):
    """No tokens or no rows are not for a kernel."""
    for length, batch in ((0, 2), (3, 0)):
        rule, inputs, state = example(name, length, 1.0, batch=batch, spec=LayerSpec(gate=name, slots=16))
        output, _ = chosen(rule, inputs).chunk(*inputs, state)
        assert output.shape == inputs[0].shape[:3] + inputs[2].shape[-1:]
    assert not any(function.calls for function in fla.values())


def test_decays_below_float32_are_zero(fla):
    """A log decay of -1e30 is handed over as one whose exp is 0 as well: fla adds them up inside a chunk."""
    rule, inputs, _ = example("rwkv6", 40, 60.0, initial=False)
    inputs = [x.float() for x in inputs]
    assert inputs[3].min() < -1e20
    output, _ = chosen(rule, inputs).chunk(*inputs)
    torch.testing.assert_close(output, liger_recurrence.chunk_decay(*inputs)[0], atol=1e-6, rtol=1e-5)


def test_on_a_cpu_nothing_is_imported(nothing_installed, monkeypatch):
    monkeypatch.setattr(liger_backend.importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    assert choose(DECAY, False, 64, None, False).backend == "torch"
    assert liger_backend.describe_window(False) == ("torch", "the tensors are not on a CUDA device")
    q = torch.randn(1, 2, 40, 16, dtype=torch.bfloat16)
    window_attention(q, q, q, 16, Scoring(0.25))


def test_missing_or_broken(nothing_installed, monkeypatch):
    """Where fla cannot be used, the reason says what to install."""
    assert "flash-linear-attention is not installed; pip install" in choose(DECAY, True, 64, None, True).why
    assert "flash-attn is not installed; pip install" in liger_backend.describe_window(True)[1]
    old = types.ModuleType("fla")
    old.__version__ = "0.4.1"
    monkeypatch.setitem(sys.modules, "fla", old)
    clear()
    assert "0.4.1, but has to be 0.6 or newer" in choose(DECAY, True, 64, None, True).why
    old.__version__ = "0.6.1"
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    clear()
    assert "fla.ops.gla, which fla needs" in choose(DECAY, False, 64, None, True).why
    broken = types.ModuleType("fla.ops.gla")
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(RuntimeError("0 active drivers ([])"))
    monkeypatch.setitem(sys.modules, "fla.ops.gla", broken)
    clear()
    assert "cannot be imported (RuntimeError: 0 active drivers ([]))" in choose(DECAY, False, 64, None, True).why


def test_sizes_that_fla_has_no_kernel_for(fla):
    choice = choose(DELTA, True, 320, None, True)
    assert choice.backend == "torch" and "at most 256 dimensions, not 320" in choice.why
    choice = choose(SLOTS, False, 64, 24, True)
    assert choice.backend == "torch" and "a multiple of 16 slots only, not 24" in choice.why


def test_forced(fla, monkeypatch, capsys):
    assert choose(DECAY, False, 64, None, True, "torch").backend == "torch"
    assert choose(DECAY, False, 64, None, True, "fla").backend == "fla"
    with pytest.raises(LigerBackendError, match="fla was asked for, but the tensors are not on a CUDA device"):
        choose(DECAY, False, 64, None, False, "fla")
    with pytest.raises(LigerBackendError, match="at most 256"):
        choose(DELTA, True, 512, None, True, "fla")
    monkeypatch.setenv("LIGER_BACKEND", "cuda")
    with pytest.raises(LigerBackendError, match="LIGER_BACKEND is 'cuda', but has to be one of auto, torch, fla"):
        requested()
    assert guarded(requested) == 4
    assert capsys.readouterr().err == "liger: LIGER_BACKEND is 'cuda', but has to be one of auto, torch, fla\n"


def test_environment_beats_the_config(monkeypatch):
    assert requested("torch") == "torch"
    monkeypatch.setenv("LIGER_BACKEND", "auto")
    assert requested("torch") == "auto"
    monkeypatch.setenv("LIGER_BACKEND", "")
    assert requested("torch") == "torch"


def test_config_block():
    """`backend` stands beside the layers, is kept, and is checked."""
    block = liger_block([LayerSpec(backend="torch"), LayerSpec(kind="softmax", backend="torch")])
    assert block["backend"] == "torch" and "backend" not in block["layers"][0]
    specs = layer_specs(json.loads(json.dumps(block)), 2)
    assert [spec.backend for spec in specs] == ["torch", "torch"] and liger_block(specs) == block
    assert "backend" not in liger_block([LayerSpec()])
    with pytest.raises(LigerConfigError, match="config.liger: backend is 'gpu'"):
        layer_specs({**block, "backend": "gpu"}, 2)
    with pytest.raises(LigerConfigError, match="backend"):
        layer_specs({"format": 1, "layers": [{"kind": "liger", "backend": "fla"}]}, 1)


def test_a_model_that_asks_for_fla_on_a_cpu(tiny_base, tmp_path, liger):
    """The config's value reaches the layers: one sentence, not a silent fallback."""
    done = liger("convert", tiny_base(), tmp_path / "model")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["liger"]["backend"] = "fla"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = liger("bench", tmp_path / "model", "--seq-len", "16", "--device", "cpu")
    assert done.returncode == 4
    assert "the backend fla was asked for, but the tensors are not on a CUDA device; use auto or torch" in done.stderr
    done = liger("bench", tmp_path / "model", "--seq-len", "16", "--format", "json", env={"LIGER_BACKEND": "torch"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"]["requested"] == "torch"


@pytest.fixture
def flash_documents(monkeypatch):
    """A stand-in for flash-attn's function of documents; returns its calls."""
    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, window_size, softmax_scale, **rest
    ):
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k) and rest["causal"]
        assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k and window_size[1] == 0
        calls.append(cu_seqlens_q.tolist())
        outputs = []
        for heads in zip(*(x.tensor_split(cu_seqlens_q[1:-1].long()) for x in (q, k, v)), strict=True):
            heads = [x.transpose(0, 1).unsqueeze(0).float() for x in heads]
            outputs.append(window_attention(*heads, window_size[0] + 1, Scoring(softmax_scale))[0])
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).to(q.dtype)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("name", sorted(GATES))
def test_packed_documents_by_kernels(fla, flash_documents, tiny_base, monkeypatch, name):
    """One call of each kernel a layer, which is told where documents and padding begin; logits and gradients are those
    of documents by themselves (bfloat16: 2^-9 in each of some roundings)."""
    settings = LayerSpec(gate=name, window=16, slots=16)
    _, model = linearized(tiny_base(head_dim=16), specs=[settings] * 4)
    model = model.bfloat16()
    ids = torch.randint(4, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    numbers = torch.ones(2, 60, dtype=torch.long)
    numbers[0, 23:], numbers[1, 1:30], numbers[1, 30:] = 2, 2, 0
    found = []
    for on_cuda in (False, True):
        for module in (liger_backend, liger_branches):
            monkeypatch.setattr(module, "on_cuda", lambda x, answer=on_cuda: answer)
        logits = model(ids, attention_mask=numbers, use_cache=False).logits[numbers > 0]
        weight = model.model.layers[0].self_attn.k_proj.weight
        found.append((logits.detach().float(), torch.autograd.grad(logits.float().square().mean(), weight)[0].float()))
        assert len(flash_documents) == 4 * on_cuda
    assert flash_documents[0] == [0, 23, 60, 61, 90, 120]
    chunks = {name: function.calls for name, function in fla.items() if function.calls}
    assert list(chunks.values()) == [4] and next(iter(chunks)).startswith("chunk")
    for actual, expected in zip(*found, strict=True):
        assert relative_rms(actual, expected.double()) < 3e-2


def test_documents_that_kernels_do_not_know(fla, flash_documents, tiny_base, monkeypatch):
    """With sinks, or without flash-attn, the documents run side by side, as on a CPU."""
    for module in (liger_backend, liger_branches):
        monkeypatch.setattr(module, "on_cuda", lambda x: True)
    width = 16
    tokens = lambda: Tokens(*(torch.zeros(1, 2, 4, width, dtype=torch.bfloat16) for _ in range(6)))  # noqa: E731
    takes = lambda **spec: kernels_take_documents(tokens(), Settings(LayerSpec(**spec), 16, 0.5, Scoring(0.25)))  # noqa: E731
    assert takes()
    for spec in ({"sinks": 4}, {"normalizer": "joint"}, {"backend": "torch"}):
        assert not takes(**spec), spec
    width = 192  # of which hedgehog makes 384, more than the kernels of the delta rules take
    assert takes(gate="gdn") and takes(feature_map="hedgehog") and not takes(gate="gdn", feature_map="hedgehog")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    clear()
    assert not takes()


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_window_by_flash_attn(monkeypatch):
    """flash-attn gets its own layout, unrepeated keys and the window's width, and only what it can do."""
    calls = []

    def flash_attn_func(q, k, v, *, dropout_p, softmax_scale, causal, window_size, softcap):
        assert causal and window_size == (15, 0) and dropout_p == 0.0 and k.shape[2] == 2 and q.shape[2] == 4
        calls.append(softcap)
        heads = [x.transpose(1, 2).as_subclass(torch.Tensor) for x in (q, k, v)]
        return window_attention(*heads, 16, Scoring(softmax_scale, softcap or None))[0].transpose(1, 2)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    clear()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    expected = window_attention(q[:, :, 20:], k, v, 16, Scoring(0.25))[0]
    fake = [x.as_subclass(OnCuda) for x in (q[:, :, 20:], k, v)]
    assert torch.equal(window_attention(*fake, 16, Scoring(0.25))[0].as_subclass(torch.Tensor), expected)
    assert len(calls) == 1
    window_attention(*fake, 16, Scoring(0.25, 20.0))
    assert calls[1:] == [20.0]
    window_attention(*fake, 16, Scoring(0.25), backend="torch")
    window_attention(*(x.float().as_subclass(OnCuda) for x in fake), 16, Scoring(0.25))
    window_attention(*fake, 16, Scoring(0.25), valid=torch.ones(2, 50, dtype=torch.bool))
    window_attention(*fake, 16, Scoring(0.25), need_lse=True)
    assert len(calls) == 2
    clear()
