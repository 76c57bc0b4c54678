"""One fine-tuning run: the model, the trainer and its callbacks put together, trained, evaluated and saved."""

import math
import os
import pickle
import shutil
import time
from pathlib import Path

from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.processes import is_main_process, world_size
from liger_cli.training.adapter import adapted_model, sharded_classes
from liger_cli.training.plan import Base
from liger_cli.training.recipes import Recipe

CHECKPOINTS = "checkpoints"


def train(
    base: Base,
    recipe: Recipe,
    modules: dict,
    loaded,
    schedule,
    tokenizer,
    partial: Path,
    *,
    resume: bool,
    quiet: bool,
    dtype: str,
    report_to: str,
    fsdp: bool,
) -> dict:
    """Train and save the adapter into `partial`, beside the run's checkpoints, log and plot.

    Args:
        modules: the linear layers that get LoRA, as `plan.lora_modules` gives them.
        loaded, schedule: the data and the micro-batches, as `finetune.load_schedule` gives them.
        resume, quiet, dtype, report_to, fsdp: as for `finetune.run`; `dtype` is a name, no longer `auto`.
    Returns:
        What the report says of the training: steps, seconds, losses, held-out perplexities.
    Raises:
        UsageError: the batch cannot be divided among the processes. LigerError: a checkpoint is broken, a loss is not
            finite.
    """
    import torch
    from transformers import PrinterCallback

    from liger_cli.training.trainer import (
        BEST,
        LOG,
        EarlyStop,
        LigerTrainer,
        Recorder,
        checkpoint_step,
        last_checkpoint,
        read_log,
        training_arguments,
    )
    from liger_cli.training.view import TrainView, write_plot

    world = world_size()
    if schedule.per_step % world:
        raise UsageError(
            f"--processes is {world}, but a batch of {recipe.batch_size} has {schedule.per_step} micro-batches; "
            "choose a divisor"
        )
    checkpoints = partial / CHECKPOINTS
    last = last_checkpoint(checkpoints) if resume else None
    start = checkpoint_step(last) if last else 0
    # DeepSpeed shards what it is given, too, and does not take a model that lies on a device already.
    sharded = fsdp or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    adapted = adapted_model(base, recipe, modules, dtype, sharded)
    view = TrainView(schedule, start, quiet or not is_main_process())
    log = partial / LOG
    keeps_best = recipe.early_stop or recipe.keep_best
    stop = EarlyStop(recipe.early_stop) if keeps_best and loaded.held_out else None
    callbacks = [Recorder(log, schedule, view, start), *([stop] if stop else [])]
    if report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(partial / "runs"))
    args = training_arguments(
        recipe,
        schedule.steps,
        checkpoints,
        schedule.per_step // world,
        bool(loaded.held_out),
        sharded=sharded_classes(adapted, recipe) if fsdp else (),
        report_to=report_to,
        use_cpu=not torch.cuda.is_available(),
        eval_on_start=bool(loaded.held_out) and not start,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    trainer = LigerTrainer(adapted, recipe, schedule, loaded.held_out, pad, args, callbacks)
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    with view:
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except pickle.UnpicklingError as error:  # torch loads tensors and plain values only (weights_only)
            raise LigerError(f"the checkpoint {last} is broken or holds more than tensors; remove it") from error
        last_step = [one for one in trainer.state.log_history if one["step"] == trainer.state.global_step]
        if loaded.held_out and not any("eval_loss" in one for one in last_step):
            trainer.evaluate()
        base_loss = trainer.base_loss() if loaded.held_out else None
    seconds = time.perf_counter() - began
    records = read_log(log)
    losses = [record["loss"] for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    stop = trainer.early_stop()
    trainer.save_adapter(partial)
    chosen = evaluations[-1] if evaluations else None
    if stop is not None and stop.best_step:
        chosen = next(record for record in evaluations if record["step"] == stop.best_step)
        if is_main_process():
            for path in (checkpoints / BEST).iterdir():
                shutil.copyfile(path, partial / path.name)
    if is_main_process():
        write_plot(records, partial / "loss.png", recipe)
    return {
        "steps_done": trainer.state.global_step,
        "stopped_early": trainer.state.global_step < schedule.steps,
        "adapter_step": chosen["step"] if chosen else trainer.state.global_step,
        "resumed_from_step": start,
        "trained_tokens": sum(record["tokens"] for record in records if "loss" in record),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(view.tokens / view.seconds, 1) if view.seconds else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
        "held_out_perplexity_base": None if base_loss is None else math.exp(min(base_loss, 700)),
        "held_out_perplexity_before": evaluations[0]["eval_perplexity"] if evaluations else None,
        "held_out_perplexity": chosen["eval_perplexity"] if chosen else None,
    }  # fmt: skip
