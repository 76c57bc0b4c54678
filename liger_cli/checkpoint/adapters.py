"""LoRA adapters, as PEFT writes them: read, checked against the model, and their updates; no code of theirs is run."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from liger_cli.checkpoint.reader import ADAPTER_CONFIG, Shard, inside, read_config, read_shard
from liger_cli.checkpoint.tensors import read_tensor
from liger_cli.system.console import say
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.system.untrusted import read_json
from liger_cli.templates.liger_extras import NAMES

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: the base's weights stay
# Fields of adapter_config.json that merging heeds, and those that say nothing about the merged weights. Every other one
# has to be empty: it may change the model, in this PEFT or in a later one.
HEEDED = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "modules_to_save", "init_lora_weights", "ensure_weight_tying",
)  # fmt: skip
HARMLESS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "loftq_config",
    "eva_config", "qalora_group_size", "megatron_core",
    "fan_in_fan_out",  # PEFT heeds it in transformers' Conv1D only, which no family has
)  # fmt: skip
WHAT = {
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "LoRA biases",
    "target_parameters": "LoRA on parameters that are no layers",
    "layer_replication": "repeated layers",
}
ELSEWHERE = "; PEFT's merge_and_unload and save_pretrained make a folder of it that liger evaluates and benches"
SIDES = {"weight": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
MAGNITUDE = "lora_magnitude_vector"
PART = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_ALPHA = 1e6


@dataclass(frozen=True)
class Update:
    """What LoRA changes of one weight: scale * B A, and the length of each row where it is DoRA.

    Attributes:
        a, b: names of the matrices in the adapter's file: [rank, in] and [out, rank].
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
        rank: of the update.
        embedding: the weight is an embedding's, [in, out].
        magnitude: name of DoRA's row lengths, [out], or None.
    """

    a: str
    b: str
    scale: float
    rank: int
    embedding: bool = False
    magnitude: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read but for its tensors.

    Attributes:
        weights: the file of its tensors.
        updates: name of the weight in the base -> its update.
        replaced: name of a tensor of the model that was trained whole -> its name in the adapter's file: liger's own
            extra tensors, modules_to_save, biases, resized embeddings.
    """

    folder: Path
    manifest: dict | None
    config: dict
    weights: Shard
    updates: dict[str, Update]
    replaced: dict[str, str]

    @property
    def trained(self) -> set[str]:
        """Every tensor of the base that the adapter changes."""
        return set(self.updates) | set(self.replaced)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and header. Raises ModelError where it is no LoRA that liger can merge."""
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        raise UsageError(f"{folder} has no {ADAPTER_CONFIG}, so it is not an adapter; name what `liger finetune` wrote")
    config = read_json(inside(folder.resolve(), ADAPTER_CONFIG))
    _check_fields(folder, config)
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        raise ModelError(f"{folder} lacks {ADAPTER_WEIGHTS}; an adapter in any other format is never opened")
    weights = read_shard(folder.resolve(), ADAPTER_WEIGHTS)
    if not weights.tensors:
        raise ModelError(f"{folder / ADAPTER_WEIGHTS} is empty")
    updates, replaced, modules = {}, {}, set()
    for name in weights.tensors:
        if not name.startswith(PREFIX):
            raise ModelError(f"{folder} holds {name}, which is no tensor of a model under PEFT")
        if match := PART.fullmatch(name):
            modules.add(match[1])
        elif ".lora_" in name or ".token_adapter." in name:
            raise ModelError(f"{folder} holds {name}, which liger does not merge{ELSEWHERE}")
        else:
            replaced[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = name
    for module in sorted(modules):
        updates[f"{module.removeprefix(PREFIX)}.weight"] = _update(folder, config, module, weights.tensors)
    return Adapter(folder, read_manifest(folder), config, weights, updates, replaced)


def _check_fields(folder: Path, config: dict) -> None:
    """Raises ModelError where adapter_config.json asks for something else than merging does."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {str(config.get('peft_type'))[:100]} adapter; only LoRA can be merged")
    for field, value in config.items():
        if field in (*HEEDED, *HARMLESS) or value in (None, False, "", [], {}):
            continue
        what = WHAT.get(field, f"{field} {str(value)[:100]!r}")
        raise ModelError(f"{folder} has {what} ({ADAPTER_CONFIG}'s {field}), which liger does not merge{ELSEWHERE}")
    start = config.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        what = f"begun by {str(start)[:100]!r} (init_lora_weights), which changes the base's weights"
        raise ModelError(f"{folder} was {what}{ELSEWHERE}")


