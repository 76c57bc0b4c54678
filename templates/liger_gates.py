"""The gates: how decay, write strength, queries and keys come out of (q, k, v), and which recurrence they drive.

A gate is one row of `GATES` and drives one of the rules above them. torch is imported inside the functions only: the
command line reads these tables for names, formulas and state sizes, and has to answer without loading torch.

Shapes: q [B, Hq, T, F], k [B, Hkv, T, F] and v [B, Hkv, T, D], float32 and (unless the config says otherwise) before
RoPE; the gate's logits p [B, Hkv, T, W], pooled from a projection, learned, or both; decays are logarithms. F is D
unless a feature map is learned with another width. Where keys or decays differ between the query heads of a group
(`state_heads`), k, v and p have Hq heads.
Source of the table: Liger (arXiv 2503.01496), Table 1, unless a row says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .liger_rules import Kernel, RecurrenceInputs, Rule


def _state(features: int, head_dim: int, slots: int):
    return [(features, head_dim)]


def _slot_states(features: int, head_dim: int, slots: int):
    return [(features, slots), (slots, head_dim)]


# S = G S + k^T v
DECAY = Rule(
    "decay",
    _state,
    {
        True: Kernel("fla.ops.simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla"),
        False: Kernel("fla.ops.gla", "chunk_gla", "fused_recurrent_gla", "gk"),
    },
    divisible=True,
)
# The gated delta rule
DELTA = Rule(
    "delta",
    _state,
    {
        True: Kernel(
            "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", widest_key=256
        ),
        False: Kernel("fla.ops.kda", "chunk_kda", "fused_recurrent_kda", widest_key=256),
    },
    inputs=("beta",),
)
# Gated slot attention
SLOTS = Rule(
    "slots",
    _slot_states,
    {False: Kernel("fla.ops.gsa", "chunk_gsa", "fused_recurrent_gsa")},
    inputs=("write",),
    by_slot=True,
)
RULES = (DECAY, DELTA, SLOTS)


@dataclass(frozen=True)
class Gate:
    """One gated recurrent structure.

    Attributes:
        name: what `--gate` takes.
        formula: the recurrence in one line, for `liger gates`.
        rule: the recurrence that it drives.
        inputs: (q, k, v, p, spec) -> RecurrenceInputs; p are the gate's logits.
        pool: (x, spec) -> p: the parameter-free pooling of a projection x [B, Hkv, T, D] to logits.
        width: (spec, head_dim) -> W, the number of logits of a head.
        settings: fields of `LayerSpec` that decide what this gate computes; of the others it has no use.
        per_query_head: decays differ between the query heads of a group; `pool` is given queries.
        normalizer: divisor of the log gate where the config gives none.
        denominator: `max1` divides by max(|q . z|, 1) as mLSTM does, unless the config's `normalizer` names another;
            None leaves the sum as it is.
    """

    name: str
    formula: str
    rule: Rule
    inputs: Callable
    pool: Callable
    width: Callable
    settings: tuple[str, ...]
    per_query_head: bool = False
    normalizer: float = 1.0
    denominator: str | None = None

    @property
    def fixed(self) -> bool:
        """Whether the decay does not come from the text, so that there are no logits that could be learned."""
        return "gate_params" not in self.settings

    @property
    def fades(self) -> bool:
        """Whether it forgets anything at all."""
        return not self.fixed or self.per_query_head

    @property
    def one_decay(self) -> bool:
        """Whether a head forgets all it holds alike."""
        return self.rule is DECAY and self.width is _one

    def state_shapes(self, spec, head_dim: int) -> list[tuple[int, int]]:
        """Shapes of the float32 states of one head (see `state_heads`)."""
        features = feature_width(spec, head_dim) if "feature_map" in self.settings else spec.feature_dim or head_dim
        divisor = 1 if self.rule.divisible and (self.denominator or spec.divides) else 0
        return self.rule.states(features, head_dim + divisor, spec.slots)


def state_heads(spec, num_heads: int, num_key_value_heads: int) -> int:
    """Number of states: one for each key/value head, or for each query head where keys or decays differ by these."""
    own = spec.feature_params == "learned" or GATES[spec.gate].per_query_head
    return num_heads if own else num_key_value_heads


def feature_map(x, spec):
    """phi: softmax over the head dimension (Liger, eq. 7), the identity, ReLU (SUPRA, arXiv 2405.06640) or the softmax
    of x beside that of -x (Hedgehog, as LoLCATs has it, arXiv 2410.10254), which has twice as many features.

    Where positions come after it, x has been mapped already.
    """
    if spec.positions == "after":
        return x
    return mapped(x, spec)


def mapped(x, spec):
    """phi(x), wherever the positions come. [B, H, T, D] -> [B, H, T, F]"""
    if spec.feature_map == "softmax":
        # A projection lies in memory as [B, T, H, D]; torch copies it to the order it is given in.
        return x.transpose(1, 2).softmax(-1).transpose(1, 2)
    if spec.feature_map == "relu":
        return x.relu()
    if spec.feature_map == "hedgehog":
        from torch import cat

        return cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    return x


def feature_width(spec, head_dim: int) -> int:
    """Number of features of a key: the rows of the state."""
    return (spec.feature_dim or head_dim) * (2 if spec.feature_map == "hedgehog" else 1)


def _divisor(spec, gate: str) -> float:
    return GATES[gate].normalizer if spec.gate_normalizer is None else spec.gate_normalizer


def _pool_head(x, spec):
    """Mean or maximum over the head dimension: the parameter-free pooling of a head to one number. [B, Hkv, T, 1]"""
    return _wide(x).amax(-1, keepdim=True) if spec.gate_pooling == "max" else _wide(x).mean(-1, keepdim=True)


def _wide(x):
    """Half precision as float32; float32 and float64 as they are."""
    from torch import float32, promote_types

    return x.to(promote_types(x.dtype, float32))


def _pool_channels(x, spec):
    """A projection is as wide as a key: it is its own gate, as in the released code. [B, Hkv, T, D]"""
    return x


def _pool_slots(x, spec):
    """Pool the head dimension to the slots (repeating where there are more slots than channels)."""
    from torch.nn.functional import adaptive_avg_pool1d, adaptive_max_pool1d

    pool = adaptive_max_pool1d if spec.gate_pooling == "max" else adaptive_avg_pool1d
    return pool(_wide(x).flatten(0, 1), spec.slots).view(*x.shape[:-1], spec.slots)


def _pool_twice(x, spec):
    """One number for the decay and one for the write strength. [B, Hkv, T, 2]"""
    return _pool_head(x, spec).expand(*x.shape[:-1], 2)


def _pool_channels_and_head(x, spec):
    """A decay for each channel, then one write strength. [B, Hkv, T, D + 1]"""
    from torch import cat

    return cat([_wide(x), _pool_head(x, spec)], dim=-1)


def _over_features(p, width: int):
    """Logits of D channels for `width` features: as they are, repeated, or pooled. [B, Hkv, T, width]"""
    if p.shape[-1] == width:
        return p
    if width % p.shape[-1] == 0:
        return p.repeat(1, 1, 1, width // p.shape[-1])
    from torch.nn.functional import adaptive_avg_pool1d

    return adaptive_avg_pool1d(p.flatten(0, 1), width).view(*p.shape[:-1], width)


def _one(spec, head_dim: int) -> int:
    return 1


def _channels(spec, head_dim: int) -> int:
    return head_dim


def _gla(q, k, v, p, spec):
    from torch.nn.functional import logsigmoid

    q, k = feature_map(q, spec), feature_map(k, spec)
    return RecurrenceInputs(q, k, v, logsigmoid(_over_features(p, k.shape[-1])) / _divisor(spec, "gla"))


def _gsa(q, k, v, p, spec):
    from torch.nn.functional import logsigmoid

    log_decay = logsigmoid(p) / _divisor(spec, "gsa")
    return RecurrenceInputs(q, k, v, log_decay, write=-log_decay.expm1())


def _hgrn2(q, k, v, p, spec):
    from torch import log
    from torch.nn.functional import logsigmoid

    q = feature_map(q, spec)
    p, lower = _over_features(p, q.shape[-1]), spec.gate_lower_bound
    log_decay = logsigmoid(p) if lower == 0 else log(lower + (1 - lower) * p.sigmoid())
    log_decay = log_decay / _divisor(spec, "hgrn2")
    return RecurrenceInputs(q, -log_decay.expm1(), v, log_decay)


def _mamba2(q, k, v, p, spec):
    from torch.nn.functional import softplus

    log_decay = -softplus(p) / _divisor(spec, "mamba2")
    return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, log_decay)


def _scalar_sigmoid(name: str):
    def inputs(q, k, v, p, spec):
        from torch.nn.functional import logsigmoid

        log_decay = logsigmoid(p) / _divisor(spec, name)
        return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, log_decay)

    return inputs


def _rwkv6(q, k, v, p, spec):
    q, k = feature_map(q, spec), feature_map(k, spec)
    log_decay = -_over_features(p, k.shape[-1]).clamp(max=80.0).exp() / _divisor(spec, "rwkv6")
    return RecurrenceInputs(q, k, v, log_decay)


def _none(q, k, v, p, spec):
    from torch import zeros_like

    return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, zeros_like(p))


def _of_heads(name: str):
    """A decay for each head: the logits are its logarithm."""

    def inputs(q, k, v, p, spec):
        return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, p / _divisor(spec, name))

    return inputs


def _pool_retnet(x, spec):
    """log(1 - 2^(-5-h)) for each head, h from 0. [B, H, T, 1]"""
    from torch import log1p

    return _for_tokens(log1p(-(2.0 ** (-4 - _numbered(x)))), x)


def _pool_lightning(x, spec):
    """Minus ALiBi's slope for each head: 2^(-8h/H), h from 1; where H is no power of 2, those of the power below it,
    then every second one of the power above (arXiv 2108.12409, and its code). [B, H, T, 1]"""
    from torch import cat

    power = 1 << (x.shape[1].bit_length() - 1)
    heads = _numbered(x)
    places = cat([heads[:power], heads[: x.shape[1] - power] - 0.5])
    return _for_tokens(-(2.0 ** (-8 * places / power)), x)


def _numbered(x):
    """The heads of x [B, H, T, D], numbered from 1, in float32 or better. [H]"""
    from torch import arange, float32, promote_types

    return arange(1, x.shape[1] + 1, device=x.device, dtype=promote_types(x.dtype, float32))


def _for_tokens(log_decay, x):
    return log_decay.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2], 1)


def _unit(x, spec):
    """L2-normalised features of the delta rule; the softmax map has no part in it."""
    from torch.nn.functional import normalize

    return normalize(x if spec.feature_map == "softmax" else feature_map(x, spec), dim=-1)


def _delta(name: str):
    def inputs(q, k, v, p, spec):
        from torch.nn.functional import logsigmoid

        q, k = _unit(q, spec), _unit(k, spec)
        decay, write = p[..., :-1], p[..., -1:]
        if decay.shape[-1] > 1:
            decay = _over_features(decay, k.shape[-1])
        return RecurrenceInputs(q, k, v, logsigmoid(decay) / _divisor(spec, name), beta=write.sigmoid())

    return inputs


_LOGITS = ("gate_source", "gate_params", "gate_normalizer")

GATES = {
    gate.name: gate
    for gate in (
        Gate(
            "gla",
            "S_t = diag(sigmoid(p)^(1/16)) S_{t-1} + phi(k)^T v",
            DECAY,
            _gla,
            _pool_channels,
            _channels,
            ("feature_map", *_LOGITS),
            normalizer=16.0,
        ),
        Gate(
            "gsa",
            "two GLA passes over m slots, write weight 1 - sigmoid(p)^(1/16)",
            SLOTS,
            _gsa,
            _pool_slots,
            lambda spec, head_dim: spec.slots,
            ("slots", "gate_pooling", *_LOGITS),
            normalizer=16.0,
        ),
        Gate(
            "hgrn2",
            "S_t = diag(a) S_{t-1} + (1 - a)^T v, a = g + (1 - g) sigmoid(p)",
            DECAY,
            _hgrn2,
            _pool_channels,
            _channels,
            ("feature_map", "gate_lower_bound", *_LOGITS),
        ),
        Gate(
            "mamba2",
            "S_t = exp(-softplus(mean p)) S_{t-1} + phi(k)^T v",
            DECAY,
            _mamba2,
            _pool_head,
            _one,
            ("feature_map", "gate_pooling", *_LOGITS),
        ),
        Gate(
            "mlstm",
            "S_t = sigmoid(mean p) S_{t-1} + phi(k)^T v, output over max(|phi(q) z|, 1)",
            DECAY,
            _scalar_sigmoid("mlstm"),
            _pool_head,
            _one,
            ("feature_map", "gate_pooling", *_LOGITS),
            denominator="max1",
        ),
        Gate(
            "retention",
            "S_t = sigmoid(mean p) S_{t-1} + phi(k)^T v",
            DECAY,
            _scalar_sigmoid("retention"),
            _pool_head,
            _one,
            ("feature_map", "gate_pooling", *_LOGITS),
        ),
        Gate(
            "rwkv6",
            "S_t = diag(exp(-exp(p))) S_{t-1} + phi(k)^T v",
            DECAY,
            _rwkv6,
            _pool_channels,
            _channels,
            ("feature_map", *_LOGITS),
        ),
        Gate("none", "S_t = S_{t-1} + phi(k)^T v", DECAY, _none, _pool_head, _one, ("feature_map",)),
        # Not in the paper's table: RetNet (arXiv 2307.08621), section 2.1, as SUPRA's paper has it.
        Gate(
            "retnet",
            "S_t = (1 - 2^(-5-h)) S_{t-1} + phi(k)^T v, h the query head",
            DECAY,
            _of_heads("retnet"),
            _pool_retnet,
            _one,
            ("feature_map", "gate_normalizer"),
            per_query_head=True,
        ),
        # Not in the paper's table: Lightning Attention's decays (arXiv 2401.04658), as SUPRA's code has them.
        Gate(
            "lightning",
            "S_t = exp(-2^(-8h/H)) S_{t-1} + phi(k)^T v, h the query head from 1",
            DECAY,
            _of_heads("lightning"),
            _pool_lightning,
            _one,
            ("feature_map", "gate_normalizer"),
            per_query_head=True,
        ),
        # Not in the paper's table: gated delta rule (arXiv 2412.06464), Kimi delta attention (arXiv 2510.26692).
        Gate(
            "gdn",
            "S_t = a (I - b k^T k) S_{t-1} + b k^T v, a = sigmoid(mean p)^(1/16), b = sigmoid(mean p)",
            DELTA,
            _delta("gdn"),
            _pool_twice,
            lambda spec, head_dim: 2,
            ("feature_map", "gate_pooling", *_LOGITS),
            normalizer=16.0,
        ),
        Gate(
            "kda",
            "S_t = (I - b k^T k) diag(a) S_{t-1} + b k^T v, a = sigmoid(p)^(1/16), b = sigmoid(mean p)",
            DELTA,
            _delta("kda"),
            _pool_channels_and_head,
            lambda spec, head_dim: head_dim + 1,
            ("feature_map", "gate_pooling", *_LOGITS),
            normalizer=16.0,
        ),
    )
}
