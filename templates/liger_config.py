"""The `liger` block of a converted model's config.json: what every layer is, read and checked without torch.

    config.liger = {"format": 1, "layers": [{"kind": "liger", "gate": "gla", "window": 64, ...}, ...]}

`backend` may stand beside `format`: `torch` or `fla` force what runs the kernels. `layers` has one entry a layer, in
order. `kind` is `liger` (gated recurrence plus window attention), `softmax` (the family's own
attention, kept on purpose) or `base` (a layer left exactly as it was because it was already local).
"""

from dataclasses import asdict, dataclass, fields

from .liger_gates import GATES

FORMAT = 1
KINDS = ("liger", "softmax", "base")
NORMALIZERS = ("none", "running", "joint", "group")
FEATURE_MAPS = ("softmax", "none", "relu", "hedgehog")
POSITIONS = ("none", "rope")
GATE_SOURCES = ("k", "q", "v")
GATE_POOLINGS = ("mean", "max")
BACKENDS = ("auto", "torch", "fla")


class LigerConfigError(ValueError):
    """The `liger` block of a config is missing, of another format, or holds a value that cannot be used."""


@dataclass(frozen=True)
class LayerSpec:
    """Everything that may differ from one layer to the next.

    Attributes:
        kind: `liger`, `softmax` or `base`.
        gate: name of a row of `liger_gates.GATES`.
        window: tokens of the softmax window, the token itself included; 0 runs the recurrent branch alone.
        sinks: number of first tokens that stay visible to the window.
        kept: number of tokens that stay visible to the window after they have left it, chosen by a learned score for
            each key/value head (see `liger_kept`); the score takes in first tokens, so there are no `sinks` beside it.
        mix: coefficient of the recurrent branch; the window's is 1 - mix (Liger, eq. 9).
        normalizer: `none` sums over the memory as the paper does (`mlstm` divides by max(|phi(q) . z|, 1), which keeps
            mLSTM's bound without its input gate, for which there are no parameters), `running` divides by phi(q) . z,
            `joint` shares one denominator between the memory and the window, `group` normalises each head's output to
            mean 0 and variance 1 (RetNet's and SUPRA's GroupNorm, without weights).
        branch_scales: two coefficients for each query head (`grm_scale`, `swa_scale`) in place of `mix` and 1 - mix.
        feature_map: phi, applied to queries and keys of the recurrent branch. The delta gates, which take vectors of
            length 1, have no use for `softmax` and normalise without it.
        feature_params: `fixed`, or `learned`: a linear map for each head before phi, starting as the identity.
        feature_dim: outputs of that linear map; None takes the head dimension.
        positions: `none` gives the recurrence queries and keys before the rotary embedding, `rope` after it.
        gate_params: `pooled` (no parameters), or `learned`: a low-rank projection of the hidden state as well.
        gate_init: `pooled` adds the learned projection, from zero, to the pooled gate; `random` puts a random one in
            its place (the paper's ablation).
        gate_rank: rank of the learned projection.
        gate_source: which projection the gate is pooled from.
        gate_pooling: how a head is pooled to one number (or to `gsa`'s slots) for the gates that take one: `mean`, or
            `max`. The paper leaves it open; the mean keeps the decay at its middle whatever the head dimension is, and
            what it was on the shipped base, untrained, was within 1.2 % of the maximum's (see the README).
        gate_normalizer: divisor of the log gate; None takes the gate's own default (16 for `gla`, as released).
        gate_lower_bound: lower bound of the decay (HGRN2's gamma).
        slots: memory slots of `gsa`.
        softmax_kv_heads: key/value heads, 0-based, that stay full softmax with their query heads; in JSON a list. At
            least one head is Liger's: for all of them there is `kind` softmax.
        backend: what runs the kernels, `auto`, `torch` or `fla` (see `liger_backend`): the block's, not a layer's own.
    """

    kind: str = "liger"
    gate: str = "gla"
    window: int = 64
    sinks: int = 0
    kept: int = 0
    mix: float = 0.5
    normalizer: str = "none"
    branch_scales: bool = False
    feature_map: str = "softmax"
    feature_params: str = "fixed"
    feature_dim: int | None = None
    positions: str = "none"
    gate_params: str = "pooled"
    gate_init: str = "pooled"
    gate_rank: int = 16
    gate_source: str = "k"
    gate_pooling: str = "mean"
    gate_normalizer: float | None = None
    gate_lower_bound: float = 0.0
    slots: int = 64
    softmax_kv_heads: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self):
        _require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        _require(self.gate in GATES, "gate", self.gate, f"one of {', '.join(GATES)}")
        _require(_is_int(self.window) and self.window >= 0, "window", self.window, "a whole number, 0 or more")
        _require(_is_int(self.sinks) and self.sinks >= 0, "sinks", self.sinks, "a whole number, 0 or more")
        _require(_is_int(self.kept) and self.kept >= 0, "kept", self.kept, "a whole number, 0 or more")
        if self.kept:
            _require(self.window > 0, "kept", self.kept, "0 where the window is 0")
            _require(self.sinks == 0, "sinks", self.sinks, "0 where tokens are kept by their score")
        _require(_is_number(self.mix) and 0 <= self.mix <= 1, "mix", self.mix, "a number from 0 to 1")
        _require(self.normalizer in NORMALIZERS, "normalizer", self.normalizer, f"one of {', '.join(NORMALIZERS)}")
        _require(self.feature_map in FEATURE_MAPS, "feature_map", self.feature_map, f"one of {', '.join(FEATURE_MAPS)}")
        ok = isinstance(self.branch_scales, bool)
        _require(ok, "branch_scales", self.branch_scales, "true or false")
        _require(self.feature_params in ("fixed", "learned"), "feature_params", self.feature_params, "fixed or learned")
        ok = self.feature_dim is None or (_is_int(self.feature_dim) and self.feature_dim > 0)
        _require(ok, "feature_dim", self.feature_dim, "a positive whole number")
        if self.feature_params == "fixed":
            _require(self.feature_dim is None, "feature_dim", self.feature_dim, "left out: no feature map is learned")
        _require(self.positions in POSITIONS, "positions", self.positions, f"one of {', '.join(POSITIONS)}")
        _require(self.gate_params in ("pooled", "learned"), "gate_params", self.gate_params, "pooled or learned")
        _require(self.gate_init in ("pooled", "random"), "gate_init", self.gate_init, "pooled or random")
        if self.gate_init == "random":
            _require(
                self.gate_params == "learned", "gate_params", self.gate_params, "learned where gate_init is random"
            )
        _require(_is_int(self.gate_rank) and self.gate_rank > 0, "gate_rank", self.gate_rank, "a positive whole number")
        _require(self.gate_source in GATE_SOURCES, "gate_source", self.gate_source, "k, q or v")
        ok = self.gate_pooling in GATE_POOLINGS
        _require(ok, "gate_pooling", self.gate_pooling, f"one of {', '.join(GATE_POOLINGS)}")
        ok = self.gate_normalizer is None or (_is_number(self.gate_normalizer) and self.gate_normalizer > 0)
        _require(ok, "gate_normalizer", self.gate_normalizer, "a positive number")
        ok = _is_number(self.gate_lower_bound) and 0 <= self.gate_lower_bound < 1
        _require(ok, "gate_lower_bound", self.gate_lower_bound, "a number from 0 up to, not including, 1")
        _require(_is_int(self.slots) and self.slots > 0, "slots", self.slots, "a positive whole number")
        heads = self.softmax_kv_heads
        ok = isinstance(heads, (list, tuple)) and all(_is_int(head) and head >= 0 for head in heads)
        ok = ok and list(heads) == sorted(set(heads))
        _require(ok, "softmax_kv_heads", heads, "a list of heads in ascending order, each once")
        object.__setattr__(self, "softmax_kv_heads", tuple(heads))
        _require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        if self.normalizer in ("running", "joint"):
            gate = GATES[self.gate]
            ok = gate.rule == "decay"
            _require(ok, "normalizer", self.normalizer, f"none: `{self.gate}` is not a sum that could be divided")
            _require(self.feature_map != "none", "normalizer", self.normalizer, "none without positive features")
        if self.normalizer == "joint":
            _require(self.window > 0, "normalizer", self.normalizer, "none or running where the window is 0")
        if self.kind == "liger" and self.window == 0:
            _require(self.mix > 0, "mix", self.mix, "more than 0 where the window is 0, or the layer has no output")

    def to_dict(self) -> dict:
        """The JSON form: for layers that are not Liger's only the kind, since nothing else applies."""
        if self.kind != "liger":
            return {"kind": self.kind}
        return {name: value for name, value in asdict(self).items() if name != "backend"}


