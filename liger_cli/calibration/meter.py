"""Measuring what is kept on the base: one reading of the data for all sets, no reload, no file written."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from liger_cli.calibration import extent
from liger_cli.calibration.choice import Figures, Kept, Size
from liger_cli.checkpoint.extras import extra_shapes, initial_values
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import liger_layers
from liger_cli.evaluation.finite import first_non_finite
from liger_cli.evaluation.recall import Probe, make_probes
from liger_cli.evaluation.scoring import LOGITS_BYTES, batch_size_for, make_rows, read_texts
from liger_cli.evaluation.subject import load_tokenizer, pick_device, pick_dtype
from liger_cli.shipped.probes import held_out_text
from liger_cli.shipped.text import VALIDATION_SEED
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, ModelError
from liger_cli.system.memory import available
from liger_cli.system.progress import progress

SEED = VALIDATION_SEED + 2**20  # held out, and no seed of `liger eval`
TEXT_KINDS = ("story", "facts", "recall")
HARD = 0.5  # nats of KL divergence between base and window
WARM_TOKENS = 16
ANSWER_TOKENS = 4  # of a probe, about
MEMORY_SHARE = 0.8  # of the free memory that float32 weights may take on a CPU
STAND_INS = ("window", "liger")
WINDOW_ALONE, CONFIGURED = "window attention alone", "Liger attention as configured"


@dataclass
class Batch:
    """Rows read in one pass.

    Attributes:
        ids: [B, T] int64, padded on the right.
        kept: positions whose next token is judged, [P]; None for all.
        judged: [B, P] bool: which of them count in which row.
        targets: [B, P] int64, the tokens that come next.
        answers: whether the judged tokens are answers of recall probes, one answer a row.
        hard: [B, P] bool, where base and window differ; filled in by the first reading.
    """

    ids: torch.Tensor
    kept: torch.Tensor | None
    judged: torch.Tensor
    targets: torch.Tensor
    answers: bool
    hard: torch.Tensor | None = None


@dataclass
class Meter:
    """Runs the base with any set of layers and heads kept as softmax, the other candidates as `stand_in`.

    Attributes:
        candidates: layers that can be linearized.
        stand_in: attention mode of the linearized layers while measuring: `liger` or, before training often nearer to
            the base, `window`; whichever is nearer is taken.
        configured: what the mode `liger` is, in words.
    """

    model: torch.nn.Module
    plan: Plan
    candidates: list[int]
    batches: list[Batch]
    text: str
    stand_in: str = "window"
    configured: str = CONFIGURED
    recall_note: str = ""
    passes: int = 0
    seconds: float = 0.0
    base: Figures | None = field(default=None, repr=False)
    none: Figures | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens that one pass reads, padding included."""
        return sum(batch.ids.numel() for batch in self.batches)

    def announce(self, passes: int, stand_in: str | None = None) -> None:
        """Tell how long `passes` passes will take, and read the data for the first time.

        Finds the hard tokens and the stand-in, if none is given, and drops the probes where the base cannot do them.
        """
        expected = self._seconds_a_pass() * passes
        say(f"measuring: at most {passes} passes over {self.tokens:,} tokens, about {_duration(expected)}")
        start = time.perf_counter()
        first = self._figures([(frozenset(), mode) for mode in STAND_INS], find_hard=True)
        if self.base.recall is None:
            self.recall_note = "no recall probe fits this base and window: the choice rests on the KL divergence alone"
        elif self.base.recall < extent.RECALL_NEEDED:
            self.recall_note = (
                f"the base answers {100 * self.base.recall:.0f} % of the recall probes, too few to measure by: the "
                "choice rests on the KL divergence alone"
            )
            self.batches = [batch for batch in self.batches if not batch.answers]
            first = self._figures([(frozenset(), mode) for mode in STAND_INS])
        by_mode = dict(zip(STAND_INS, first, strict=True))
        # The window wins a tie: an untrained recurrent branch that adds nothing measurable adds noise.
        self.stand_in = stand_in or min(by_mode, key=lambda mode: by_mode[mode].kl)
        self.none = by_mode[self.stand_in]
        self.seconds = time.perf_counter() - start

    @torch.inference_mode()
    def _seconds_a_pass(self) -> float:
        """From the first batch alone: a pass over a large model takes long."""
        first = self.batches[0]
        for ids in (first.ids[:1, :WARM_TOKENS], first.ids):  # the first pass of a process is no measure
            start = time.perf_counter()
            self.model(input_ids=ids.to(self.model.device), use_cache=False)
        return (time.perf_counter() - start) / first.ids.numel() * self.tokens

    def measure(self, sets: Sequence[Kept]) -> list[Figures]:
        """Figures of every set that is kept."""
        start = time.perf_counter()
        found = self._figures([(kept, self.stand_in) for kept in sets])
        self.seconds += time.perf_counter() - start
        return found

    def describe(self) -> dict:
        """How it was measured."""
        hard = sum(int(batch.hard.sum()) for batch in self.batches)
        judged = sum(int(batch.judged.sum()) for batch in self.batches)
        return {
            "stand_in": WINDOW_ALONE if self.stand_in == "window" else self.configured,
            "text": self.text,
            "recall_note": self.recall_note,
            "hard_tokens": hard,
            "judged_tokens": judged,
        }

    def cost(self) -> dict:
        return {"passes": self.passes, "tokens": self.tokens, "seconds": self.seconds}

    def apply(self, kept: Kept, stand_in: str) -> None:
        """Keep these layers and heads as softmax, run the rest of the candidates as `stand_in`, in these sizes."""
        self.model.set_attention_mode("softmax")
        attentions = self.model.get_decoder().liger_attentions()
        sizes = {unit.layer: {unit.setting: unit.tokens} for unit in kept if isinstance(unit, Size)}
        for layer in self.candidates:
            spec = replace(self.plan.specs[layer], **sizes.get(layer, {}))
            heads = {unit[1] for unit in kept if isinstance(unit, tuple) and unit[0] == layer}
            heads |= set(spec.softmax_kv_heads)
            if layer in kept or len(heads) == self.plan.checkpoint.geometry.num_key_value_heads:
                continue
            attentions[layer].liger_spec = replace(spec, softmax_kv_heads=tuple(sorted(heads)))
            self.model.set_attention_mode(stand_in, [layer])

    def _figures(self, settings: list[tuple[Kept, str]], find_hard: bool = False) -> list[Figures]:
        everything = frozenset(self.candidates)
        tallies = [Tally() for _ in settings]
        base_tally = Tally()
        with progress("measuring", len(self.batches) * (1 + len(settings))) as step, torch.inference_mode():
            for batch in self.batches:
                self.apply(everything, "softmax")
                base = self._logits(batch).float().log_softmax(-1)
                step()
                divergences, guesses = [], []
                for kept, stand_in in settings:
                    self.apply(kept, stand_in)
                    logits = self._logits(batch)
                    divergences.append(divergence(base, logits).cpu())
                    guesses.append(logits.argmax(-1).cpu())
                    step()
                if find_hard:
                    batch.hard = (divergences[0] > HARD) & batch.judged
                base_tally.add(batch, torch.zeros_like(divergences[0]), base.argmax(-1).cpu())
                for tally, kl, guess in zip(tallies, divergences, guesses, strict=True):
                    tally.add(batch, kl, guess)
        self.passes += 1 + len(settings)
        self.base = base_tally.figures()
        found = [tally.figures() for tally in tallies]
        if not all(math.isfinite(figures.kl + figures.kl_hard) for figures in found):
            raise not_finite(self.model, self.batches[0].ids, "the measurement")
        return found

    def _logits(self, batch: Batch):
        """[B, P, V]"""
        extra = {} if batch.kept is None else {"logits_to_keep": batch.kept.to(self.model.device)}
        return self.model(input_ids=batch.ids.to(self.model.device), use_cache=False, **extra).logits