def _update(folder: Path, config: dict, module: str, tensors: dict) -> Update:
    """The update of one module. Raises ModelError where its matrices are not whole."""
    embedding = f"{module}.{SIDES['embedding'][0]}" in tensors
    names = [f"{module}.{side}" for side in SIDES["embedding" if embedding else "weight"]]
    if not all(name in tensors for name in names):
        raise ModelError(f"{folder}: {module} lacks one of its two LoRA matrices")
    a, b = (tensors[name].shape for name in names)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise ModelError(f"{folder}: the LoRA matrices of {module} are {list(a)} and {list(b)}, which do not fit")
    found = [name for name in (f"{module}.{MAGNITUDE}", f"{module}.{MAGNITUDE}.weight") if name in tensors]
    if bool(config.get("use_dora")) != bool(found) or (found and embedding):
        raise ModelError(f"{folder}: {module} is {'' if found else 'not '}DoRA, which liger does not merge{ELSEWHERE}")
    if found and tensors[found[0]].shape != (b[0],):
        raise ModelError(f"{folder}: {found[0]} is {list(tensors[found[0]].shape)} where {module} has {b[0]} rows")
    return Update(*names, _scale(folder, config, module, a[0]), a[0], embedding, found[0] if found else None)


def base_of_adapter(adapter: Adapter, given: str | Path | None) -> Path:
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

    if not adapter.updates:
        raise ModelError(f"{adapter.folder} holds no LoRA, only whole tensors; merge it first")
    modules = {name.removesuffix(".weight"): update for name, update in adapter.updates.items()}
    alphas = {module: update.scale * update.rank for module, update in modules.items()}
    rank, alpha = next(iter(modules.values())).rank, next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules),
        rank_pattern={f"^{re.escape(module)}": one.rank for module, one in modules.items() if one.rank != rank},
        alpha_pattern={f"^{re.escape(module)}": one for module, one in alphas.items() if one != alpha},
        use_dora=any(update.magnitude for update in modules.values()),
        modules_to_save=sorted(_whole_modules(adapter)) or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def merged(adapter: Adapter, name: str, weight):
    """What an adapter makes of the weight `name`, a float32 tensor.

    DoRA gives every row of the sum a trained length (arXiv 2402.09353, eq. 5).
    """
    import torch

    if name in adapter.replaced:
        weight = read_tensor(adapter.weights, adapter.replaced[name])
    if (update := adapter.updates.get(name)) is None:
        return weight
    a, b = (read_tensor(adapter.weights, matrix) for matrix in (update.a, update.b))
    delta = (b @ a) * update.scale
    weight = weight + (delta.T if update.embedding else delta)
    if update.magnitude is None:
        return weight
    lengths = read_tensor(adapter.weights, update.magnitude) / torch.linalg.norm(weight, dim=1)
    return lengths[:, None] * weight


def _whole_modules(adapter: Adapter) -> set[str]:
    """Modules that PEFT trains as a whole, in a copy: those whose weight is there and has no LoRA."""
    found = {name.rpartition(".")[0] for name in adapter.replaced if name.endswith(".weight") and not is_extra(name)}
    return found - {name.rpartition(".")[0] for name in adapter.updates}


