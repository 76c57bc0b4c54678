"""The training loop: Hugging Face's Trainer with our objectives, batches in a fixed order and checkpoints to trust."""

import json
import math
import os
import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from liger_cli.data import Collator, Example, Schedule, make_rows
from liger_cli.errors import LigerError
from liger_cli.objectives import TrainedModel, ce_sum, counts
from liger_cli.recipes import Recipe

COMPLETE = "complete"
LOG = "log.jsonl"
KEPT_CHECKPOINTS = 2  # the one before stays until the newest is marked complete


def training_arguments(recipe: Recipe, steps: int, folder: Path, accumulation: int, evaluate: bool, **extra):
    """The recipe as `TrainingArguments`. `folder` takes the checkpoints."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=max(stage.lr for stage in recipe.stages),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.eval_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        metric_for_best_model="loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=len(recipe.stages) > 1 or recipe.stages[0].objective == "transfer",
        **extra,
    )


class LigerTrainer(Trainer):
    """Trainer whose micro-batches come in the schedule's order and whose loss is the stage's.

    Args:
        model: the model with its adapter.
        recipe: decides the stages and the learning rate.
        schedule: the micro-batches of the whole run.
        held_out: examples for `evaluate`.
        args: from `training_arguments`.
    """

    def __init__(
        self,
        model: TrainedModel,
        recipe: Recipe,
        schedule: Schedule,
        held_out: list[Example],
        pad_token_id: int,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ):
        self.recipe, self.held_out = recipe, held_out
        self.ends = recipe.stage_ends(schedule.steps)
        model.stage = recipe.stages[0]
        collator = Collator(pad_token_id)
        super().__init__(
            model=model,
            args=args,
            train_dataset=schedule,
            eval_dataset=held_out or None,
            data_collator=collator,
            callbacks=callbacks,
        )
        # `compute_loss` divides by the global batch's count of tokens itself.
        self.model_accepts_loss_kwargs = True
        rows = make_rows(held_out, recipe.seq_len * recipe.micro_batch_size, True, Random(0))
        self.held_out_batches = [collator([[held_out[index] for index in row]]) for row in rows]

    def stage_index(self, step: int) -> int:
        """Which stage optimizer step `step` (from 0) belongs to."""
        return next((index for index, end in enumerate(self.ends) if step < end), len(self.ends) - 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and their tokens over all processes: [predicted, all]."""
        self.model.stage = self.recipe.stages[self.stage_index(self.state.global_step)]
        batches = list(islice(epoch_iterator, num_batches))
        totals = torch.tensor([counts(batch["labels"], batch["lengths"]) for batch in batches], device=device).sum(0)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        return batches, totals

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's sum over the micro-batch, over the tokens of the global batch."""
        loss = model(**inputs)["loss"]
        if num_items_in_batch is not None:
            predicted, every = num_items_in_batch
            loss = loss / (predicted if self.model.stage.objective == "ce" else every).clamp_min(1)
            loss = loss * self.args.world_size  # data-parallel wrappers average the gradients
        if not torch.isfinite(loss):
            raise diverged("loss", self.state.global_step, Path(self.args.output_dir))
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Cross-entropy and perplexity on the held-out examples, whatever the stage's objective."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in self.held_out_batches[self.args.process_index :: self.args.world_size]:
                predicted = counts(batch["labels"], batch["lengths"])[0]
                total = ce_sum(
                    self.model, batch["input_ids"].to(self.args.device), batch["labels"].to(self.args.device)
                )
                sums += torch.tensor([total.double().item(), predicted])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        loss = (sums[0] / sums[1]).item()
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700))}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """ReduceLROnPlateau on the held-out loss, or a schedule within each stage."""
        if self.lr_scheduler is None:
            recipe, optimizer = self.recipe, optimizer or self.optimizer
            if recipe.schedule == "plateau":
                self.lr_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                    optimizer, factor=recipe.plateau_factor, patience=recipe.plateau_patience, min_lr=recipe.min_lr
                )
            else:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    optimizer, partial(lr_factor, recipe, tuple(self.ends))
                )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save_checkpoint(self, model, trial):
        """As Trainer's, then marked complete: a checkpoint without the mark is never resumed from."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left behind, incomplete, by a run that was killed
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # safetensors and torch have error classes of their own for a full disk
            if shutil.disk_usage(self.args.output_dir).free > 64 << 20 and not isinstance(error, OSError):
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise LigerError(
                f"the checkpoint of step {self.state.global_step} could not be written to {self.args.output_dir} "
                f"({str(error)[:120]}); free some space, then go on with --resume"
            ) from None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / COMPLETE).touch()


def lr_factor(recipe: Recipe, ends: tuple[int, ...], step: int) -> float:
    """Learning rate of optimizer step `step` (from 0), as a factor of the largest stage's."""
    index = next((index for index, end in enumerate(ends) if step < end), len(ends) - 1)
    first = ends[index - 1] if index else 0
    steps, stage = ends[index] - first, recipe.stages[index]
    warm = round(steps * recipe.warmup)
    peak = stage.lr / max(one.lr for one in recipe.stages)
    if step - first < warm:
        return peak * (step - first + 1) / (warm + 1)
    done = min(1.0, (step - first - warm) / max(1, steps - warm))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[recipe.schedule]
    floor = min(recipe.min_lr / stage.lr, 1.0) if recipe.schedule != "constant" else 0.0
    return peak * max(shape, floor)


def diverged(what: str, step: int, checkpoints: Path) -> LigerError:
    """The error for a NaN or infinite loss or gradient at optimizer step `step` (from 0)."""
    last = last_checkpoint(checkpoints)
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    return LigerError(f"the {what} is not finite at step {step + 1}; {kept}; try a lower --lr")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(found, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


class Recorder(TrainerCallback):
    """Writes every step and evaluation to a JSONL log, and hands them to a view.

    Args:
        path: the log; lines of steps beyond `start` (which a killed run left) are dropped.
        schedule: for the tokens behind each step.
        view: called with each record.
        start: optimizer steps done before.
    """

    def __init__(self, path: Path, schedule: Schedule, view, start: int = 0):
        self.path, self.schedule, self.view = path, schedule, view
        if not is_main_process():
            return
        kept = [record for record in read_log(path) if record["step"] <= start] if start else []
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Trainer's hook: one record a step or evaluation."""
        if "eval_loss" in logs:
            record = {"step": state.global_step, **{name: logs[name] for name in ("eval_loss", "eval_perplexity")}}
        elif "loss" in logs:
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                raise diverged("gradient", state.global_step - 1, Path(args.output_dir))
            record = {
                "step": state.global_step,
                "epoch": state.global_step * self.schedule.per_step / self.schedule.per_epoch,
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs["learning_rate"],
                "tokens": self._tokens(state.global_step),
            }
        else:
            return
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.view(record)

    def _tokens(self, step: int) -> int:
        per_step = self.schedule.per_step
        rows = self.schedule.micro_batches[(step - 1) * per_step : step * per_step]
        return sum(len(self.schedule.examples[index]) for row in rows for index in row)


def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that a killed run left unfinished is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def is_main_process() -> bool:
    """Whether this process prints and writes: the only one, or rank 0 of several."""
    return int(os.environ.get("RANK", "0")) == 0