@dataclass
class Tally:
    """Sums that figures are made of."""

    kl: float = 0.0
    tokens: int = 0
    kl_hard: float = 0.0
    hard: int = 0
    right: int = 0
    probes: int = 0

    def add(self, batch: Batch, kl, guesses) -> None:
        """kl, guesses: [B, P]."""
        self.kl_hard += float(kl[batch.hard].sum(dtype=torch.float64))
        self.hard += int(batch.hard.sum())
        if batch.answers:
            self.right += int(((guesses == batch.targets) | ~batch.judged).all(1).sum())
            self.probes += len(guesses)
        else:
            self.kl += float(kl[batch.judged].sum(dtype=torch.float64))
            self.tokens += int(batch.judged.sum())

    def figures(self) -> Figures:
        return Figures(
            kl=self.kl / self.tokens,
            kl_hard=self.kl_hard / max(self.hard, 1),
            recall=self.right / self.probes if self.probes else None,
        )


def divergence(base_log_probs, logits):
    """KL(base || model) at every position. [B, P, V] twice -> [B, P], row by row to save memory."""
    found = []
    for reference, row in zip(base_log_probs, logits, strict=True):
        found.append((reference.exp() * (reference - row.float().log_softmax(-1))).sum(-1))
    return torch.stack(found)


@torch.no_grad()
def distances(model, rows, *modes: str) -> list[float]:
    """KL(base || model) in nats a token for each attention mode; the base is read once."""
    totals = [0.0] * len(modes)
    for row in rows.split(1):
        model.set_attention_mode("softmax")
        base = model(row, use_cache=False).logits.float().log_softmax(-1)
        for index, mode in enumerate(modes):
            model.set_attention_mode(mode)
            totals[index] += float(divergence(base, model(row, use_cache=False).logits).sum())
    model.set_attention_mode("liger")
    return [total / rows.numel() for total in totals]


