"""The `liger` block of a converted model's config.json: what every layer is, read and checked without torch.

    config.liger = {"format": 1, "layers": [{"kind": "liger", "gate": "gla", "window": 64, ...}, ...]}

One entry a layer, in order. `kind` is `liger` (gated recurrence plus window attention), `softmax` (the family's own
attention, kept on purpose) or `base` (a layer left exactly as it was because it was already local).
"""

from dataclasses import asdict, dataclass, fields

from .liger_gates import GATES

FORMAT = 1
KINDS = ("liger", "softmax", "base")
NORMALIZERS = ("none", "running", "joint")
FEATURE_MAPS = ("softmax", "none")
GATE_SOURCES = ("k", "q", "v")


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
        mix: coefficient of the recurrent branch; the window's is 1 - mix (Liger, eq. 9).
        normalizer: `none` sums over the memory as the paper does, `running` divides by phi(q) . z,
            `joint` shares one denominator between the memory and the window.
        feature_map: phi, applied to queries and keys of the recurrent branch.
        gate_source: which projection the gate is pooled from.
        gate_normalizer: divisor of the log gate; None takes the gate's own default (16 for `gla`, as released).
        gate_lower_bound: lower bound of the decay (HGRN2's gamma).
        slots: memory slots of `gsa`.
    """

    kind: str = "liger"
    gate: str = "gla"
    window: int = 64
    sinks: int = 0
    mix: float = 0.5
    normalizer: str = "none"
    feature_map: str = "softmax"
    gate_source: str = "k"
    gate_normalizer: float | None = None
    gate_lower_bound: float = 0.0
    slots: int = 64

    def __post_init__(self):
        _require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        _require(self.gate in GATES, "gate", self.gate, f"one of {', '.join(GATES)}")
        _require(_is_int(self.window) and self.window >= 0, "window", self.window, "a whole number, 0 or more")
        _require(_is_int(self.sinks) and self.sinks >= 0, "sinks", self.sinks, "a whole number, 0 or more")
        _require(_is_number(self.mix) and 0 <= self.mix <= 1, "mix", self.mix, "a number from 0 to 1")
        _require(self.normalizer in NORMALIZERS, "normalizer", self.normalizer, f"one of {', '.join(NORMALIZERS)}")
        _require(self.feature_map in FEATURE_MAPS, "feature_map", self.feature_map, f"one of {', '.join(FEATURE_MAPS)}")
        _require(self.gate_source in GATE_SOURCES, "gate_source", self.gate_source, "k, q or v")
        ok = self.gate_normalizer is None or (_is_number(self.gate_normalizer) and self.gate_normalizer > 0)
        _require(ok, "gate_normalizer", self.gate_normalizer, "a positive number")
        ok = _is_number(self.gate_lower_bound) and 0 <= self.gate_lower_bound < 1
        _require(ok, "gate_lower_bound", self.gate_lower_bound, "a number from 0 up to, not including, 1")
        _require(_is_int(self.slots) and self.slots > 0, "slots", self.slots, "a positive whole number")
        if self.normalizer != "none":
            gate = GATES[self.gate]
            ok = gate.rule == "decay" and gate.denominator is None
            _require(ok, "normalizer", self.normalizer, f"none: `{self.gate}` is not a sum that could be divided")
            _require(self.feature_map == "softmax", "normalizer", self.normalizer, "none without positive features")
        if self.kind == "liger" and self.window == 0:
            _require(self.mix > 0, "mix", self.mix, "more than 0 where the window is 0, or the layer has no output")

    def to_dict(self) -> dict:
        """The JSON form: for layers that are not Liger's only the kind, since nothing else applies."""
        return asdict(self) if self.kind == "liger" else {"kind": self.kind}


def liger_block(specs: list[LayerSpec]) -> dict:
    """The value of `config.liger` for these layers."""
    return {"format": FORMAT, "layers": [spec.to_dict() for spec in specs]}


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
    known = {field.name for field in fields(LayerSpec)}
    specs = []
    for index, entry in enumerate(block["layers"]):
        if not isinstance(entry, dict):
            raise LigerConfigError(f"config.liger.layers[{index}] is {entry!r}, not an object")
        unknown = sorted(map(str, set(entry) - known))
        if unknown:
            raise LigerConfigError(f"config.liger.layers[{index}] has a field this version does not know: {unknown[0]}")
        try:
            specs.append(LayerSpec(**entry))
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
