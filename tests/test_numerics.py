"""Long texts and hostile keys: no NaN, no Inf, and still the definition's result, in every dtype a model comes in.

The recurrence works in float32 whatever the model's dtype is, so half precision only rounds what goes in and out. It is
compared with the same chunks in float64 over the whole text, and with the definition from the state in its middle.
"""

import pytest
import torch
from recurrence_examples import relative_rms, tuple_of

from liger_cli.templates.liger_branches import Settings, Tokens, mixed_attention
from liger_cli.templates.liger_cache import LigerCacheLayer
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_window import Scoring

SHORT, LONG = 1500, 131072
HALF = (torch.bfloat16, torch.float16)
# float32 over thousands of chunks: a rounding of 2^-24 for each, adding up as they go for a memory that never decays.
TOLERANCE = 1e-4


def adversarial(kind: str, length: int, dim: int = 16, heads: int = 2, seed: int = 0):
    """q [1, heads, T, D]; k and v [1, 1, T, D], float32."""
    generator = torch.Generator().manual_seed(seed)
    q, noise, v = (torch.randn(1, n, length, dim, generator=generator) for n in (heads, 1, 1))
    if kind == "normal":
        k = noise
    elif kind == "large":
        k = 300.0 * noise.sign()
    elif kind == "equal":
        k = noise[:, :, :1].expand(-1, -1, length, -1).clone() if length else noise
    elif kind == "one hot":
        k = 30.0 * torch.nn.functional.one_hot(noise.argmax(-1), dim).float()
    elif kind == "denormal":
        k = 1e-40 * noise
    else:  # turns: long stretches that keep everything, then ones that forget everything
        turn = (torch.arange(length) // 100 % 2 * 2 - 1).float()
        k = 300.0 * turn[:, None].expand(1, 1, length, dim)
    return q, k, v


KINDS = ("normal", "large", "equal", "one hot", "denormal", "turns")


def scan(name: str, kind: str, length: int) -> None:
    """One text through the recurrence: finite, as in float64, and as the definition goes on from the middle."""
    spec = LayerSpec(gate=name, slots=8)
    gate = GATES[name]
    q, k, v = adversarial(kind, length)
    inputs = gate.rule.arguments(gate.inputs(q, k, v, gate.pool(k, spec), spec))
    _, chunk, step = gate.rule.forms
    with torch.no_grad():
        output, final = chunk(*inputs)
        exact = [x.double() for x in inputs]
        expected, wanted = chunk(*exact)
        for actual, e in zip([output, *tuple_of(final)], [expected, *tuple_of(wanted)], strict=True):
            assert actual.isfinite().all()
            assert relative_rms(actual, e) < TOLERANCE
        middle = length // 2
        _, states = chunk(*(x[:, :, :middle] for x in exact))
        for t in range(middle, min(middle + 80, length)):
            single, states = step(*(x[:, :, t : t + 1] for x in exact), states)
            torch.testing.assert_close(single, expected[:, :, t : t + 1], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(GATES))
def test_scan(name, kind):
    scan(name, kind, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(GATES))
def test_scan_of_128k_tokens(name, kind):
    scan(name, kind, LONG)


def attend(name, q, k, v, valid=None, cache=None, **settings):
    spec = LayerSpec(gate=name, slots=8, **settings)
    gate = GATES[name].pool(k, spec)
    settings = Settings(spec, window=64, mix=0.5, scoring=Scoring(q.shape[-1] ** -0.5))
    return mixed_attention(Tokens(q, k, v, q, k, gate), settings, valid, cache)


def layer(name: str, kind: str, dtype, length: int) -> None:
    """Both branches of a layer in half precision: finite, and near the float32 layer of the same numbers."""
    q, k, v = (x.to(dtype) for x in adversarial(kind, length))
    with torch.no_grad():
        output = attend(name, q, k, v)
        assert output.dtype == dtype and output.isfinite().all()
        expected = attend(name, q.float(), k.float(), v.float())
    # 8 bits of bfloat16, 10 of float16, rounded in the window's weights, its output and the sum.
    assert relative_rms(output.float(), expected.double()) < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(GATES))
