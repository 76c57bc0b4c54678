"""Half precision as users ask for it: autocast around a float32 model, and `model.to(bfloat16)`."""

import pytest
import torch
from test_model import close, linearized, tokens

from liger_cli.templates.liger_config import LayerSpec, LigerConfigError
from liger_cli.templates.liger_extras import NAMES
from liger_cli.templates.liger_gates import GATES

LEARNED = {
    "gate_params": "learned",
    "feature_params": "learned",
    "branch_scales": True,
    "kept": 12,
    "window": 16,
    "slots": 8,
}


def with_extras(folder, gate: str, **settings):
    """A model with every extra tensor that its gate can have, away from its initial values."""
    settings = {**LEARNED, "gate": gate, **settings}
    try:
        LayerSpec(**settings)
    except LigerConfigError:
        del settings["gate_params"]
    _, model = linearized_with_extras(folder, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in NAMES:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def linearized_with_extras(folder, **settings):
    base, plain = linearized(folder, window=settings["window"])
    config = type(plain.config)(**{**plain.config.to_dict(), "liger": None})
    config.liger = {"format": 1, "layers": [LayerSpec(**settings).to_dict()] * config.num_hidden_layers}
    model = type(plain)(config).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    return base, model


@pytest.mark.parametrize("gate", sorted(GATES))
def test_autocast(tiny_base, gate):
    """A bfloat16 autocast, as Trainer(bf16=True) has it: trains and infers with every gate, states in float32."""
    model = with_extras(tiny_base(), gate)
    ids = tokens(100, batch=2)
    found = []
    for enabled in (False, True):
        model.train()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(ids[:, :60], use_cache=True)
            logits = model(ids[:, 60:61], past_key_values=output.past_key_values).logits
        assert all(x.dtype == torch.float32 for layer in output.past_key_values.layers for x in layer.states)
        found.append((loss.detach(), gradients, logits.float()))
    (loss, gradients, logits), (half_loss, half_gradients, half_logits) = found
    assert abs(half_loss - loss) < 0.01
    assert (half_gradients - gradients).norm() < 0.1 * gradients.norm()
    close(half_logits, logits, 0.05)


@torch.no_grad()
def test_autocast_leaves_gates_and_recurrence_alone(tiny_base):
    """What a layer computes under autocast from rounded projections is what it computes without from the same ones."""
    _, model = linearized(tiny_base(), dtype=torch.bfloat16, window=16, kept=0, normalizer="joint")
    ids = tokens(90)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_identity_under_autocast(tiny_base, attn_implementation):
    """mix 0 and a window that covers the text: the base's logits under the same autocast."""
    base, model = linearized(tiny_base(), mix=0.0, window=200, attn_implementation=attn_implementation)
    ids, mask = tokens(100, batch=2), torch.ones(2, 100, dtype=torch.long)
    mask[1, :30] = 0
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (one(ids, attention_mask=mask).logits for one in (base, model))
    assert torch.equal(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", sorted(GATES))
def test_to_half_precision(tiny_base, gate, dtype):
    """`model.to`, `half` and `bfloat16` leave fitted parameters unrounded, their gradients too, and the model runs."""
    model = with_extras(tiny_base(), gate)
    ids = tokens(80)
    model(ids, labels=ids).loss.backward()
    fitted = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in NAMES}
    before = {n: (p.detach().clone(), None if p.grad is None else p.grad.clone()) for n, p in fitted.items()}
    with torch.no_grad():
        expected = model(ids).logits
    model.to(dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in before else dtype)
        if name in before:
            assert torch.equal(parameter, before[name][0])
            gradient = before[name][1]
            assert parameter.grad is None if gradient is None else parameter.grad.dtype == torch.float32
    with torch.no_grad():
        close(model(ids).logits.float(), expected, 0.05)
    # Up and down again: float64 is not what `to` leaves behind.
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


def test_parameters_cast_behind_its_back(tiny_base):
    """FSDP's mixed precision hands every parameter over in bfloat16: the model runs all the same."""
    model = with_extras(tiny_base(), "kda")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    ids = tokens(40)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