def not_finite(model, ids, what: str) -> LigerError:
    """The sentence for figures that are none: where the base, or else the linearized model, leaves the finite numbers.

    Args:
        ids: [B, T], of which the first row is run again. what: was measured.
    """
    ids = ids[:1].to(model.device)
    advice = {"softmax": "the base's own; check its weights", "liger": "the linearized model's; choose another --gate"}
    for mode, whose in advice.items():
        model.set_attention_mode(mode)
        if where := first_non_finite(model, lambda: model(input_ids=ids, use_cache=False)):
            return LigerError(f"{what} gave numbers that are not finite, first in {where}: {whose}")
    return LigerError(f"{what} gave numbers that are not finite; use another text")


def open_meter(plan: Plan, data: str | None) -> Meter:
    """Load the base as the Liger model of `plan`, and the text and probes to measure it on.

    Raises:
        ModelError: the base or its tokenizer cannot be loaded. LigerError: the text cannot be used.
    """
    model = load_base(plan)
    tokenizer = load_tokenizer(plan.checkpoint.folder, model.config)
    candidates = liger_layers(plan)
    batches = text_batches(tokenizer, data, model.config) + probe_batches(tokenizer, plan, model.config.vocab_size)
    return Meter(model, plan, candidates, batches, text=data or "the shipped text")


def load_base(plan: Plan):
    """The model that the folder of `plan` would hold, from the base's own folder. float32 on a CPU where it fits.

    Raises:
        ModelError: the base cannot be loaded.
    """
    from transformers.utils import logging

    from liger_cli.checkpoint.model_code import model_classes
    from liger_cli.conversion.folder import converted_config

    device = pick_device("auto")
    dtype = pick_dtype(device, "auto")
    free = available(device)
    if device == "cpu" and free is not None and 4 * plan.parameters() > MEMORY_SHARE * free:
        dtype = "auto"
    config_class, model_class = model_classes(plan.checkpoint.family)
    config = {name: value for name, value in converted_config(plan).items() if name != "auto_map"}
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # tensors that the conversion adds are not missing from the base
    try:
        model = model_class.from_pretrained(
            plan.checkpoint.folder, config=config_class.from_dict(config), dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the base {plan.checkpoint.folder} cannot be loaded to measure its layers: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
    set_extras(model, initial_values(extra_shapes(plan.specs, plan.checkpoint.geometry)))
    return model.to(device).eval()


def set_extras(model, values: dict) -> None:
    """Copy extra tensors, NumPy arrays by name, into a model."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))


def text_batches(tokenizer, data: str | None, config) -> list[Batch]:
    """Up to `ROWS` rows of text; every next token is judged."""
    if data is None:
        texts = held_out_text(6 * extent.ROWS * extent.ROW_TOKENS, SEED, TEXT_KINDS)
    else:
        texts = read_texts(Path(data))
    length = min(extent.ROW_TOKENS, getattr(config, "max_position_embeddings", None) or extent.ROW_TOKENS)
    rows = make_rows(tokenizer, texts, length)
    size = batch_size_for(rows, config.vocab_size, None)
    ids, lengths = rows.ids[: extent.ROWS], rows.lengths[: extent.ROWS]
    judged = torch.arange(length) < lengths[:, None]
    return [
        Batch(part[:, :-1], None, there, part[:, 1:], answers=False)
        for part, there in zip(ids.split(size), judged.split(size), strict=True)
    ]


def probe_batches(tokenizer, plan: Plan, vocab_size: int) -> list[Batch]:
    """Recall probes beyond the window, batches of one distance each; the answers' tokens are judged."""
    batches = []
    # Every probe has its answer elsewhere, so B probes take the logits of some B * ANSWER_TOKENS positions, B times.
    size = max(1, math.isqrt(LOGITS_BYTES // (4 * ANSWER_TOKENS * vocab_size)))
    for distance in extent.probe_distances(plan):
        try:
            probes = make_probes("key_value", tokenizer, distance, extent.PROBES, SEED)
        except ValueError:  # this tokenizer needs more tokens for a question than the distance has
            continue
        batches += [_probe_batch(probes[first : first + size]) for first in range(0, len(probes), size)]
    return batches


def _probe_batch(probes: list[Probe]) -> Batch:
    width = max(len(probe.tokens) for probe in probes)
    ids = torch.zeros(len(probes), width, dtype=torch.int64)
    judged = torch.zeros_like(ids, dtype=torch.bool)
    for row, probe in enumerate(probes):
        ids[row, : len(probe.tokens)] = torch.tensor(probe.tokens)
        for first, last in probe.spans:
            judged[row, first - 1 : last - 1] = True
    kept = judged.any(0).nonzero()[:, 0]
    return Batch(ids, kept, judged[:, kept], ids.roll(-1, 1)[:, kept], answers=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
