"""The gates: how decay, write strength, queries and keys come out of (q, k, v), and which recurrence they drive.

A gate is one row of `GATES`. torch is imported inside the functions only: the command line reads this table for names,
formulas and state sizes, and has to answer without loading torch.

Shapes: q [B, Hq, T, D]; k, v and the gate source p [B, Hkv, T, D], all float32 and before RoPE; decays are logarithms.
Source of the table: Liger (arXiv 2503.01496), Table 1, unless a row says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass
class RecurrenceInputs:
    """What a gate hands to its recurrence.

    Attributes:
        q: [B, Hq, T, D] queries; the Hq / Hkv query heads of a group read one shared state.
        k: [B, Hkv, T, D] keys; v: [B, Hkv, T, Dv] values.
        log_decay: [B, Hkv, T, D] (per key channel), [B, Hkv, T, 1] (per head) or [B, Hkv, T, M] (per slot); <= 0.
        beta: [B, Hkv, T, 1] write strength of the delta rule, else None.
        write: [B, Hkv, T, M] write weight of every slot (`gsa`), else None.
    """

    q: object
    k: object
    v: object
    log_decay: object
    beta: object = None
    write: object = None

    def masked(self, valid) -> "RecurrenceInputs":
        """Positions where `valid` ([B, T] bool) is false neither write nor decay, so the state passes through them."""
        keep = valid[:, None, :, None]
        zero = lambda x: None if x is None else x.masked_fill(~keep, 0.0)  # noqa: E731
        return replace(
            self,
            k=zero(self.k),
            v=zero(self.v),
            log_decay=zero(self.log_decay),
            beta=zero(self.beta),
            write=zero(self.write),
        )


@dataclass(frozen=True)
class Gate:
    """One gated recurrent structure.

    Attributes:
        name: what `--gate` takes.
        formula: the recurrence in one line, for `liger gates`.
        rule: `decay` (S = G S + k^T v), `delta` (gated delta rule) or `slots` (gated slot attention).
        inputs: (q, k, v, p, spec) -> RecurrenceInputs.
        normalizer: divisor of the log gate where the config gives none.
        denominator: `max1` divides by max(|q . z|, 1) as mLSTM does; None leaves it to the config's `normalizer`.
    """

    name: str
    formula: str
    rule: str
    inputs: Callable
    normalizer: float = 1.0
    denominator: str | None = None

    def state_shapes(self, spec, head_dim: int) -> list[tuple[int, int]]:
        """Shapes of the float32 states of one key/value head."""
        if self.rule == "slots":
            return [(head_dim, spec.slots), (spec.slots, head_dim)]
        extra = 1 if self.rule == "decay" and (self.denominator or spec.normalizer != "none") else 0
        return [(head_dim, head_dim + extra)]


def feature_map(x, spec):
    """phi: softmax over the head dimension (Liger, eq. 7), or the identity."""
    return x.softmax(-1) if spec.feature_map == "softmax" else x


def _divisor(spec, gate: str) -> float:
    return GATES[gate].normalizer if spec.gate_normalizer is None else spec.gate_normalizer


def _pool_head(p):
    """Mean over the head dimension: the parameter-free pooling of a head to one number. [B, Hkv, T, 1]"""
    return p.mean(-1, keepdim=True)


def _pool_slots(p, slots: int):
    """Average-pool the head dimension to `slots` numbers (repeating where there are more slots than channels)."""
    from torch.nn.functional import adaptive_avg_pool1d

    return adaptive_avg_pool1d(p.flatten(0, 1), slots).view(*p.shape[:-1], slots)


def _gla(q, k, v, p, spec):
    from torch.nn.functional import logsigmoid

    return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, logsigmoid(p) / _divisor(spec, "gla"))


def _gsa(q, k, v, p, spec):
    from torch.nn.functional import logsigmoid

    log_decay = logsigmoid(_pool_slots(p, spec.slots)) / _divisor(spec, "gsa")
    return RecurrenceInputs(q * q.shape[-1] ** -0.5, k, v, log_decay, write=-log_decay.expm1())


def _hgrn2(q, k, v, p, spec):
    from torch import log
    from torch.nn.functional import logsigmoid

    lower = spec.gate_lower_bound
    log_decay = logsigmoid(p) if lower == 0 else log(lower + (1 - lower) * p.sigmoid())
    log_decay = log_decay / _divisor(spec, "hgrn2")
    return RecurrenceInputs(feature_map(q, spec), -log_decay.expm1(), v, log_decay)


def _mamba2(q, k, v, p, spec):
    from torch.nn.functional import softplus

    log_decay = -softplus(_pool_head(p)) / _divisor(spec, "mamba2")
    return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, log_decay)


def _scalar_sigmoid(name: str):
    def inputs(q, k, v, p, spec):
        from torch.nn.functional import logsigmoid

        log_decay = logsigmoid(_pool_head(p)) / _divisor(spec, name)
        return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, log_decay)

    return inputs


def _rwkv6(q, k, v, p, spec):
    log_decay = -p.clamp(max=80.0).exp() / _divisor(spec, "rwkv6")
    return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, log_decay)


def _none(q, k, v, p, spec):
    return RecurrenceInputs(feature_map(q, spec), feature_map(k, spec), v, _pool_head(p) * 0.0)


def _delta(name: str, per_channel: bool):
    def inputs(q, k, v, p, spec):
        from torch.nn.functional import logsigmoid, normalize

        pooled = _pool_head(p)
        log_decay = logsigmoid(p if per_channel else pooled) / _divisor(spec, name)
        return RecurrenceInputs(normalize(q, dim=-1), normalize(k, dim=-1), v, log_decay, beta=pooled.sigmoid())

    return inputs


GATES = {
    gate.name: gate
    for gate in (
        Gate("gla", "S_t = diag(sigmoid(p)^(1/16)) S_{t-1} + phi(k)^T v", "decay", _gla, normalizer=16.0),
        Gate("gsa", "two GLA passes over m slots, write weight 1 - sigmoid(p)^(1/16)", "slots", _gsa, normalizer=16.0),
        Gate("hgrn2", "S_t = diag(a) S_{t-1} + (1 - a)^T v, a = g + (1 - g) sigmoid(p)", "decay", _hgrn2),
        Gate("mamba2", "S_t = exp(-softplus(mean p)) S_{t-1} + phi(k)^T v", "decay", _mamba2),
        Gate(
            "mlstm",
            "S_t = sigmoid(mean p) S_{t-1} + phi(k)^T v, output over max(|phi(q) z|, 1)",
            "decay",
            _scalar_sigmoid("mlstm"),
            denominator="max1",
        ),
        Gate("retention", "S_t = sigmoid(mean p) S_{t-1} + phi(k)^T v", "decay", _scalar_sigmoid("retention")),
        Gate("rwkv6", "S_t = diag(exp(-exp(p))) S_{t-1} + phi(k)^T v", "decay", _rwkv6),
        Gate("none", "S_t = S_{t-1} + phi(k)^T v", "decay", _none),
        Gate(
            "gdn",
            "S_t = a (I - b k^T k) S_{t-1} + b k^T v, a = sigmoid(mean p)^(1/16), b = sigmoid(mean p)",
            "delta",
            _delta("gdn", per_channel=False),
            normalizer=16.0,
        ),
        Gate(
            "kda",
            "S_t = (I - b k^T k) diag(a) S_{t-1} + b k^T v, a = sigmoid(p)^(1/16), b = sigmoid(mean p)",
            "delta",
            _delta("kda", per_channel=True),
            normalizer=16.0,
        ),
    )
}
