"""What a conversion will do, as numbers: which layer becomes what, how many parameters, how much state. No torch."""

import math
from collections import Counter
from dataclasses import dataclass, fields

from liger_cli.checkpoint.extras import count as count_extras
from liger_cli.checkpoint.reader import Checkpoint, Geometry, context_length, layer_index
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.system.wording import did_you_mean
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError
from liger_cli.templates.liger_gates import GATES, state_heads

SHORTEST, LONGEST = 256, 128 << 10  # tokens that memory is told for
SINKS = 4  # of a calibrated model: the first tokens take most of what a real base's heads look at beyond the window
# What a recurrence over all tokens may be asked for beside its gate; a state of evicted tokens has no use for it.
BRANCH = ("mix", "normalizer", "branch_scales", "feature_map", "feature_params", "feature_dim", "positions", "delayed")
STATE_BYTES = LOGIT_BYTES = 4  # float32
PRIORITY_BYTES = COUNTER_BYTES = 8


@dataclass(frozen=True)
class Plan:
    """A checked conversion.

    Attributes:
        specs: one entry a layer.
        notes: sentences that the user should read.
    """

    checkpoint: Checkpoint
    specs: tuple[LayerSpec, ...]
    notes: tuple[str, ...]

    def layers(self) -> list[dict]:
        """Per layer: index, what it becomes (`LayerSpec`'s fields), parameters and bytes of its weights."""
        parameters, sizes = Counter(), Counter()
        for name, tensor in self.checkpoint.tensors.items():
            if match := layer_index(name):
                parameters[int(match[1])] += tensor.numel
                sizes[int(match[1])] += tensor.nbytes
        return [
            {"layer": index, **spec.to_dict(), "parameters": parameters[index], "bytes": sizes[index]}
            for index, spec in enumerate(self.specs)
        ]

    def parameters(self) -> int:
        """Of the base, which the conversion links."""
        return sum(tensor.numel for tensor in self.checkpoint.tensors.values())

    def added_parameters(self) -> int:
        """Of the tensors that the settings add: branch coefficients, learned gates and feature maps."""
        return count_extras(self.specs, self.checkpoint.geometry)

    def weight_bytes(self) -> int:
        """Bytes of all tensors; the shards' headers come on top."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())

    def base_bytes(self, tokens: int):
        """Of the base's whole cache after so many tokens of one sequence."""
        return sum(self.base_cache(index, tokens) for index in range(len(self.specs)))

    def memory(self, contexts: tuple[int, ...] | None = None) -> list[dict]:
        """Bytes that model and base keep of one sequence, for each length in tokens; by default up to the context."""
        rows = []
        longest = min(LONGEST, context_length(self.checkpoint.config) or LONGEST)
        own = (longest // part for part in (32, 4, 1) if part == 1 or longest // part >= SHORTEST)
        for tokens in contexts or own:
            converted = self.cache_bytes(tokens)
            base = self.base_bytes(tokens)
            rows.append(
                {
                    "tokens": tokens,
                    "state_bytes": converted,
                    "kv_cache_bytes": base,
                    "ratio": round(base / max(converted, 1), 2),
                }
            )
        return rows

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that the converted model keeps of one sequence of so many tokens."""
        return sum(self._kept(index, spec, tokens) for index, spec in enumerate(self.specs))

    def constant_bytes(self, index: int, spec: LayerSpec) -> int:
        """Bytes that a Liger layer keeps of one sequence from the first token on: state, window, sinks and kept tokens.
        What its softmax heads keep grows with the text and does not count."""
        sizes = self.checkpoint.geometry
        gate = GATES[spec.gate]
        heads = sizes.num_key_value_heads - len(spec.softmax_kv_heads)
        groups = sizes.num_attention_heads // sizes.num_key_value_heads
        local = self.local_window(index) is not None
        rest = 0 if local else sum(spec.rest_by_head(sizes.num_key_value_heads))
        if spec.rest:
            state = state_heads(spec, rest * groups, rest) * (sizes.head_dim + 1) ** 2
        else:
            shapes = gate.state_shapes(spec, sizes.head_dim) if spec.mix else []
            state = state_heads(spec, heads * groups, heads) * sum(math.prod(shape) for shape in shapes)
        scored = bool(spec.kept or rest) and not local
        window = min(spec.window, self.local_window(index) or spec.window)
        kept = sum(spec.kept_by_head(sizes.num_key_value_heads)) if not local else 0
        cached = (window + spec.sinks) * heads + kept
        if window == 0 or (spec.mix == 1 and not spec.rest):
            cached = 0  # the recurrence alone
        each = PRIORITY_BYTES * scored + LOGIT_BYTES * (rest > 0 and not gate.fixed)
        exact = cached * (self._token_bytes() // sizes.num_key_value_heads + each)
        return state * STATE_BYTES + exact + COUNTER_BYTES

    def _kept(self, index: int, spec: LayerSpec, tokens: int) -> int:
        grown = self.base_cache(index, tokens)
        if spec.kind != "liger":
            return grown
        softmax_heads, heads = len(spec.softmax_kv_heads), self.checkpoint.geometry.num_key_value_heads
        return self.constant_bytes(index, spec) + grown * softmax_heads // heads

    def base_cache(self, index: int, tokens: int) -> int:
        window = self.local_window(index)
        return (tokens if window is None else min(tokens, window - 1)) * self._token_bytes()

    def local_window(self, index: int) -> int | None:
        """The base's own window in a layer that is local already."""
        config = self.checkpoint.family.with_defaults(self.checkpoint.config)
        return config.get("sliding_window") if self.checkpoint.family.local_layers(config)[index] else None

    def _token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer, in the dtype of the checkpoint."""
        sizes = self.checkpoint.geometry
        embedding = self.checkpoint.tensors["model.embed_tokens.weight"]
        return 2 * sizes.num_key_value_heads * sizes.head_dim * (embedding.nbytes // embedding.numel)


def trained_layer_bytes(config: dict, sizes: Geometry, spec: LayerSpec, width: int) -> int:
    """Bytes of one token's tensors that one decoder layer keeps for its backward pass.

    The gated feed-forward's three, the inputs of both norms and of LoRA in float32, and of each head what its branches
    hold, which is float32 whatever the model is; counted in runs of small models (`tests/test_memory_counted.py`).

    Args:
        config: config.json. width: bytes of a weight.
    """
    heads = (sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * sizes.head_dim
    copies = 3 if width == 4 else 5
    held = 16 if spec.kept or spec.rest else 6
    return width * 3 * _inner(config, sizes) + 4 * (copies * sizes.hidden_size + held * heads)


def read_layer_bytes(config: dict, sizes: Geometry, width: int) -> int:
    """Bytes of one token's tensors that a forward pass holds at most, in one decoder layer and before it."""
    heads = (sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * sizes.head_dim
    return width * 8 * sizes.hidden_size + max(width * 3 * _inner(config, sizes), 20 * heads)


def _inner(config: dict, sizes: Geometry) -> int:
    return config.get("intermediate_size") or 4 * sizes.hidden_size


def make_plan(checkpoint: Checkpoint, settings: dict, softmax_layers: str = "none", linearize_local=False) -> Plan:
    """Decide what every layer becomes.

    Args:
        settings: fields of `LayerSpec` for the Liger layers, and under `layers` what differs in some of them: a list of
            strings such as `0,4-7:gate=gdn,window=128`.
        softmax_layers: `none`, `every:N` (one softmax layer after every N - 1 Liger layers) or a list such as `3,11`.
        linearize_local: linearize layers that are local already, too.
    Raises:
        UsageError: a value that cannot be used. ModelError: a config that contradicts itself.
    """
    settings = dict(settings)
    exceptions = settings.pop("layers", [])
    liger = layer_spec(settings)
    count = checkpoint.geometry.num_hidden_layers
    others = layer_settings(exceptions, count)
    local = local_layers(checkpoint)
    notes = []
    if all(local) and not linearize_local:
        window = checkpoint.family.with_defaults(checkpoint.config).get("sliding_window")
        notes.append(f"every layer of the base is local (sliding window of {window} tokens), so all are linearized")
    left = [index for index in range(count) if local[index] and not linearize_local and not all(local)]
    if left:
        notes.append(f"{len(left)} layers are local in the base and stay as they are (--linearize-local changes them)")
    candidates = [index for index in range(count) if index not in left]
    softmax = parse_softmax_layers(softmax_layers, candidates, count)
    if len(softmax) == len(candidates):
        raise UsageError(f"--softmax-layers {softmax_layers} leaves no layer to linearize; ask for fewer")
    kinds = {**dict.fromkeys(left, "base"), **dict.fromkeys(softmax, "softmax")}
    for index in sorted(set(others) & set(kinds)):
        raise UsageError(f"--layer names layer {index}, which is not linearized")
    specs = tuple(
        LayerSpec(kind=kinds[index]) if index in kinds
        else _own_spec(settings | others[index], index) if index in others
        else liger
        for index in range(count)
    )  # fmt: skip
    for spec in dict.fromkeys(spec for spec in specs if spec.kind == "liger"):
        if spec.delayed and spec.mix == 1:
            raise UsageError("--delayed with --mix 1 leaves a text's first tokens without any output; lower --mix")
        for name in spec.unused():
            option = f"--{name.replace('_', '-')} {getattr(spec, name)}"
            why = "without --gate-params learned" if name == "gate_rank" else f"with the gate {spec.gate}"
            notes.append(f"{option} changes nothing {why}")
    context = context_length(checkpoint.config)
    for window, mix in dict.fromkeys((spec.window, spec.mix) for spec in specs if spec.kind == "liger"):
        if window == 0 and mix < 1:
            notes.append("--window 0 leaves out the window: a layer is its recurrence alone, whatever --mix is")
        elif context and window >= context:
            notes.append(f"--window {window} covers the base's context of {context:,} tokens: nothing ever leaves it")
    return Plan(checkpoint, specs, tuple(notes))


def _own_spec(settings: dict, index: int) -> LayerSpec:
    try:
        return layer_spec(settings)
    except UsageError as error:
        raise UsageError(f"--layer, layer {index}: {error}") from None


def with_defaults(settings: dict, calibrate: bool = False) -> dict:
    """The settings with what was left open (absent, or None) filled in, and with what a calibration fits.

    A calibrated layer has sinks, keeps twice as many tokens as its window has, and holds the others in a state that
    nothing fades from. Where a recurrence over all tokens is described, by its gate or otherwise, that stays, with
    coefficients for its branches, and is divided by its own sum: what is fitted on short texts has to hold for longer.
    """
    found = {name: value for name, value in settings.items() if value is not None}
    if not calibrate:
        return found
    if found.get("normalizer") == "joint-max":
        raise UsageError(
            "--calibrate fits no factor of the normalizer joint-max, which training learns (--recipe lolcats); leave "
            "one of them out"
        )
    window = found.get("window", LayerSpec.window)
    if window:
        found = {"sinks": SINKS, "kept": 2 * window, **found}
    gate = GATES.get(found.get("gate", "none"))
    if window and gate is not None and gate.one_decay and not _describes_branch(found):
        return {"rest": True, **found, "gate": gate.name, "mix": 0.0}
    gate = GATES.get(found.get("gate", LayerSpec.gate))
    if "normalizer" not in found and gate is not None and found.get("feature_map") != "none":
        found["normalizer"] = "running" if gate.rule.divisible else LayerSpec.normalizer
    return {**found, "branch_scales": True}


def _describes_branch(settings: dict) -> bool:
    return any(name in settings and settings[name] != getattr(LayerSpec, name) for name in BRANCH)


def layer_settings(exceptions: list[str], count: int) -> dict[int, dict]:
    """What `--layer` asks for, by layer. Raises UsageError where it cannot be read."""
    found: dict[int, dict] = {}
    for text in exceptions:
        layers, colon, values = text.partition(":")
        if not colon or not values:
            raise UsageError(f"--layer is {text!r}, but has to be like 0,4-7:gate=gdn,window=128")
        for part in layers.split(","):
            first, dash, last = part.strip().partition("-")
            ends = (whole_number(first), whole_number(last) if dash else whole_number(first))
            if None in ends or not ends[0] <= ends[1] < count:
                raise UsageError(f"--layer {text!r} names layers {part!r}, but the layers are 0 to {count - 1}")
            for index in range(ends[0], ends[1] + 1):
                found.setdefault(index, {}).update(_assignments(text, values))
    return found


def _assignments(text: str, values: str) -> dict:
    kinds = {field.name: type(field.default) for field in fields(LayerSpec) if field.name != "kind"}
    found = {}
    for part in values.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise UsageError(f"--layer {text!r} has {part!r} where NAME=VALUE is expected, such as window=128")
        name = name.strip().replace("-", "_")
        if name not in kinds:
            raise UsageError(f"--layer {text!r} sets {name!r}, which a layer does not have{did_you_mean(name, kinds)}")
        found[name] = read_mix(value.strip()) if name == "mix" else _value(value.strip(), kinds[name])
    return found


def _value(text: str, kind: type):
    """A setting from its text: a number where it reads as one, `true` and `false` for switches."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind is str:
        return text
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def read_mix(value: str | float) -> float:
    """The value of `--mix`: `window-only` is the control without a recurrent branch. Raises UsageError."""
    if value == "window-only":
        return 0.0
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"--mix is {value!r}, but has to be a number from 0 to 1, or window-only") from None


def layer_spec(settings: dict) -> LayerSpec:
    """The Liger layer of these settings. Raises UsageError naming the option whose value cannot be used."""
    if settings.get("gate", "gla") not in GATES:
        hint = did_you_mean(str(settings["gate"]), GATES)
        raise UsageError(f"--gate is {settings['gate']!r}, but has to be one of {', '.join(GATES)}{hint}")
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} is {value}, but has to be a finite number")
    try:
        return LayerSpec(**settings)
    except LigerConfigError as error:
        field, _, rest = str(error).partition(" ")
        raise UsageError(f"--{field.replace('_', '-')} {rest}") from None


def local_layers(checkpoint: Checkpoint) -> list[bool]:
    """For each layer whether it is local in the base. Raises ModelError where config.json contradicts itself."""
    config, count = checkpoint.config, checkpoint.geometry.num_hidden_layers
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list)
        or len(layer_types) != count
        or not set(map(str, layer_types)) <= {"full_attention", "sliding_attention"}
    ):
        raise ModelError(f"config.json: layer_types does not name {count} full_attention or sliding_attention layers")
    local = checkpoint.family.local_layers(config)
    window = checkpoint.family.with_defaults(config).get("sliding_window")
    if any(local) and (type(window) is not int or window < 1):
        raise ModelError(f"config.json: layers are local, but sliding_window is {window!r}")
    return local


def parse_softmax_layers(text: str, candidates: list[int], count: int) -> list[int]:
    """Layers to keep as softmax attention.

    Args:
        candidates: layers that can be linearized, which alone are counted by `every:N`.
        count: layers of the model.
    Raises:
        UsageError: not `none`, `every:N` or a list; a layer that is not there or is local already.
    """
    text = text.strip()
    if text == "none":
        return []
    if text.startswith("every:"):
        step = whole_number(text.removeprefix("every:"))
        if step is None or step < 2:
            raise UsageError(f"--softmax-layers is {text!r}; in every:N, N has to be a whole number, 2 or more")
        return candidates[step - 1 :: step]
    chosen = set()
    for part in text.split(","):
        index = whole_number(part.strip())
        if index is None:
            raise UsageError(
                f"--softmax-layers is {text!r}, but has to be none, every:N, auto:N or a list such as 3,11"
            )
        if index >= count:
            raise UsageError(f"--softmax-layers names layer {index}, but the layers are 0 to {count - 1}")
        if index not in candidates:
            raise UsageError(f"--softmax-layers names layer {index}, which is local in the base and stays as it is")
        chosen.add(index)
    return sorted(chosen)


def whole_number(text: str) -> int | None:
    """The number that a text of up to nine ASCII digits is; None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