def test_layer_in_half_precision(name, kind, dtype):
    layer(name, kind, dtype, 700)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(GATES))
def test_layer_of_128k_tokens_in_half_precision(name, kind, dtype):
    layer(name, kind, dtype, LONG)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("name", sorted(GATES))
def test_nothing_but_padding(name, dtype):
    """Rows of padding, alone or beside a text: finite, and the text's outputs are those it has alone."""
    q, k, v = (x.to(dtype).repeat(2, 1, 1, 1) for x in adversarial("large", 150))
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1] = False
    cache = LigerCacheLayer(64)
    with torch.no_grad():
        output = attend(name, q, k, v, valid, cache)
        alone = attend(name, q[:1], k[:1], v[:1])
        after = attend(name, q[:, :, :1], k[:, :, :1], v[:, :, :1], None, cache)
    assert output.isfinite().all() and after.isfinite().all()
    torch.testing.assert_close(output[:1], alone, atol=1e-6, rtol=1e-2 if dtype in HALF else 1e-5)
    assert all(state[1].isfinite().all() for state in cache.states)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("length, batch", [(0, 2), (1, 2), (5, 0), (0, 0)])
@pytest.mark.parametrize("name", sorted(GATES))
def test_no_tokens_one_token_no_rows(name, length, batch, dtype):
    """With and without a cache, before and after a text."""
    q, k, v = (x.to(dtype).repeat(batch, 1, 1, 1) for x in adversarial("large", length))
    with torch.no_grad():
        output = attend(name, q, k, v)
        assert output.shape == (batch, length, 2, 16) and output.isfinite().all()
        cache = LigerCacheLayer(64)
        text = [x.to(dtype).repeat(batch, 1, 1, 1) for x in adversarial("normal", 70)]
        attend(name, *text, None, cache)
        before = [state.clone() for state in cache.states]
        output = attend(name, q, k, v, None, cache)
        assert output.shape == (batch, length, 2, 16) and output.isfinite().all()
        if length == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, cache.states, strict=True))


LOLCATS = {"gate": "none", "feature_map": "hedgehog", "normalizer": "joint-max", "positions": "rope", "delayed": True}


@pytest.mark.parametrize(
    "settings", [{"normalizer": "joint"}, {"normalizer": "running"}, {"sinks": 3}, LOLCATS, LOLCATS | {"sinks": 3}]
)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_other_layer_settings_with_large_keys(settings, dtype):
    """Scores of thousands: more than float16 holds, and more than its lowest number could hide."""
    settings = {**settings}
    gate = settings.pop("gate", "gla")
    for kind in ("large", "turns"):
        q, k, v = (x.to(dtype) for x in adversarial(kind, 300))
        with torch.no_grad():
            output = attend(gate, 100 * q, k, v, **settings)
            expected = attend(gate, (100 * q).float(), k.float(), v.float(), **settings)
        assert output.isfinite().all() and expected.isfinite().all()
        tolerance = {torch.float32: 0.0, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert relative_rms(output.float(), expected.double()) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GATES))
def test_bfloat16_model_over_32k_tokens(name, tiny_base, tmp_path):
    """A whole model in bfloat16: every logit of 32K tokens is finite."""
    from liger_cli.checkpoint.model_code import load_model
    from liger_cli.commands.convert import convert

    convert(str(tiny_base()), str(tmp_path / "model"), settings={"gate": name})
    model = load_model(tmp_path / "model", dtype=torch.bfloat16).eval()
    ids = torch.randint(4, 128, (1, 32768), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache, finite = None, True
        for part in ids.split(8192, dim=1):
            result = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache, finite = result.past_key_values, finite and bool(result.logits.isfinite().all())
    assert finite
