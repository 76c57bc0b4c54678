"""What a fine-tuning run will train, take and need, found out before anything is loaded."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from liger_cli.checkpoint.adapters import is_extra
from liger_cli.checkpoint.converted import read_converted
from liger_cli.checkpoint.reader import Geometry, Shard, check_dtype, fingerprint, layer_index, read_config
from liger_cli.conversion.plan import trained_layer_bytes
from liger_cli.system.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.system.memory import available
from liger_cli.system.processes import world_size
from liger_cli.system.wording import size
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.training.reach import exact_tokens, share_beyond
from liger_cli.training.recipes import Recipe

MEMORY_SHARE = 0.95  # of what is free; the estimate is one
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
NF4_BYTES = 0.5 + 4 / 64 / 4 + 1 / 256  # 4 bits, and a quantised scale for each 64 values (arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class Base:
    """The converted model to be tuned, read without loading a tensor."""

    folder: Path
    config: dict
    geometry: Geometry
    specs: list[LayerSpec]
    shards: tuple[Shard, ...]
    manifest: dict
    fingerprint: dict

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for shard in self.shards for tensor in shard.tensors.values())


def read_base(folder: Path) -> Base:
    """Read and check the model to be tuned. Raises ModelError, UsageError."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest["kind"] == "adapter":
        raise UsageError(f"{folder} is an adapter; name the converted model, or merge the adapter first")
    config = read_config(folder.resolve())
    if "liger" not in config:
        raise ModelError(f"{folder} is not linearized; run `liger convert {folder}` first")
    found = read_converted(folder)
    shards = found.checkpoint.shards
    return Base(
        found.folder, config, found.checkpoint.geometry, list(found.specs), shards, manifest or {}, fingerprint(shards)
    )


def check_setup(recipe: Recipe, report_to: str, fsdp: bool, processes: int = 1) -> None:
    """Refuse what this machine cannot do, before anything is read or loaded.

    Args:
        processes: that are going to be started.
    Raises:
        UsageError: an unknown tracker, options that exclude one another. SetupError: a package or device is missing.
    """
    if report_to != "none":
        if report_to not in TRACKERS:
            raise UsageError(f"--report-to is {report_to!r}, but has to be none, {' or '.join(TRACKERS)}")
        if not any(find_spec(name) for name in TRACKERS[report_to]):
            raise SetupError(f"--report-to {report_to} needs the package {report_to}; pip install {report_to}")
    if fsdp:
        if recipe.load_in_4bit:
            raise UsageError("--fsdp shards the weights and --load-in-4bit cannot be sharded; choose one of them")
        if len({stage.train for stage in recipe.stages}) > 1:
            raise UsageError("--fsdp cannot change what is trained from stage to stage; run the stages one by one")
        if device() != "cuda":
            raise SetupError("--fsdp needs CUDA devices and there are none: accelerate would run plain DDP instead")
        if max(processes, world_size()) < 2:
            raise UsageError("--fsdp shards the weights over several processes; give --processes 2 or more")
    if recipe.load_in_4bit:
        if device() != "cuda":
            raise SetupError("a 4-bit base (--load-in-4bit) needs a CUDA device and there is none; leave it out")
        if not find_spec("bitsandbytes"):
            raise SetupError("a 4-bit base (--load-in-4bit) needs the package bitsandbytes; pip install bitsandbytes")


