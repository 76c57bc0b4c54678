"""What each command takes of memory with a model, counted from shapes: nothing is loaded."""

from dataclasses import replace
from pathlib import Path

from liger_cli.calibration.sizes import SEQ_LEN, calibration_bytes
from liger_cli.checkpoint.converted import read_converted
from liger_cli.checkpoint.reader import ADAPTER_CONFIG, context_length, read_checkpoint, read_config
from liger_cli.commands.bench_options import BenchOptions
from liger_cli.commands.evaluate_options import EvaluateOptions
from liger_cli.conversion.plan import Plan, make_plan, read_layer_bytes, with_defaults
from liger_cli.evaluation.scoring import LOGITS_BYTES, rows_at_once
from liger_cli.system.errors import UsageError
from liger_cli.training.plan import Base, estimate_memory, lora_modules
from liger_cli.training.recipes import load_recipe

RECIPE = "best"
LOGIT_COPIES = 3  # logits, their logarithms of probabilities, and the base's


def command_needs(folder: Path, device: str) -> list[dict]:
    """`{"command", "bytes"}` of each command that loads the model.

    Args:
        folder: a base, or a model that liger made of it; a base as its calibrated conversion.
        device: `cpu`, where weights are float32, or a CUDA device, where they are as they are in the files.
    Raises:
        UsageError: an adapter. ModelError: neither.
    """
    if not (folder / "config.json").exists() and (folder / ADAPTER_CONFIG).exists():
        raise UsageError(f"{folder} is an adapter; name the model that it belongs to")
    config = read_config(folder.resolve())
    if "liger" in config:
        found = read_converted(folder)
        plan = Plan(found.checkpoint, found.specs, ())
    else:
        plan = make_plan(read_checkpoint(folder), with_defaults({}, calibrate=True))
    checkpoint, sizes = plan.checkpoint, plan.checkpoint.geometry
    width = 4 if device == "cpu" else plan.weight_bytes() // plan.parameters()
    weights = plan.parameters() * width
    base = Base(folder, checkpoint.config, sizes, list(plan.specs), checkpoint.shards, {}, {})
    recipe = load_recipe(RECIPE)
    modules = lora_modules(base, recipe)
    trainable = recipe.lora_rank * sum(rows + columns for rows, columns in modules.values())
    read = read_layer_bytes(checkpoint.config, sizes, width)

    def training(**changes) -> int:
        dtype = "float32" if device == "cpu" else "bfloat16"
        return estimate_memory(base, replace(recipe, **changes), trainable, dtype)

    calibrated = min(SEQ_LEN, context_length(checkpoint.config) or SEQ_LEN)
    asked, benched = EvaluateOptions(), BenchOptions()
    rows = rows_at_once(asked.seq_len, sizes.vocab_size)
    # Of a merged model the base's weights stand beside those that the adapter changed.
    replaced = sum(rows * columns for rows, columns in modules.values()) * width
    checkpointed = {"gradient_checkpointing": True}
    found = {
        "liger convert --calibrate": weights + calibration_bytes(plan, calibrated, width),
        "liger finetune": training(),
        "liger finetune --gradient-checkpointing": training(**checkpointed),
    }
    if device != "cpu":
        command = "liger finetune --gradient-checkpointing --load-in-4bit"
        found[command] = training(**checkpointed, load_in_4bit=True)
    found["liger eval"] = weights + replaced + rows * asked.seq_len * read + LOGIT_COPIES * LOGITS_BYTES
    found["liger bench"] = weights + benched.seq_len * read + plan.cache_bytes(benched.seq_len)
    return [{"command": command, "bytes": nbytes} for command, nbytes in found.items()]