def overwritten(adapter: Adapter, shards: tuple[Shard, ...]) -> str | None:
    """The first tensor, a trained bias perhaps, that stays the adapter's where PEFT switches it off, or None."""
    import torch

    switched = _whole_modules(adapter)
    for name, own in adapter.replaced.items():
        shard = next((shard for shard in shards if name in shard.tensors), None)
        if name.rpartition(".")[0] in switched or is_extra(name) or shard is None:
            continue
        if not torch.equal(read_tensor(adapter.weights, own), read_tensor(shard, name)):
            return name
    return None


def untied(adapters: list[Adapter], shards: tuple[Shard, ...]) -> dict[str, str]:
    """Tensors that a merged model needs beside the base's: name -> the one that stood for it.

    A head tied to the embeddings is a tensor of its own once only one of the two was trained, as PEFT runs them.
    """
    held = {name for shard in shards for name in shard.tensors}
    if HEAD in held or EMBEDDING not in held:
        return {}
    trained = {name for adapter in adapters for name in adapter.trained}
    together = all(adapter.config.get("ensure_weight_tying") for adapter in adapters if EMBEDDING in adapter.trained)
    apart = HEAD in trained or (EMBEDDING in trained and not together)
    return {HEAD: EMBEDDING} if apart else {}


def is_extra(name: str) -> bool:
    """Whether a tensor is one that liger added to the model, trained as a whole and not by LoRA."""
    return name.rpartition(".")[2] in NAMES


def check_fits(adapter: Adapter, model: Path, shards: tuple[Shard, ...], found: dict) -> None:
    """Raises ModelError where the adapter was trained on other weights, or names tensors that are not there."""
    wanted = (adapter.manifest or {}).get("fingerprint", {}).get("digest")
    if wanted is None:
        say(f"{adapter.folder} records no fingerprint; only the shapes are checked")
    elif wanted != found["digest"]:
        raise ModelError(f"{adapter.folder} was trained on other weights than those of {model}; name its own --base")
    check_shapes(adapter, model, shards)


def check_shapes(adapter: Adapter, model: Path, shards: tuple[Shard, ...]) -> None:
    """Raises ModelError where the adapter names tensors that are not there, or of another shape."""
    shapes = {name: tensor.shape for shard in shards for name, tensor in shard.tensors.items()}
    shapes |= {name: shapes[source] for name, source in untied([adapter], shards).items()}
    own = {name: tensor.shape for name, tensor in adapter.weights.tensors.items()}
    found = {name: own[source] for name, source in adapter.replaced.items()}
    for name, update in adapter.updates.items():
        rows, columns = own[update.b][0], own[update.a][1]
        found[name] = (columns, rows) if update.embedding else (rows, columns)
    for name, shape in found.items():
        if name not in shapes:
            raise ModelError(f"{adapter.folder} trains {name} {list(shape)}, which {model} does not have")
        if shapes[name] != shape:
            raise ModelError(f"{adapter.folder}: the update of {name} is {shape}, the weight {shapes[name]}")


def window_only(adapters: list[Adapter]) -> bool:
    """Whether the adapters were trained with the window alone. Raises UsageError where only some of them were."""
    ways = {str(recipe_of(adapter).get("attention", "liger")) for adapter in adapters}
    if len(ways) > 1:
        raise UsageError("some of these adapters were trained with the window alone and some were not; merge one kind")
    return ways == {"window"}


def recipe_of(adapter: Adapter) -> dict:
    """The recipe that the adapter was trained by, as plain data; empty where none is recorded."""
    return ((adapter.manifest or {}).get("settings") or {}).get("recipe") or {}


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
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{folder}: {field} is {patterns!r:.100}, but has to be an object")
    if not patterns:
        return default
    for pattern in patterns:
        # Two repetitions can make a search take for ever; PEFT itself writes names.
        if len(pattern) > 500 or sum(pattern.count(one) for one in "*+{") > 1:
            raise ModelError(
                f"{folder}: {field} has the pattern {pattern[:100]!r}, which is more than liger searches with"
            )
    from peft.utils.other import get_pattern_key

    try:
        return patterns.get(get_pattern_key(patterns.keys(), module.removeprefix(PREFIX)), default)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{folder}: {field} has a pattern that is none ({error})") from None