def lora_modules(base: Base, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer that gets LoRA. Raises UsageError where a target module is not there."""
    layers = [index for index, spec in enumerate(base.specs) if spec.kind == "liger" or recipe.train_softmax_layers]
    shapes = {name: tensor.shape for shard in base.shards for name, tensor in shard.tensors.items()}
    found = {}
    for wanted in _fused(recipe.target_modules, shapes):
        matching = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(f".{wanted}.weight") and len(shape) == 2 and layer_of(name) in layers
        }
        if not matching:
            names = sorted(
                {name.split(".")[-2] for name, shape in shapes.items() if len(shape) == 2 and "layers" in name}
            )
            raise UsageError(f"--target-modules names {wanted!r}; the layers to be trained have {', '.join(names)}")
        found |= matching
    return found


def _fused(targets: tuple[str, ...], tensors) -> tuple[str, ...]:
    """q_proj, k_proj and v_proj become qkv_proj where the family has fused them (Phi-3)."""
    split = ("q_proj", "k_proj", "v_proj")
    fused = any(".qkv_proj." in name for name in tensors) and not any(".q_proj." in name for name in tensors)
    if not fused or not set(targets) & set(split):
        return targets
    return ("qkv_proj", *(name for name in targets if name not in split))


def check_model(base: Base, recipe: Recipe) -> None:
    """Raises UsageError where the recipe is for models converted with other settings."""
    for index, spec in enumerate(base.specs):
        if spec.kind != "liger":
            continue
        for name, wanted in recipe.model.items():
            if (found := getattr(spec, name)) != wanted:
                raise UsageError(
                    f"layer {index} of {base.folder.name} has {name} {found}, but the recipe {recipe.name} is for "
                    f"{wanted}; make its models by `liger convert BASE --recipe {recipe.name}`"
                )


def trained_extras(base: Base, recipe: Recipe) -> int:
    """How many extra parameters the recipe trains. Raises UsageError: a stage trains those only and there are none."""
    extras = sum(tensor.numel for shard in base.shards for name, tensor in shard.tensors.items() if is_extra(name))
    ways = {stage.train for stage in recipe.stages}
    if "extra" in ways and not extras:
        raise UsageError(
            f"the recipe {recipe.name} has a stage that trains extra parameters only, and {base.folder.name} has none; "
            "convert with --feature-params learned, --gate-params learned or --branch-scales"
        )
    return extras if ways != {"lora"} else 0


def layer_of(name: str) -> int | None:
    """The layer that a tensor or module of this name belongs to."""
    match = layer_index(name)
    return int(match[1]) if match else None


def make_plan(base, recipe, modules, data, loaded, schedule, dtype, target) -> dict:
    """What is printed before the run, and reported after it."""
    tokens, padding = schedule.tokens()
    extras = trained_extras(base, recipe)
    lora = 0 if {stage.train for stage in recipe.stages} == {"extra"} else recipe.lora_rank
    trainable = sum(lora * (rows + columns) for rows, columns in modules.values()) + extras
    streamed = schedule.per_epoch is None
    beyond = share_beyond(
        schedule.samples(),
        exact_tokens(base.specs, base.geometry.num_key_value_heads),
        every=any(stage.objective != "ce" for stage in recipe.stages),
        joined=recipe.seq_len if recipe.joined and recipe.packing else None,
    )
    return {
        "model": str(base.folder),
        "output": str(target),
        "recipe": recipe.name,
        "objectives": [stage.objective for stage in recipe.stages],
        "data": data,
        "sources": loaded.report,
        "streaming": streamed,
        "held_out_examples": len(loaded.held_out),
        "train_examples": None if streamed else len(loaded.train),
        "parameters": base.parameters,
        "trainable_parameters": trainable,
        "trainable_extra_parameters": extras,
        "beyond_exact_memory": beyond,
        "tokens": tokens,
        "padding_tokens": padding,
        "steps": schedule.steps,
        "epochs": None if streamed else round(len(schedule) / schedule.per_epoch, 2),
        "batch_size": recipe.batch_size,
        "seq_len": recipe.seq_len,
        "device": device(),
        "dtype": dtype,
        "load_in_4bit": recipe.load_in_4bit,
        "memory_estimate_bytes": estimate_memory(base, recipe, trainable, dtype),
    }


def estimate_memory(base: Base, recipe: Recipe, trainable: int, dtype: str) -> int:
    """Bytes that training will take: weights, LoRA with its gradients and AdamW moments, activations, logits.

    An estimate on the safe side, of the tensors alone: `tests/test_memory_counted.py` holds it against what a step
    holds at once.
    """
    width = 4 if dtype == "float32" else 2
    sizes, tokens = base.geometry, recipe.seq_len * recipe.micro_batch_size
    layers = [tokens * trained_layer_bytes(base.config, sizes, spec, width) for spec in base.specs]
    # The inputs of all layers, of transfer also what their attentions are to give and give.
    transfer = any(stage.objective.startswith("transfer") for stage in recipe.stages)
    kept = (5 if transfer else 1) * len(layers) * tokens * sizes.hidden_size * width
    # One layer is computed with the gradients of all that it holds.
    activations = kept + max(layers) + (max(layers) if recipe.gradient_checkpointing else sum(layers))
    # Float32 copies of a chunk's logits: logits, their softmax, gradient and the head's own; the teacher's and KL's.
    copies = max(
        {"ce": 4, "distill": 7, "transfer": 0, "transfer-heads": 0}[stage.objective] for stage in recipe.stages
    )
    logits = copies * 4 * min(1 << 25, tokens * sizes.vocab_size)
    return round(weight_bytes(base, recipe, width) + 16 * trainable + activations + logits)


def weight_bytes(base: Base, recipe: Recipe, width: int) -> float:
    """Bytes of the frozen weights; with 4-bit weights only the linear layers within the decoder are quantised."""
    if not recipe.load_in_4bit:
        return base.parameters * width
    tensors = [item for shard in base.shards for item in shard.tensors.items()]
    small = sum(t.numel for name, t in tensors if layer_of(name) is not None and len(t.shape) == 2)
    return small * NF4_BYTES + (base.parameters - small) * width


def check_memory(plan: dict) -> None:
    """Refuse a run that cannot fit. Raises LigerError naming what would make it fit."""
    free = available(own_device())
    if free is not None and plan["memory_estimate_bytes"] > MEMORY_SHARE * free:
        ways = ["--gradient-checkpointing", "--micro-batch-size 1", "a smaller --seq-len"]
        ways += ["--dtype bfloat16"] if plan["dtype"] == "float32" else []
        ways += ["--load-in-4bit"] if plan["device"] == "cuda" and not plan["load_in_4bit"] else []
        raise LigerError(
            f"training needs an estimated {size(plan['memory_estimate_bytes'])} and {size(free)} "
            f"are free on the {plan['device']}; try {', '.join(ways[:-1])} or {ways[-1]}"
        )


def device() -> str:
    """`cuda` or `cpu`: where training runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device() -> str:
    """Where this process's weights go: `cpu`, all CUDA devices (`cuda`), or of several processes its own one."""
    if world_size() == 1 or device() == "cpu":
        return device()
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def training_dtype(name: str) -> str:
    """The dtype of the frozen weights that `--dtype` asks for. Raises UsageError."""
    if name == "auto":
        return "bfloat16" if device() == "cuda" else "float32"
    check_dtype(name, "auto")
    return name
