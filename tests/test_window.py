"""Window attention against whole rows of scores under an explicit band, in float64 to 1e-12 and in other dtypes."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liger_cli.templates import liger_window
from liger_cli.templates.liger_window import Scoring, window_attention

EMPTY = -(2**40)


def reference(q, k, v, window, scaling, valid=None, softcap=None, sink_logits=None, sinks=0):
    """Every pair of positions, masked. q [B, Hq, T, D]; k, v [B, Hkv, S, D]. Returns o and the log denominators."""
    groups, length, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    row, column = torch.arange(keys - length, keys)[:, None], torch.arange(keys)
    seen = (column <= row) & ((column > row - window) | (column < sinks))
    if valid is not None:
        seen = seen & valid[:, None, None, :]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., :keys].nan_to_num(0.0)
    return weights @ v, scores.logsumexp(-1)


def example(batch, kv_heads, groups, length, past, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    random = lambda heads, n: torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return random(kv_heads * groups, length), random(kv_heads, past + length), random(kv_heads, past + length)


@settings(
    max_examples=int(os.environ.get("LIGER_FUZZ_EXAMPLES", "80")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    window=st.integers(1, 150),
    length=st.integers(1, 300),
    past=st.integers(0, 160),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    batch=st.integers(1, 2),
    softcap=st.sampled_from([None, 2.0]),
    with_sink_logits=st.booleans(),
    padded=st.booleans(),
    piece=st.sampled_from([64, 100000]),
    seed=st.integers(0, 100),
    gradients=st.booleans(),
)
def test_fuzz(window, length, past, kv_heads, groups, batch, softcap, with_sink_logits, padded, piece, seed, gradients):
    """Any window, length and past; soft-capped, with learned sink logits, padded; worked through in pieces or not."""
    q, k, v = example(batch, kv_heads, groups, length, past, 8, seed)
    logits = torch.linspace(-2, 2, q.shape[1], dtype=q.dtype) if with_sink_logits else None
    valid = torch.rand(batch, past + length, generator=torch.Generator().manual_seed(seed)) > 0.3 if padded else None
    before, liger_window.PIECE_SIZE = liger_window.PIECE_SIZE, piece
    try:
        with torch.set_grad_enabled(gradients):
            o, lse = window_attention(q, k, v, window, Scoring(0.3, softcap, logits), valid, need_lse=True)
    finally:
        liger_window.PIECE_SIZE = before
    expected, expected_lse = reference(q, k, v, window, 0.3, valid, softcap, logits)
    assert o.isfinite().all()
    rows = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid[:, past:]
    torch.testing.assert_close(o.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(
        lse.double().transpose(1, 2)[rows], expected_lse.transpose(1, 2)[rows], atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("length, past", [(1, 40), (40, 0), (200, 30)])
def test_first_tokens(length, past):
    """The first tokens stay visible after the window has left them, and count once while it has not."""
    window, count = 31, 4
    q, k, v = example(2, 2, 2, length, past, 8)
    age = past - torch.arange(count).expand(2, -1).clone()
    sink_k, sink_v = k[:, :, :count].clone(), v[:, :, :count].clone()
    age[1, 3:] = EMPTY
    expected = torch.cat([reference(q[:1], k[:1], v[:1], window, 0.3, sinks=4)[0],
                          reference(q[1:], k[1:], v[1:], window, 0.3, sinks=3)[0]])  # fmt: skip
    o, _ = window_attention(q, k, v, window, Scoring(0.3), sinks=(sink_k, sink_v, age))
    torch.testing.assert_close(o, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients(softcap):
    leaves = [x.requires_grad_() for x in example(1, 2, 2, 150, 0, 8)]
    weights = torch.linspace(-1, 1, leaves[0].numel(), dtype=torch.float64).view_as(leaves[0])
    actual = torch.autograd.grad((window_attention(*leaves, 40, Scoring(0.3, softcap))[0] * weights).sum(), leaves)
    expected = torch.autograd.grad((reference(*leaves, 40, 0.3, softcap=softcap)[0] * weights).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype, softcap):
    """Dropped weights change the output, but not its mean over many draws (a tenth of the spread of one draw)."""
    torch.manual_seed(0)
    q, k, v = example(1, 1, 2, 70, 0, 8, dtype=dtype)
    exact = window_attention(q, k, v, 31, Scoring(0.3, softcap))[0].float()
    draws = torch.stack([window_attention(q, k, v, 31, Scoring(0.3, softcap, dropout=0.5))[0] for _ in range(400)])
    draws = draws.float()
    assert (draws[0] - exact).abs().max() > 0.1
    assert (draws.mean(0) - exact).square().mean() < 0.01 * draws.var(0).mean()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype, tolerance):
    """bfloat16 has 8 bits, so outputs of size 1 differ by some 2^-7; float16 by some 2^-10."""
    q, k, v = example(2, 2, 2, 200, 0, 32, dtype=dtype)
    expected = reference(q.double(), k.double(), v.double(), 64, 32**-0.5)[0]
    o, _ = window_attention(q, k, v, 64, Scoring(32**-0.5))
    assert o.dtype == dtype
    torch.testing.assert_close(o.double(), expected, atol=tolerance, rtol=0)


def test_no_square_of_the_text(monkeypatch):
    """No tensor with T x T elements is ever made: the largest one stays below T times a few windows and heads."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return result

    q, k, v = example(1, 1, 2, 8192, 0, 8, dtype=torch.float32)
    q.requires_grad_()
    with Largest() as largest:
        window_attention(q, k, v, 64, Scoring(1.0))[0].sum().backward()
    assert largest.elements <= 8192 * 2 * 128
