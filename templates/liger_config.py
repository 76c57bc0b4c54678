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
NORMALIZERS = ("none", "running", "joint", "joint-max", "group")
FEATURE_MAPS = ("softmax", "none", "relu", "hedgehog")
FEATURE_PARAMS = ("fixed", "learned", "dense")
POSITIONS = ("none", "rope", "after")
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
        kept: number of tokens that stay visible to the window after they have left it, beside the sinks, chosen by a
            learned score for each key/value head (see `liger_kept`). In JSON a number, or a list of one number a
            key/value head, of which those of softmax heads mean nothing.
        rest: whether the tokens that are in neither the window nor among the sinks and kept tokens enter a state that
            takes part in the window's softmax (see `liger_rest`). In JSON true or false, or a list of one a key/value
            head, of which those of softmax heads mean nothing. It stands in the place of the recurrent branch: the
            layer has no other, and `mix` and the feature map mean nothing.
        mix: coefficient of the recurrent branch; the window's is 1 - mix (Liger, eq. 9).
        normalizer: `none` sums over the memory as the paper does (`mlstm` divides by max(|phi(q) . z|, 1), which keeps
            mLSTM's bound without its input gate, for which there are no parameters), `running` divides by phi(q) . z,
            `joint` shares one denominator between the memory and the window, `joint-max` does so with the window's
            weights as exp(s - max s), max over the window, times a learned factor for each query head (`window_factor`,
            whose sigmoid starts as 1 - mix), and the memory's times 1 (LoLCATs, arXiv 2410.10254, eq. 6, and its code),
            `group` normalises each head's output to mean 0 and variance 1 (RetNet's and SUPRA's GroupNorm, without
            weights).
        branch_scales: two coefficients for each query head (`grm_scale`, `swa_scale`) in place of `mix` and 1 - mix.
        feature_map: phi, applied to queries and keys of the recurrent branch. The delta gates, which take vectors of
            length 1, have no use for `softmax` and normalise without it.
        feature_params: `fixed`; `learned`: before phi a linear map for each query head, for its queries and for its
            keys, random at first (LoLCATs); `dense`: one linear map with a bias across all heads, and keys times
            D^-1/2 (SUPRA).
        feature_dim: outputs of a `learned` map; None takes the head dimension.
        positions: `none` gives the recurrence queries and keys before the rotary embedding, `rope` after it, `after`
            turns them once they went through phi (SUPRA).
        delayed: a token enters the recurrence once it is in neither the window nor among the sinks and kept tokens, so
            that none counts twice (LoLCATs, and LoLA, arXiv 2505.23666).
        gate_params: `pooled` (no parameters), or `learned`: a low-rank projection of the hidden state as well.
        gate_init: `pooled` adds the learned projection, from zero, to the pooled gate; `random` puts a random one in
            its place (the paper's ablation).
        gate_rank: rank of the learned projection.
        gate_source: which projection the gate is pooled from.
        gate_pooling: how a head is pooled to one number (or to `gsa`'s slots) for the gates that take one: `mean`, or
            `max`. The paper leaves it open; the mean keeps the decay at its middle whatever the head dimension is.
        gate_normalizer: divisor of the log gate; None takes the gate's own default (16 for `gla`, as released).
        gate_lower_bound: lower bound of the decay (HGRN2's gamma).
        slots: memory slots of `gsa`; by default as many as the paper's released models have.
        softmax_kv_heads: key/value heads, 0-based, that stay full softmax with their query heads; in JSON a list. At
            least one head is Liger's: for all of them there is `kind` softmax.
        backend: what runs the kernels, `auto`, `torch` or `fla` (see `liger_backend`): the block's, not a layer's own.
    """

    kind: str = "liger"
    gate: str = "gla"
    window: int = 64
    sinks: int = 0
    kept: int | tuple[int, ...] = 0
    rest: bool | tuple[bool, ...] = False
    mix: float = 0.5
    normalizer: str = "none"
    branch_scales: bool = False
    feature_map: str = "softmax"
    feature_params: str = "fixed"
    feature_dim: int | None = None
    positions: str = "none"
    delayed: bool = False
    gate_params: str = "pooled"
    gate_init: str = "pooled"
    gate_rank: int = 16
    gate_source: str = "k"
    gate_pooling: str = "mean"
    gate_normalizer: float | None = None
    gate_lower_bound: float = 0.0
    slots: int = 128
    softmax_kv_heads: tuple[int, ...] = ()
    backend: str = "auto"

    def __post_init__(self):
        _require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        _require(self.gate in GATES, "gate", self.gate, f"one of {', '.join(GATES)}")
        _require(_is_int(self.window) and self.window >= 0, "window", self.window, "a whole number, 0 or more")
        _require(_is_int(self.sinks) and self.sinks >= 0, "sinks", self.sinks, "a whole number, 0 or more")
        counts = self.kept if isinstance(self.kept, (list, tuple)) else [self.kept]
        ok = len(counts) > 0 and all(_is_int(count) and count >= 0 for count in counts)
        _require(ok, "kept", self.kept, "a whole number, 0 or more, or a list of one a key/value head")
        object.__setattr__(self, "kept", counts[0] if len(set(counts)) == 1 else tuple(counts))
        if self.kept:
            _require(self.window > 0, "kept", self.kept, "0 where the window is 0")
        _require(_is_number(self.mix) and 0 <= self.mix <= 1, "mix", self.mix, "a number from 0 to 1")
        _require(self.normalizer in NORMALIZERS, "normalizer", self.normalizer, f"one of {', '.join(NORMALIZERS)}")
        _require(self.feature_map in FEATURE_MAPS, "feature_map", self.feature_map, f"one of {', '.join(FEATURE_MAPS)}")
        ok = isinstance(self.branch_scales, bool)
        _require(ok, "branch_scales", self.branch_scales, "true or false")
        ok = self.feature_params in FEATURE_PARAMS
        _require(ok, "feature_params", self.feature_params, f"one of {', '.join(FEATURE_PARAMS)}")
        ok = self.feature_dim is None or (_is_int(self.feature_dim) and self.feature_dim > 0)
        _require(ok, "feature_dim", self.feature_dim, "a positive whole number")
        if self.feature_params != "learned":
            _require(self.feature_dim is None, "feature_dim", self.feature_dim, "left out without a map for each head")
        _require(self.positions in POSITIONS, "positions", self.positions, f"one of {', '.join(POSITIONS)}")
        if self.positions == "after":
            ok = GATES[self.gate].rule.divisible and self.feature_map != "hedgehog" and self.feature_dim is None
            _require(ok, "positions", self.positions, "none or rope with this gate and feature map")
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
        if GATES[self.gate].fixed:
            wanted = f"pooled: the decays of `{self.gate}` are fixed"
            _require(self.gate_params == "pooled", "gate_params", self.gate_params, wanted)
        if self.divides:
            ok = GATES[self.gate].rule.divisible
            _require(ok, "normalizer", self.normalizer, f"none: `{self.gate}` is not a sum that could be divided")
            ok = self.feature_map != "none" and self.positions != "after"
            _require(ok, "normalizer", self.normalizer, "none without positive features")
        if self.joint:
            _require(self.window > 0, "normalizer", self.normalizer, "none or running where the window is 0")
        if self.normalizer == "joint-max":
            _require(not self.branch_scales, "branch_scales", True, "false: joint-max has a factor of its own")
            _require(self.kept == 0, "kept", self.kept, "0 with the normalizer joint-max")
        _require(isinstance(self.delayed, bool), "delayed", self.delayed, "true or false")
        if self.delayed:
            _require(self.joint, "delayed", True, "false without a denominator that the window shares")
            _require(GATES[self.gate].fixed, "delayed", True, f"false with `{self.gate}`, whose decay the text decides")
            ok = self.positions == "rope" and self.feature_params != "dense"
            _require(ok, "delayed", True, "false where the recurrence does not read the keys of the window")
        flags = self.rest if isinstance(self.rest, (list, tuple)) else [self.rest]
        ok = len(flags) > 0 and all(isinstance(flag, bool) for flag in flags)
        _require(ok, "rest", self.rest, "true or false, or a list of one a key/value head")
        object.__setattr__(self, "rest", flags[0] if len(set(flags)) == 1 else tuple(flags))
        if self.rest:
            _require(self.window > 0, "rest", self.rest, "false where the window is 0")
            _require(self.normalizer == "none", "normalizer", self.normalizer, "none beside a rest state")
            _require(not self.branch_scales, "branch_scales", True, "false beside a rest state")
            _require(not self.delayed, "delayed", True, "false beside a rest state, which is just that")
            _require(self.feature_params == "fixed", "feature_params", self.feature_params, "fixed beside a rest state")
            _require(self.positions == "none", "positions", self.positions, "none beside a rest state")
            ok = GATES[self.gate].one_decay
            single = ", ".join(name for name, gate in GATES.items() if gate.one_decay)
            _require(ok, "gate", self.gate, f"one with one decay a head beside a rest state: {single}")
        if self.kind == "liger" and self.window == 0:
            _require(self.mix > 0, "mix", self.mix, "more than 0 where the window is 0, or the layer has no output")

    @property
    def joint(self) -> bool:
        """Whether the recurrence and the window share a denominator."""
        return self.normalizer in ("joint", "joint-max")

    @property
    def divides(self) -> bool:
        """Whether the state has a column for what its sums are divided by."""
        return self.joint or self.normalizer == "running"

    def unused(self) -> list[str]:
        """Settings away from their defaults that change nothing, since the layer's gate has no use for them."""
        names = {"feature_map", "slots", "gate_lower_bound", "gate_pooling", "gate_source", "gate_normalizer"}
        names -= set(GATES[self.gate].settings)
        if self.gate_params == "pooled":
            names.add("gate_rank")
        return sorted(name for name in names if getattr(self, name) != getattr(LayerSpec, name))

    def kept_by_head(self, num_key_value_heads: int) -> tuple[int, ...]:
        """Kept tokens of each key/value head of the layer that is not softmax."""
        counts = self.kept if isinstance(self.kept, tuple) else (self.kept,) * num_key_value_heads
        return tuple(count for head, count in enumerate(counts) if head not in self.softmax_kv_heads)

    def rest_by_head(self, num_key_value_heads: int) -> tuple[bool, ...]:
        """Whether each key/value head of the layer that is not softmax has a rest state."""
        flags = self.rest if isinstance(self.rest, tuple) else (self.rest,) * num_key_value_heads
        return tuple(flag for head, flag in enumerate(flags) if head not in self.softmax_kv_heads)

    def to_dict(self) -> dict:
        """The JSON form: for layers that are not Liger's only the kind, since nothing else applies."""
        if self.kind != "liger":
            return {"kind": self.kind}
        return {name: value for name, value in asdict(self).items() if name != "backend"}


def check_heads(specs: list[LayerSpec], num_key_value_heads: int) -> None:
    """Raise LigerConfigError where a layer names a softmax head that is not there, or has no other head, or has another
    number of heads that keep tokens."""
    for index, spec in enumerate(specs):
        heads = spec.softmax_kv_heads
        for name in ("kept", "rest"):
            values = getattr(spec, name)
            if isinstance(values, tuple) and len(values) != num_key_value_heads:
                raise LigerConfigError(
                    f"{name} of layer {index} has {len(values)} values, but there are {num_key_value_heads} "
                    "key/value heads"
                )
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


# Not `huggingface_hub.dataclasses.strict`, as transformers' own configs: that checks nothing when a frozen dataclass is
# made, and `liger --help`, which shows the defaults above, would import its HTTP client.
def _require(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise LigerConfigError(f"{name} is {value!r}, but has to be {wanted}")