def check_softmax_heads(specs: list[LayerSpec], num_key_value_heads: int) -> None:
    """Raise LigerConfigError where a layer names a softmax head that is not there, or has no other head."""
    for index, heads in enumerate(spec.softmax_kv_heads for spec in specs):
        if heads and heads[-1] >= num_key_value_heads:
            raise LigerConfigError(
                f"softmax_kv_heads of layer {index} names head {heads[-1]}, but the key/value heads are 0 to "
                f"{num_key_value_heads - 1}"
            )
        if len(heads) == num_key_value_heads:
            raise LigerConfigError(
                f"softmax_kv_heads of layer {index} names every head; make the layer's kind softmax instead"
            )


def liger_block(specs: list[LayerSpec]) -> dict:
    """The value of `config.liger` for these layers."""
    forced = {spec.backend for spec in specs} - {"auto"}
    backend = {"backend": forced.pop()} if forced else {}
    return {"format": FORMAT, **backend, "layers": [spec.to_dict() for spec in specs]}


def layer_specs(block: dict | None, num_hidden_layers: int) -> list[LayerSpec]:
    """Parse a `liger` block.

    Args:
        block: the value of `config.liger`.
        num_hidden_layers: how many entries there must be.
    Raises:
        LigerConfigError: a missing block, another format, unknown fields, values out of range, a wrong count.
    """
    if not isinstance(block, dict) or not isinstance(block.get("layers"), list):
        raise LigerConfigError("config.json has no usable `liger` block; convert the base model again")
    if block.get("format") != FORMAT:
        raise LigerConfigError(
            f"the folder's format is {block.get('format')!r} and this code reads {FORMAT}; "
            "run `liger convert FOLDER --refresh`"
        )
    if len(block["layers"]) != num_hidden_layers:
        raise LigerConfigError(
            f"config.liger describes {len(block['layers'])} layers, but num_hidden_layers is {num_hidden_layers}"
        )
    known = {field.name for field in fields(LayerSpec)} - {"backend"}
    backend = block.get("backend", "auto")
    try:
        LayerSpec(backend=backend)
    except LigerConfigError as error:
        raise LigerConfigError(f"config.liger: {error}") from None
    specs = []
    for index, entry in enumerate(block["layers"]):
        if not isinstance(entry, dict):
            raise LigerConfigError(f"config.liger.layers[{index}] is {entry!r}, not an object")
        unknown = sorted(map(str, set(entry) - known))
        if unknown:
            raise LigerConfigError(f"config.liger.layers[{index}] has a field this version does not know: {unknown[0]}")
        try:
            specs.append(LayerSpec(**entry, backend=backend))
        except LigerConfigError as error:
            raise LigerConfigError(f"config.liger.layers[{index}]: {error}") from None
    return specs


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _require(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise LigerConfigError(f"{name} is {value!r}, but has to be {wanted}")
