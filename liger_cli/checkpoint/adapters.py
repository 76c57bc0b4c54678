"""LoRA adapters, as PEFT writes them: read, checked against the model, and their updates; no code of theirs is run."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from liger_cli.checkpoint.reader import ADAPTER_CONFIG, Shard, inside, read_config, read_shard
from liger_cli.checkpoint.tensors import read_tensor
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.system.untrusted import read_json
from liger_cli.templates.liger_extras import NAMES

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "LoRA biases",
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights: the base's weights stay what they are
MAX_ALPHA = 1e6


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read but for its tensors.

    Attributes:
        weights: the file of its tensors.
        scales: name of the weight in the base -> alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        transposed: the weights are stored [in, out] (`fan_in_fan_out`).
        ranks: name of the weight in the base -> rank of its update.
        replaced: names of the extra tensors (`templates.liger_extras`) that were trained as a whole.
    """

    folder: Path
    manifest: dict | None
    config: dict
    weights: Shard
    scales: dict[str, float]
    transposed: bool
    ranks: dict[str, int]
    replaced: frozenset[str] = frozenset()

    @property
    def trained(self) -> set[str]:
        """Every tensor of the base that the adapter changes."""
        return set(self.scales) | self.replaced


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and header. Raises ModelError where it is no plain LoRA."""
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        raise UsageError(f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter; name what `liger finetune` wrote")
    config = read_json(inside(folder.resolve(), ADAPTER_CONFIG))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {str(config.get('peft_type'))[:100]} adapter; only LoRA can be merged")
    for field, what in UNSUPPORTED.items():
        if config.get(field):
            raise ModelError(f"{folder} has {what} ({field}), which liger does not merge; use PEFT's merge_and_unload")
    start = config.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        raise ModelError(
            f"{folder} was begun by {str(start)[:100]!r} (init_lora_weights), which changes the base's weights; use "
            "PEFT's merge_and_unload"
        )
    if config.get("bias", "none") != "none":
        raise ModelError(f"{folder} has trained biases, which liger does not merge; use PEFT's merge_and_unload")
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        raise ModelError(f"{folder} lacks {ADAPTER_WEIGHTS}; an adapter in any other format is never opened")
    weights = _adapter_weights(folder)
    tensors = weights.tensors
    replaced = {name for name in tensors if is_extra(name)}
    scales, ranks = {}, {}
    for module in sorted({name.rpartition(".lora_")[0] for name in tensors if name not in replaced}):
        pair = [tensors.get(f"{module}.lora_{side}.weight") for side in "AB"]
        if None in pair:
            raise ModelError(f"{folder}: {module} lacks one of its two LoRA matrices")
        a, b = (tensor.shape for tensor in pair)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise ModelError(f"{folder}: the LoRA matrices of {module} are {list(a)} and {list(b)}, which do not fit")
        name = f"{module.removeprefix(PREFIX)}.weight"
        scales[name], ranks[name] = _scale(folder, config, module, a[0]), a[0]
    whole = frozenset(name.removeprefix(PREFIX) for name in replaced)
    transposed = bool(config.get("fan_in_fan_out"))
    return Adapter(folder, read_manifest(folder), config, weights, scales, transposed, ranks, whole)


def find_base(adapter: Adapter, given: str | Path | None) -> Path:
    """The folder of the converted model, resolved.

    Raises:
        UsageError: it is neither given nor where the adapter says.
    """
    recorded = (adapter.manifest or {}).get("base", {}).get("path") or adapter.config.get("base_model_name_or_path")
    named = given or (recorded if isinstance(recorded, str) else "?")
    folder = Path(named)
    if given is not None:
        folder = folder.expanduser()
    elif not os.path.isdir(folder):
        folder = Path(adapter.folder.resolve().parent, folder.name)  # both were moved together
    if not os.path.isdir(folder):
        raise UsageError(f"the model {named} that {adapter.folder} was trained on is not there; name it with --base")
    if "liger" not in read_config(folder.resolve()):
        raise ModelError(f"{folder} is not linearized, so the adapter does not belong to it")
    return folder.resolve()


def peft_config(adapter: Adapter):
    """The adapter as a `peft.LoraConfig`, made from what was read and checked, for PEFT to load its tensors into.

    The folder's own may name packages to import, files elsewhere, and patterns to search with.
    """
    from peft import LoraConfig

    modules = {name.removesuffix(".weight"): rank for name, rank in adapter.ranks.items()}
    alphas = {module: adapter.scales[f"{module}.weight"] * rank for module, rank in modules.items()}
    rank, alpha = next(iter(modules.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules),
        rank_pattern={f"^{re.escape(module)}": one for module, one in modules.items() if one != rank},
        alpha_pattern={f"^{re.escape(module)}": one for module, one in alphas.items() if one != alpha},
        fan_in_fan_out=adapter.transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def delta(adapter: Adapter, name: str):
    """What an adapter adds to the weight `name`: scale * B A, a float32 tensor [out, in]."""
    module = PREFIX + name.removesuffix(".weight")
    a, b = (read_tensor(adapter.weights, f"{module}.lora_{side}.weight") for side in "AB")
    update = (b @ a) * adapter.scales[name]
    return update.T if adapter.transposed else update


def whole_tensor(adapter: Adapter, name: str):
    """The extra tensor `name` as the adapter trained it, in float32."""
    return read_tensor(adapter.weights, PREFIX + name)


def is_extra(name: str) -> bool:
    """Whether a tensor is one that liger added to the model, trained as a whole and not by LoRA."""
    return name.rpartition(".")[2] in NAMES


def check_fits(adapter: Adapter, model: Path, shards: tuple[Shard, ...], found: dict) -> None:
    """Raises ModelError where the adapter was trained on other weights, or names tensors that are not there."""
    wanted = (adapter.manifest or {}).get("fingerprint", {}).get("digest")
    if wanted is None:
        print(f"liger: {adapter.folder} records no fingerprint; only the shapes are checked", file=sys.stderr)
    elif wanted != found["digest"]:
        raise ModelError(f"{adapter.folder} was trained on other weights than those of {model}; name its own --base")
    check_shapes(adapter, model, shards)


def check_shapes(adapter: Adapter, model: Path, shards: tuple[Shard, ...]) -> None:
    """Raises ModelError where the adapter names tensors that are not there, or of another shape."""
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    shapes = {name: tensor.shape for name, tensor in adapter.weights.tensors.items()}
    for name in adapter.replaced:
        shape = shapes[PREFIX + name]
        if name not in tensors or tensors[name].shape != shape:
            raise ModelError(f"{adapter.folder} trains {name} {list(shape)}, which {model} does not have")
    for name in adapter.scales:
        module = PREFIX + name.removesuffix(".weight")
        if name not in tensors:
            raise ModelError(f"{adapter.folder} trains {name}, which {model} does not have")
        rows, columns = shapes[f"{module}.lora_B.weight"][0], shapes[f"{module}.lora_A.weight"][1]
        shape = (columns, rows) if adapter.transposed else (rows, columns)
        if tensors[name].shape != shape:
            raise ModelError(f"{adapter.folder}: the update of {name} is {shape}, the weight {tensors[name].shape}")


def window_only(adapters: list[Adapter]) -> bool:
    """Whether the adapters were trained with the window alone. Raises UsageError where only some of them were."""
    ways = {str(recipe_of(adapter).get("attention", "liger")) for adapter in adapters}
    if len(ways) > 1:
        raise UsageError("some of these adapters were trained with the window alone and some were not; merge one kind")
    return ways == {"window"}


def recipe_of(adapter: Adapter) -> dict:
    """The recipe that the adapter was trained by, as plain data; empty where none is recorded."""
    return ((adapter.manifest or {}).get("settings") or {}).get("recipe") or {}


def _adapter_weights(folder: Path) -> Shard:
    """The header of the adapter's tensors. Raises ModelError where they are no plain LoRA."""
    shard = read_shard(folder.resolve(), ADAPTER_WEIGHTS)
    for name in shard.tensors:
        lora = name.endswith((".lora_A.weight", ".lora_B.weight"))
        if not name.startswith(PREFIX) or not (lora or is_extra(name)):
            raise ModelError(f"{folder} holds {name}, which is not LoRA of a linear layer; use PEFT's merge_and_unload")
    if not shard.tensors:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is empty")
    return shard


def _scale(folder: Path, config: dict, module: str, rank: int) -> float:
    """alpha / r of one module, with PEFT's patterns for single modules. Raises ModelError."""
    named = _pattern(folder, config, "rank_pattern", module, config.get("r"))
    if named != rank:
        raise ModelError(f"{folder}: {module} has rank {rank}, where {ADAPTER_CONFIG} says {named!r:.100}")
    alpha = _pattern(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
        raise ModelError(f"{folder}: lora_alpha of {module} is {alpha!r:.100}, but has to be a number")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(folder: Path, config: dict, field: str, module: str, default):
    from peft.utils.other import get_pattern_key

    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{folder}: {field} is {patterns!r:.100}, but has to be an object")
    for pattern in patterns:
        # Two repetitions can make a search take for ever; PEFT itself writes names.
        if len(pattern) > 500 or sum(pattern.count(one) for one in "*+{") > 1:
            raise ModelError(
                f"{folder}: {field} has the pattern {pattern[:100]!r}, which is more than liger searches with"
            )
    try:
        return patterns.get(get_pattern_key(patterns.keys(), module.removeprefix(PREFIX)), default)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{folder}: {field} has a pattern that is none ({error})") from None
