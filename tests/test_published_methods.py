"""One layer's attention, before the output projection, against the methods' formulas and the authors' own code.

Every formula is written anew from its paper, token by token in float64. `data/published_methods.json` holds what the
authors' released code gave for the same layer (four query heads, two key/value heads of 8 channels, 20 tokens, weights
and inputs from sines, below): so the formulas are the releases', and the layer, in float32, is the formulas'.

How the values were made: q, k and v of the layer, after its rotary embedding where the code applies it, went through
- lolcats: `hybrid_attention_quadratic` of HazyResearch/lolcats (src/model/linear_attention/, commit 1c9fea8, the file
  linear_window_attention_sw.py) and what `FeatureMapMLP` and `SoftmaxDim` compute (src/model/feature_map.py, 4b003f6);
- supra, supra-paper: the steps of TRI-ML/linear_open_lm's `LinearAttn` (open_lm/model.py) with the layer's projections
  and its `recurrent_forward` for the lightning kernel, `use_decay` on, `use_retnet_slopes` off and on;
- gla, hgrn2, gsa: the steps of the forwards in OpenSparseLLMs/Linearization's `modeling_liger_*.py` with fla 0.6.0's
  `naive_recurrent_gla` and `naive_recurrent_gsa` for its kernels and a masked softmax for flash attention.
All in float32, on a CPU, with torch 2.13.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from test_extras import LOLCATS, SUPRA

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import model_classes
from liger_cli.templates.liger_config import LayerSpec, liger_block
from liger_cli.templates.liger_extras import NAMES
from liger_cli.templates.liger_gates import GATES

STORED = json.loads(Path(__file__).with_name("data").joinpath("published_methods.json").read_text())
HEADS, KV_HEADS, DIM, TOKENS, WINDOW = 4, 2, 8, 20, 6
SHAPES = {
    **{"hidden_size": HEADS * DIM, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM},
}
SETTINGS = {
    "lolcats": LOLCATS | {"feature_dim": 4},
    "supra": SUPRA,
    "supra-paper": SUPRA | {"gate": "retnet"},
    "gla": {},
    "hgrn2": {"gate": "hgrn2"},
    "gsa": {"gate": "gsa", "slots": DIM},
}


def waves(*shape, phase: float = 0.0):
    """Numbers in [-1, 1] without a pattern that heads or channels share."""
    return torch.sin(torch.arange(math.prod(shape)) ** 1.3 * 0.7 + phase).view(shape)


class Layer:
    """A Llama's only attention layer with weights from sines, and what it makes of inputs from sines.

    Attributes:
        q, k, v: [H, T, D] float64 before the rotary embedding; rotated_q, rotated_k after it.
        extras: the layer's own tensors, float64.
        output: [Hq, T, D], what reaches the output projection.
    """

    def __init__(self, settings: dict, dtype=torch.float32):
        config_class, model_class = model_classes(FAMILIES["llama"])
        spec = LayerSpec(**{"window": WINDOW} | settings)
        model = model_class(config_class(**SHAPES, liger=liger_block([spec]))).eval()
        attention = self.attention = model.model.layers[0].self_attn
        for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
            projection = getattr(attention, name).to(dtype)
            projection.weight.data.copy_(0.5 * waves(*projection.weight.shape, phase=place))
        self.extras = {}
        for place, name in enumerate(name for name in NAMES if hasattr(attention, name)):
            parameter = getattr(attention, name).data
            parameter.copy_(0.8 * waves(*parameter.shape, phase=10 + place))
            self.extras[name] = parameter.double()
        attention.o_proj.to(dtype)
        self.hidden = 2 * waves(1, TOKENS, HEADS * DIM, phase=5.0).to(dtype)
        self.angles = model.model.rotary_emb(self.hidden, torch.arange(TOKENS)[None])
        with torch.no_grad():
            q, k, v = attention.project(self.hidden)
            tensors = (q, k, v, *attention.rotate(q, k, self.angles))
            self.output = self.run(self.hidden)
        self.q, self.k, self.v, self.rotated_q, self.rotated_k = (x[0].double() for x in tensors)

    def run(self, hidden):
        """What reaches the output projection. [1, T, D_model] -> [Hq, T, D]"""
        caught = []
        hook = self.attention.o_proj.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        self.attention(hidden, position_embeddings=self.angles)
        hook.remove()
        return caught[0][0].unflatten(-1, (HEADS, DIM)).transpose(0, 1)

    def rope(self, x):
        """The rotary embedding of the same tokens. [H, T, D]"""
        return self.attention.rotate(x[None], x[None], [one.double() for one in self.angles])[0][0]

    def follow(self, hidden) -> None:
        """Set everything that the formulas read to what it is for these inputs, in float64, with gradients."""
        weights = (getattr(self.attention, name).weight.double() for name in ("q_proj", "k_proj", "v_proj"))
        self.q, self.k, self.v = ((hidden @ w.T).unflatten(-1, (-1, DIM)).transpose(0, 1) for w in weights)
        self.rotated_q, self.rotated_k = self.rope(self.q), self.rope(self.k)
        for extra in self.extras.values():
            extra.requires_grad_()


def softmax_over_window(layer: Layer, head: int, t: int):
    """Scores of the window's tokens, and their places."""
    places = range(max(0, t - WINDOW + 1), t + 1)
    keys = layer.rotated_k[head * KV_HEADS // HEADS]
    return torch.stack([layer.rotated_q[head, t] @ keys[j] for j in places]) / math.sqrt(DIM), places


def lolcats(layer: Layer):
    """arXiv 2410.10254, eq. 6, with the feature map of section 3.1; the window's weights as its code scales them."""
    factor = layer.extras["window_factor"].sigmoid()

    def phi(x, weight):
        return torch.cat([torch.softmax(weight @ x, 0), torch.softmax(-(weight @ x), 0)])

    output = torch.zeros(HEADS, TOKENS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        keys, values = layer.rotated_k[head * KV_HEADS // HEADS], layer.v[head * KV_HEADS // HEADS]
        for t in range(TOKENS):
            scores, places = softmax_over_window(layer, head, t)
            weights = {j: factor[head] * (s - scores.max()).exp() for j, s in zip(places, scores, strict=True)}
            query = phi(layer.rotated_q[head, t], layer.extras["feature_q"][head])
            for j in range(places[0]):
                weights[j] = query @ phi(keys[j], layer.extras["feature_k"][head])
            output[head, t] = sum(w * values[j] for j, w in weights.items()) / sum(weights.values())
    return output


def supra(layer: Layer, decays):
    """arXiv 2405.06640, eqs. 7, 9 and 10."""
    flat = lambda x: x.transpose(0, 1).flatten(1)  # noqa: E731
    heads = lambda x: x.unflatten(1, (-1, DIM)).transpose(0, 1)  # noqa: E731
    q = (flat(layer.q) @ layer.extras["feature_q"].T + layer.extras["feature_q_bias"]).relu()
    k = (flat(layer.k) @ layer.extras["feature_k"].T + layer.extras["feature_k_bias"]).relu()
    q, k = layer.rope(heads(q)), layer.rope(heads(k)) / math.sqrt(DIM)
    output = torch.zeros(HEADS, TOKENS, DIM, dtype=torch.float64)
    for head, decay in enumerate(decays):
        keys, values = k[head * KV_HEADS // HEADS], layer.v[head * KV_HEADS // HEADS]
        for t in range(TOKENS):
            summed = sum(decay ** (t - j) * (q[head, t] @ keys[j]) * values[j] for j in range(t + 1))
            centred = summed - summed.mean()
            output[head, t] = centred / (centred.square().mean() + 1e-5).sqrt()
    return output


def liger(layer: Layer, step, states):
    """arXiv 2503.01496, eq. 9: half a recurrence, half a window of the rotated queries and keys."""
    output = torch.zeros(HEADS, TOKENS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        values, state = layer.v[head * KV_HEADS // HEADS], states()
        for t in range(TOKENS):
            read, state = step(layer.q[head, t], layer.k[head * KV_HEADS // HEADS, t], values[t], state)
            scores, places = softmax_over_window(layer, head, t)
            local = sum(w * values[j] for j, w in zip(places, scores.softmax(0), strict=True))
            output[head, t] = 0.5 * read + 0.5 * local
    return output


def gla(q, k, v, state):
    """S = diag(a) S + phi(k)^T v with a = sigmoid(k)^(1/16), phi a softmax over the channels."""
    state = k.sigmoid()[:, None] ** (1 / 16) * state + torch.outer(k.softmax(0), v)
    return q.softmax(0) @ state, state


def hgrn2(q, k, v, state):
    """S = diag(a) S + (1 - a)^T v with a = sigmoid(k)."""
    state = k.sigmoid()[:, None] * state + torch.outer(1 - k.sigmoid(), v)
    return q.softmax(0) @ state, state


def gsa(q, k, v, states):
    """Slots of keys K = K diag(a) + k^T (1 - a) and of values V = diag(a) V + (1 - a)^T v, a = sigmoid(k)^(1/16) with
    as many slots as channels; o = softmax(q K) V, without a scale."""
    decay = k.sigmoid() ** (1 / 16)
    keys, values = states
    keys = keys * decay + torch.outer(k, 1 - decay)
    values = decay[:, None] * values + torch.outer(1 - decay, v)
    return (q @ keys).softmax(0) @ values, (keys, values)


def zeros():
    return torch.zeros(DIM, DIM, dtype=torch.float64)


# SUPRA's code takes the slopes of ALiBi, 2^(-8h/H); its paper RetNet's decays, 1 - 2^(-5-h).
FORMULAS = {
    "lolcats": lolcats,
    "supra": lambda layer: supra(layer, [math.exp(-(2 ** (-8 * (h + 1) / HEADS))) for h in range(HEADS)]),
    "supra-paper": lambda layer: supra(layer, [1 - 2.0 ** (-5 - h) for h in range(HEADS)]),
    "gla": lambda layer: liger(layer, gla, zeros),
    "hgrn2": lambda layer: liger(layer, hgrn2, zeros),
    "gsa": lambda layer: liger(layer, gsa, lambda: (zeros(), zeros())),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_layer_is_the_formula_and_the_formula_the_release(name):
    layer = Layer(SETTINGS[name])
    formula = FORMULAS[name](layer)
    stored = torch.tensor(STORED[name], dtype=torch.float64).view(HEADS, TOKENS, DIM)
    torch.testing.assert_close(formula, stored, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(layer.output.double(), formula, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_the_formulas(name):
    """With regard to the layer's inputs and its own tensors, of a fixed loss."""
    layer = Layer(SETTINGS[name])
    loss = waves(HEADS, TOKENS, DIM, phase=7)
    hidden = layer.hidden.clone().requires_grad_()
    extras = [getattr(layer.attention, extra) for extra in layer.extras]
    found = torch.autograd.grad((layer.run(hidden) * loss).sum(), [hidden, *extras])
    exact = layer.hidden[0].double().requires_grad_()
    layer.follow(exact)
    wanted = torch.autograd.grad((FORMULAS[name](layer) * loss).sum(), [exact, *layer.extras.values()])
    for one, other in zip(found, wanted, strict=True):
        other = other.view(one.shape)
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()  # float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_rounds_the_output_only(name, dtype, tolerance):
    """On queries, keys and values of half precision: within two roundings of the largest output."""
    layer = Layer(SETTINGS[name], dtype)
    wanted = FORMULAS[name](layer)
    assert layer.output.dtype == dtype
    assert (layer.output.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_decays_of_32_heads():
    """SUPRA on Mistral-7B: 0.43 to 0.996 as released, 0.969 to almost 1 as in the paper; and heads that are no power
    of 2, as ALiBi's code has them."""
    x, spec = torch.zeros(1, 32, 1, DIM), LayerSpec()
    released, paper = (GATES[name].pool(x, spec).exp().flatten() for name in ("lightning", "retnet"))
    assert released[0].item() == pytest.approx(0.4313, abs=1e-4) and released[-1].item() == pytest.approx(
        0.9961, abs=1e-4
    )
    assert paper[0].item() == pytest.approx(0.96875) and 0.999999 < paper[-1].item() <= 1
    slopes = -GATES["lightning"].pool(torch.zeros(1, 6, 1, DIM), spec).flatten()
    torch.testing.assert_close(slopes, torch.tensor([2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0, 2**-1.0, 2**-3.0]))


def test_feature_maps_start_as_published():
    """Uniform as `kaiming_uniform_` fills [H, D, F], keys as queries; the window's factor is 0.1."""
    config_class, model_class = model_classes(FAMILIES["llama"])
    spec = LayerSpec(**LOLCATS, feature_dim=64)
    shapes = SHAPES | {"head_dim": 128, "hidden_size": 512}
    attention = model_class(config_class(**shapes, liger=liger_block([spec]))).model.layers[0].self_attn
    published = torch.nn.init.kaiming_uniform_(torch.empty(HEADS, 128, 64))
    assert attention.feature_q.shape == attention.feature_k.shape == (HEADS, 64, 128)
    assert torch.equal(attention.feature_q, attention.feature_k)
    assert attention.feature_q.std().item() == pytest.approx(published.std().item(), rel=0.03)
    assert attention.feature_q.abs().max().item() == pytest.approx(published.abs().max().item(), rel=0.01)
    torch.testing.assert_close(attention.window_factor.sigmoid(), torch.full((HEADS,), 0.1))
    assert attention.window_factor[0].item() == pytest.approx(-2.1972245773362196)
