"""The training loop: Hugging Face's Trainer with our objectives, batches in a fixed order and checkpoints to trust."""

import json
import math
import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from liger_cli.evaluation.finite import first_non_finite
from liger_cli.system.errors import LigerError, SetupError, write_errno
from liger_cli.system.processes import is_main_process
from liger_cli.training.data import Example
from liger_cli.training.extras import set_trained
from liger_cli.training.objectives import TrainedModel, counts, divisor, teacher, window_dropout
from liger_cli.training.packing import Collator, Schedule, pack_rows
from liger_cli.training.recipes import Recipe, Stage
from liger_cli.training.streaming import StreamSchedule

COMPLETE = "complete"
LOG = "log.jsonl"
BEST = "best"  # among the checkpoints: the adapter of the best evaluation, of runs that may stop early
KEPT_CHECKPOINTS = 2  # the one before stays until the newest is marked complete


def training_arguments(
    recipe: Recipe, steps: int, folder: Path, accumulation: int, evaluate: bool, sharded=(), **extra
):
    """The recipe as `TrainingArguments`.

    Args:
        folder: takes the checkpoints.
        sharded: with FSDP2 the class names of the modules that are gathered at a time; without it none.
    """
    if sharded:
        extra["fsdp"] = True
        extra["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": list(sharded)}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=max(stage.lr for stage in recipe.stages),
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
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
        metric_for_best_model="objective",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=len(recipe.stages) > 1 or recipe.stages[0].objective.startswith("transfer"),
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
    Attributes:
        step_tokens: tokens of the optimizer step at work, over all processes.
    """

    step_tokens = 0

    def __init__(
        self,
        model: TrainedModel,
        recipe: Recipe,
        schedule: Schedule | StreamSchedule,
        held_out: list[Example],
        pad_token_id: int,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
    ):
        self.recipe, self.held_out = recipe, held_out
        self.ends = recipe.stage_ends(schedule.steps)
        model.stage, model.loss_mean = recipe.stages[0], recipe.loss_mean
        collator = Collator(pad_token_id)
        super().__init__(
            model=model,
            args=args,
            train_dataset=schedule,
            eval_dataset=held_out or None,
            data_collator=Collator(pad_token_id, recipe.joined),
            callbacks=callbacks,
        )
        # `compute_loss` divides by the global batch's count of tokens itself.
        self.model_accepts_loss_kwargs = True
        rows = pack_rows([len(example) for example in held_out], recipe.seq_len, recipe.packing, Random(0))
        rows = [[held_out[index] for index in row] for row in rows]
        size = recipe.micro_batch_size
        self.held_out_batches = [collator([rows[first : first + size]]) for first in range(0, len(rows), size)]

    def stage_index(self, step: int) -> int:
        """Which stage optimizer step `step` (from 0) belongs to."""
        return next((index for index, end in enumerate(self.ends) if step < end), len(self.ends) - 1)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and their `counts` over all processes."""
        index = self.stage_index(self.state.global_step)
        stage = self.recipe.stages[index]
        self.model.stage, self._accumulated = stage, 0
        if isinstance(self.lr_scheduler, StagePlateau):
            self.lr_scheduler.enter(index, stage.lr)
        if self.model.train_extra:
            set_trained(self.model, stage.train)
        batches = list(islice(epoch_iterator, num_batches))
        totals = torch.tensor([counts(batch["labels"], batch["lengths"]) for batch in batches], device=device).sum(0)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        self.step_tokens = int(totals[1])
        return batches, totals

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one micro-batch, with the window dropped where the stage's schedule says so.

        The draw depends on the seed and the micro-batch's place in the run alone: not on processes, nor on resuming.
        """
        args = self.args
        if args.fsdp and not self._accumulated:
            assert_sharded(model)
        step, index = self.state.global_step, self.stage_index(self.state.global_step)
        first = self.ends[index - 1] if index else 0
        done = (step - first) / max(1, self.ends[index] - first - 1)
        place = (step * args.gradient_accumulation_steps + self._accumulated) * args.world_size + args.process_index
        self._accumulated += 1
        rng = Random(f"{args.seed}/{place}")
        with window_dropout(self.model, self.recipe.stages[index].window_dropout_at(done), rng):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, *args, **kwargs):
        """As Trainer's, with the tokens behind a step's loss."""
        super().log({**logs, "tokens": self.step_tokens} if "loss" in logs else logs, *args, **kwargs)

    def early_stop(self) -> "EarlyStop | None":
        """The callback that ends the run early, where the recipe has one; resuming makes it anew."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, EarlyStop)), None)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter; every process has to call it, since weights that are sharded are gathered."""
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            self.model.save_pretrained(folder, state_dict=state)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's sum over the micro-batch, over the tokens of the global batch."""
        loss = model(**inputs)["loss"]
        if torch.is_grad_enabled() and not loss.requires_grad:
            # Feature maps and scores that are trained alone have no part in texts that lie within the window.
            loss = loss + 0 * next(parameter for parameter in model.parameters() if parameter.requires_grad).sum()
        if num_items_in_batch is not None:
            loss = loss / divisor(self.model, self.model.stage, num_items_in_batch).clamp_min(1)
            loss = loss * self.args.world_size  # data-parallel wrappers average the gradients
        if not torch.isfinite(loss):
            where = None
            if not self.is_fsdp_enabled:  # sharded weights are gathered by all processes or none
                where = first_non_finite(self.model.logits_model(), lambda: model(**inputs))
            raise diverged("loss", self.state.global_step, Path(self.args.output_dir), where)
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Cross-entropy a token and perplexity on the held-out examples, and there, where a plateau or the best
        checkpoint go by it, the objective as the recipe takes its mean; a stage of another objective has its own."""
        self.model.eval()
        stage, means = self.model.stage, self.recipe.loss_mean
        loss = criterion = self._held_out(Stage("ce"), "tokens")
        if means != "tokens":
            criterion = self._held_out(Stage("ce"), means)
        objective = criterion
        if stage.objective != "ce" and self.recipe.schedule == "plateau":
            objective = self._held_out(stage, means)
        self.model.stage, self.model.loss_mean = stage, means
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700))}
        metrics |= {f"{metric_key_prefix}_criterion": criterion, f"{metric_key_prefix}_objective": objective}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        stop = self.early_stop()
        if stop is not None and stop.best_step == self.state.global_step > 0:
            self.save_adapter(Path(self.args.output_dir, BEST))
        return metrics

    def base_loss(self) -> float:
        """Cross-entropy a token of the original model on the held-out examples."""
        self.model.eval()
        stage, means = self.model.stage, self.model.loss_mean
        with teacher(self.model):
            loss = self._held_out(Stage("ce"), "tokens")
        self.model.stage, self.model.loss_mean = stage, means
        return loss

    def _held_out(self, stage: Stage, means: str) -> float:
        """A stage's objective on the held-out examples."""
        self.model.stage, self.model.loss_mean = stage, means
        sums = torch.zeros(4, dtype=torch.float64)
        world, count = self.args.world_size, len(self.held_out_batches)
        with torch.no_grad():
            # Every process runs as often as the others, as gathering sharded weights needs: some the last batch again.
            for first in range(self.args.process_index, -(-count // world) * world, world):
                batch = self.held_out_batches[min(first, count - 1)]
                total = self.model(**{name: tensor.to(self.args.device) for name, tensor in batch.items()})["loss"]
                if first < count:
                    sums += torch.tensor([total.double().item(), *counts(batch["labels"], batch["lengths"])])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        return (sums[0] / divisor(self.model, stage, sums[1:])).item()

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """ReduceLROnPlateau on the held-out loss, or a schedule within each stage."""
        if self.lr_scheduler is None:
            recipe, optimizer = self.recipe, optimizer or self.optimizer
            if recipe.schedule == "plateau":
                self.lr_scheduler = StagePlateau(
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
            if write_errno(error) is None:
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


class StagePlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """ReduceLROnPlateau that begins anew with each stage.

    Attributes:
        stage: index of the stage in force, -1 before the first; a checkpoint keeps it.
    """

    stage = -1

    def enter(self, stage: int, lr: float) -> None:
        """Go on in this stage; where it is a new one, from its learning rate."""
        if stage == self.stage:
            return
        self.stage, self.best, self.num_bad_epochs, self.cooldown_counter = stage, math.inf, 0, 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr


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


def diverged(what: str, step: int, checkpoints: Path, where: str | None = None) -> LigerError:
    """The error for a NaN or infinite loss or gradient at optimizer step `step` (from 0), first seen in `where`."""
    last = last_checkpoint(checkpoints)
    advice = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    origin = f", first in {where}" if where else ""
    return LigerError(f"the {what} is not finite at step {step + 1}{origin}; {advice}; try a lower --lr")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(found, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def assert_sharded(model) -> None:
    """Raises SetupError where FSDP was asked for and accelerate runs something else, which it does without a word."""
    from torch.distributed.tensor import DTensor

    if not all(isinstance(parameter, DTensor) for parameter in model.parameters() if parameter.requires_grad):
        raise SetupError(
            "FSDP was asked for, but accelerate has not sharded the weights; check that every process has a CUDA "
            "device and that its config asks for fsdp_version 2"
        )


class EarlyStop(TrainerCallback, ExportableState):
    """Ends the run when the held-out cross-entropy has not improved for `patience` evaluations.

    Args:
        patience: evaluations without improvement; 0 never ends the run.
    Attributes:
        best_step: optimizer step of the best evaluation, whose adapter stays; 0 before the first.
        best_loss: held-out cross-entropy there, by the recipe's mean.
        worse: evaluations since.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.best_step, self.best_loss, self.worse = 0, math.inf, 0

    def state(self) -> dict:
        """What a checkpoint keeps."""
        attributes = {"best_step": self.best_step, "best_loss": self.best_loss, "worse": self.worse}
        return {"args": {"patience": self.patience}, "attributes": attributes}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Trainer's hook. The evaluation before the first step does not count."""
        if not state.global_step:
            return
        if metrics["eval_criterion"] < self.best_loss:
            self.best_step, self.best_loss, self.worse = state.global_step, metrics["eval_criterion"], 0
        else:
            self.worse += 1
            if 0 < self.patience <= self.worse:
                control.should_training_stop = True


class Recorder(TrainerCallback):
    """Writes every step and evaluation to a JSONL log, and hands them to a view.

    Args:
        path: the log; lines of steps beyond `start` (which a killed run left) are dropped.
        schedule: for the epoch of each step.
        view: called with each record.
        start: optimizer steps done before.
    """

    def __init__(self, path: Path, schedule: Schedule | StreamSchedule, view, start: int = 0):
        self.path, self.schedule, self.view = path, schedule, view
        if not is_main_process():
            return
        before = [record for record in read_log(path) if record["step"] <= start] if start else []
        path.write_text("".join(json.dumps(record) + "\n" for record in before), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Trainer's hook: one record a step or evaluation."""
        if "eval_loss" in logs:
            record = {"step": state.global_step, **{name: logs[name] for name in ("eval_loss", "eval_perplexity")}}
        elif "loss" in logs:
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                raise diverged("gradient", state.global_step - 1, Path(args.output_dir))
            record = {
                "step": state.global_step,
                "epoch": self.schedule.epoch(state.global_step),
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs["learning_rate"],
                "tokens": logs["tokens"],
            }
        else:
            return
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.view(record)


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
