"""What a training run shows: the plan, a live line or plain lines on stderr, and the loss curve as a picture."""

import sys
import time
from pathlib import Path

from liger_cli.system.console import say
from liger_cli.system.escape import printable
from liger_cli.system.wording import counted, size
from liger_cli.training.reach import LITTLE

SMOOTHING = 0.9
LINES = 20  # progress lines of a run that is not on a terminal
ETA_AFTER = 20  # steps
NOTHING = 0.005  # of a perplexity: a smaller change is none


def print_plan(plan: dict) -> None:
    """The plan before anything is loaded, on stderr."""
    for source in plan["sources"]:
        if source["examples"] is None:
            notes = [
                f"streamed, the first {source['held_out']} examples held out" if source["held_out"] else "streamed"
            ]
        else:
            notes = [f"{source['examples']:,} examples, {source['tokens']:,} tokens, {source['held_out']} held out"]
        if share := source.get("share_of_rows"):
            notes.append(f"{share:.0%} of the rows")
        if source["weight"] is not None:
            notes.append(f"weight {source['weight']:g}")
        if source["cut"]:
            notes.append(f"{source['cut']:,} cut at {plan['seq_len']} tokens")
        if source["without_targets"]:
            notes.append(f"{source['without_targets']:,} left out, with no response within {plan['seq_len']} tokens")
        if skipped := source["skipped"]:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items())
            notes.append(f"{sum(skipped.values()):,} rows left out ({reasons})")
        if source["unused"]:
            notes.append(f"not used: {', '.join(source['unused'])}")
        say(f"data {source['source']}: {source['layout']} layout, {'; '.join(notes)}")
    share = plan["trainable_parameters"] / plan["parameters"]
    if plan["tokens"] is None:
        epochs = "" if plan["epochs"] is None else f"{plan['epochs']:g} epochs, "
        length = f"{epochs}up to {plan['steps'] * plan['batch_size'] * plan['seq_len']:,} tokens"
    else:
        length = f"{plan['epochs']:g} epochs, {plan['tokens']:,} tokens"
    say(
        f"recipe {plan['recipe']} ({' then '.join(plan['objectives'])}): {counted(plan['steps'], 'step')} of "
        f"{plan['batch_size']} x {plan['seq_len']} tokens, {length}"
    )
    if (beyond := plan["beyond_exact_memory"]) is not None:
        say(f"{beyond:.1%} of the trained tokens have text before them that the window and the kept tokens lack")
        if beyond < LITTLE:
            say(
                "warning: that teaches next to nothing about distance; train on longer documents, or on some beside "
                "these (--long-data FILE)"
            )
    extra = plan["trainable_extra_parameters"]
    beside = f", {extra:,} of them liger's own" if extra else ""
    say(
        f"trainable {plan['trainable_parameters']:,} of {plan['parameters']:,} parameters ({share:.3%}{beside}); about "
        f"{size(plan['memory_estimate_bytes'])} of memory (estimate) on the {plan['device']} in {plan['dtype']}"
        + (" over 4-bit weights" if plan["load_in_4bit"] else "")
    )


def outcome(report: dict) -> list[str]:
    """What a run has done to the held-out perplexity, beside the base's, and a sentence where that is nothing."""
    base, before, after = (
        report[name] for name in ("held_out_perplexity_base", "held_out_perplexity_before", "held_out_perplexity")
    )
    if after is None or before is None:
        return []
    beside = f", {base:.3f} the base" if base else ""
    found = [f"held-out perplexity: {before:.3f} before, {after:.3f} after{beside}"]
    if base and before - base < NOTHING * base:
        found.append(
            "the base was hardly better on this data before the training, so there was nothing to win back; examples "
            "this short may lie within window and kept tokens (liger eval reads a long text)"
        )
    elif abs(before - after) < NOTHING * before:
        found.append("the training changed next to nothing; try more steps, a higher --lr or other data")
    elif after > before:
        found.append("the training made it worse; try a lower --lr")
    return found


class TrainView:
    """Progress on stderr: one live line on a terminal, else some plain lines.

    Args:
        schedule: the run's micro-batches.
        start: steps done before this run.
        quiet: show nothing.
    """

    def __init__(self, schedule, start: int = 0, quiet: bool = False):
        self.steps, self.start, self.quiet = schedule.steps, start, quiet
        self.every = max(1, self.steps // LINES)
        self.smoothed, self.tokens, self.perplexity, self.progress = None, 0, None, None
        self.seconds = 0.0  # of training, evaluations left out

    def __enter__(self):
        self.last = time.perf_counter()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=Console(stderr=True))
            self.task = self.progress.add_task("starting", total=self.steps, completed=self.start)
            self.progress.start()
        return self

    def __exit__(self, *_):
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, record: dict) -> None:
        """Take one record of the log."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        if "loss" in record:
            self.seconds += passed
            before = record["loss"] if self.smoothed is None else self.smoothed
            self.smoothed = SMOOTHING * before + (1 - SMOOTHING) * record["loss"]
            self.tokens += record["tokens"]
        else:
            self.perplexity = record["eval_perplexity"]
        if self.quiet:
            return
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"], description=self._short(record))
        elif "loss" not in record or record["step"] % self.every == 0 or record["step"] == self.steps:
            print(f"step {record['step']}/{self.steps} {self._line(record)}", file=sys.stderr, flush=True)

    def _short(self, record: dict) -> str:
        """For the live line, which has to fit beside the bar."""
        parts = []
        if self.smoothed is not None:
            last = f"{record['loss']:.3f} " if "loss" in record else ""
            parts += [f"loss {last}(smoothed {self.smoothed:.3f})", f"{self.tokens / self.seconds:,.0f} tok/s"]
        if self.perplexity is not None:
            parts.append(f"ppl {self.perplexity:.3f}")
        return "  ".join([*parts, *self._left(record)])

    def _line(self, record: dict) -> str:
        if "loss" not in record:
            return f"held-out perplexity {record['eval_perplexity']:.3f}"
        parts = [f"loss {record['loss']:.4f} (smoothed {self.smoothed:.4f})", f"lr {record['lr']:.2g}"]
        parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        return ", ".join([*parts, *self._left(record)])

    def _left(self, record: dict) -> list[str]:
        """The time left, once enough steps have told how long one takes."""
        done = record["step"] - self.start
        if done < min(ETA_AFTER, self.steps - self.start) or not done:
            return []
        return [f"{_clock(self.seconds / done * (self.steps - record['step']))} left"]


def write_plot(records: list[dict], path: Path, recipe) -> None:
    """The training loss and the held-out loss by step, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in records if "loss" in record]
    losses = [record["loss"] for record in records if "loss" in record]
    objectives = " then ".join(stage.objective for stage in recipe.stages)
    axes.plot(steps, losses, linewidth=0.8, label=f"training ({objectives})")
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held-out cross-entropy")
    axes.set(xlabel="optimizer step", ylabel="loss per token", title="")
    axes.set_title(printable(f"recipe {recipe.name}")[:100], parse_math=False)
    axes.legend()
    figure.savefig(path, dpi=120)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
