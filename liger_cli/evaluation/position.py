"""What a model still makes of what stands far back: perplexity and KL by position, a needle, a second reading.

All three read several *columns* of the same weights or of several models: a mapping from a name to a function that
opens a context in which the model to run is at hand. Text comes as token ids, so that the caller tokenizes it once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random

import torch

from liger_cli.checkpoint.tokenizer import put_before, token_ids
from liger_cli.evaluation.finite import first_non_finite
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError

Columns = Mapping[str, Callable[[], AbstractContextManager]]

EDGES = (64, 256, 1024, 2048)  # tokens at which buckets of positions end; beyond, they double
PIECE_BYTES = 32 << 20  # of float32 logits at a time, for each column
PASS_TOKENS = 4096  # of needle rows in one pass
NEEDLE_DISTANCES = (128, 512, 1900)
BEFORE = (64, 256)  # tokens of text before a needle: beyond any number of sinks, and not always the same
PLACES = (
    "Bergen",
    "Cairo",
    "Delhi",
    "Dublin",
    "Havana",
    "Kyoto",
    "Lagos",
    "Lima",
    "Lisbon",
    "Oslo",
    "Porto",
    "Riga",
    "Vienna",
)
PASSAGE, GAP, RECOGNISED = 200, 300, 20


def modes(model, **names: str) -> Columns:
    """Columns of one Liger model run in several attention modes, by their names; `liger` afterwards.

    Args:
        names: column=mode; by default base="softmax", model="liger", window_only="window".
    """

    @contextmanager
    def opened(mode: str) -> Iterator:
        model.set_attention_mode(mode)
        try:
            yield model
        finally:
            model.set_attention_mode("liger")

    names = names or {"base": "softmax", "model": "liger", "window_only": "window"}
    return {name: partial(opened, mode) for name, mode in names.items()}


def buckets(length: int) -> list[tuple[int, int]]:
    """(first, last + 1) positions of each bucket of a row of `length` predictions: 0-64, 64-256, 256-1,024, ..."""
    edges = [0, *EDGES]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(first, min(last, length)) for first, last in zip(edges, edges[1:], strict=False) if first < length]


@dataclass
class Positions:
    """Sums over rows at every position of a row, [T] float64 each.

    Attributes:
        loss: negative log-likelihood of the next token, nats. kl: KL(base || model), nats. top1: most likely tokens
            that are the base's. counts: predictions.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    top1: torch.Tensor
    counts: torch.Tensor

    def mean(self, name: str, first: int = 0, last: int | None = None) -> float:
        """Of `loss`, `kl` or `top1`, over the predictions from position `first` up to, not including, `last`."""
        return float(getattr(self, name)[first:last].sum() / self.counts[first:last].sum())

    def by_bucket(self, name: str) -> dict[str, float]:
        """The same for each bucket that holds predictions, by the tokens it covers: `{"1-64": ..., "65-256": ...}`."""
        found = [(first, last) for first, last in buckets(len(self.counts)) if self.counts[first:last].sum()]
        return {f"{first + 1}-{last}": self.mean(name, first, last) for first, last in found}


class Reading:
    """Token ids that a model has read: logits of any positions, without the logits of all.

    The decoder runs once; the family's own code makes logits of what it gave, a piece at a time.

    Args:
        model: a causal language model of transformers, Liger's or not, bare or wrapped by PEFT.
        ids: [B, T] int64.
    """

    def __init__(self, model, ids: torch.Tensor):
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.ids = ids.to(self.model.device)
        self.decoder, found = self.model.get_decoder(), []
        hook = self.decoder.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            self._run(self.ids[:, -1:].new_tensor([ids.shape[1] - 1]))
        finally:
            hook.remove()
        (self.output,) = found

    def logits(self, positions: torch.Tensor) -> torch.Tensor:
        """[B, P, V], of `positions` [P]."""
        own = self.decoder.__dict__.get("forward")
        self.decoder.forward = lambda *args, **kwargs: self.output
        try:
            return self._run(positions.to(self.ids.device))
        finally:
            del self.decoder.forward
            if own is not None:  # a wrapper of accelerate's
                self.decoder.forward = own

    def _run(self, positions):
        return self.model(input_ids=self.ids, use_cache=False, logits_to_keep=positions).logits


@torch.inference_mode()
def score_positions(
    columns: Columns,
    ids: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    batch_size: int = 1,
    step: Callable[[], None] | None = None,
    whose: str = "",
) -> dict[str, Positions]:
    """Read rows in every column and compare each with the first, at every position.

    Args:
        columns: the first is the base.
        ids: [N, T + 1] int64, rows of T predictions; padded on the right.
        lengths: predictions that count in each row, [N]; all by default.
        batch_size: rows a pass.
        step: called after each batch of each column.
        whose: words for an error, such as " of FOLDER".
    Returns:
        For each column its sums.
    Raises:
        LigerError: a loss that is not finite; the sentence names the first layer where that shows.
    """
    length = ids.shape[1] - 1
    lengths = torch.full((len(ids),), length) if lengths is None else lengths
    counts = torch.zeros(length, dtype=torch.float64)
    sums = {name: torch.zeros(3, length, dtype=torch.float64) for name in columns}
    for rows, held in zip(ids.split(batch_size), lengths.split(batch_size), strict=True):
        counted = torch.arange(length)[None] < held[:, None]  # [B, T]
        counts += counted.sum(0)
        readings = {}
        for name, opened in columns.items():
            with opened() as model:
                readings[name] = Reading(model, rows[:, :-1])
            if step is not None:
                step()
        for places in torch.arange(length).split(_piece(readings, len(rows))):
            base = None
            for name, reading in readings.items():
                log_p = reading.logits(places).float().log_softmax(-1)  # [B, P, V]
                base = log_p if base is None else base
                targets = rows[:, places + 1].to(log_p.device)
                kl = log_p.new_zeros(log_p.shape[:2])
                if log_p is not base:  # rounding takes a divergence of 0 below it
                    kl = (base.exp() * (base - log_p)).sum(-1).clamp_min(0)
                same = (log_p.argmax(-1) == base.argmax(-1)).float()
                figures = torch.stack((-log_p.gather(-1, targets[..., None])[..., 0], kl, same))
                figures = torch.where(counted[:, places], figures.double().cpu(), 0)
                sums[name][:, places] += figures.sum(1)
        for name, opened in columns.items():
            if not sums[name].isfinite().all():
                with opened() as model:
                    raise _not_finite(name, model, rows[:, :-1], whose)
    return {name: Positions(*total, counts) for name, total in sums.items()}


def _piece(readings: dict[str, Reading], rows: int) -> int:
    """Positions whose logits are made at once."""
    vocabulary = max(reading.model.get_output_embeddings().weight.shape[0] for reading in readings.values())
    return max(1, PIECE_BYTES // (4 * rows * vocabulary))


def _not_finite(name: str, model, ids, whose: str) -> LigerError:
    model = Reading(model, ids).model
    where = first_non_finite(model, lambda: model(input_ids=ids.to(model.device), use_cache=False))
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "; try --dtype float32" if dtype != "float32" else ""
    return LigerError(
        f"the {name} column{whose} has a loss that is not finite in {dtype}{f', first in {where}' if where else ''}"
        f"{advice}"
    )


@dataclass(frozen=True)
class Needle:
    """A row that states a code once and asks for it later; its last tokens are the answer. answer: how many."""

    tokens: list[int]
    answer: int


def make_needles(tokenizer, text: Sequence[int], distance: int, count: int, seed: int) -> list[Needle]:
    """Rows of the text in which a five-digit code is stated once.

    Args:
        text: token ids; every row begins at another place in it, drawn at random.
        distance: tokens between the end of the stated code and the start of the answer, hit exactly.
        seed: also draws how much text stands before the needle, from `BEFORE`.
    Raises:
        ValueError: the distance is too short for the question, the text too short for a row, or the tokenizer knows no
            digits.
    """
    rng = Random(f"{seed}/{distance}")
    start, ids = put_before(tokenizer), partial(token_ids, tokenizer)
    rows = []
    for _ in range(count):
        place, code = rng.choice(PLACES), str(rng.randint(10_000, 99_999))
        tail = ids(".\n")
        asked = ids(f"\nQuestion: What is the code of the {place} office? Answer: The code of the {place} office is")
        answer = ids(f" {code}")
        before, between = rng.randint(*BEFORE), distance - len(tail) - len(asked)
        if tokenizer.decode(answer).strip() != code:
            raise ValueError(f"the tokenizer does not spell {code}")
        if between < 0 or len(text) < before + between:
            raise ValueError(f"no needle {distance} tokens back fits")
        at = rng.randint(0, len(text) - before - between)
        piece = list(text[at : at + before + between])
        stated = ids(f"\nRemember this: The code of the {place} office is") + answer + tail
        rows.append(Needle(start + piece[:before] + stated + piece[before:] + asked + answer, len(answer)))
    return rows


def needle(
    columns: Columns,
    tokenizer,
    text: Sequence[int],
    *,
    distances: Sequence[int] = NEEDLE_DISTANCES,
    count: int = 10,
    seed: int = 0,
    step: Callable[[], None] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Share of needles that each column finds again; teacher-forced, which is the same as greedy decoding for `exact`.

    Args:
        text: token ids of the haystack, see `make_needles`.
        step: called after each distance of each column.
    Returns:
        `{column: {distance: {"exact": share, "digits": share}}}`: `exact` of the codes with every token right,
        `digits` of their tokens that hold digits. A distance that does not fit into the text is left out,
        which is said on stderr, and all are where the tokenizer knows no digits.
    """
    found: dict[str, dict] = {name: {} for name in columns}
    for distance in distances:
        try:
            rows = make_needles(tokenizer, text, distance, count, seed)
        except ValueError as error:
            say(f"left out: needles {distance} tokens back, since {error}")
            continue
        size = max(1, PASS_TOKENS // max(len(row.tokens) for row in rows))
        for name, opened in columns.items():
            with opened() as model:
                right = [hits for first in range(0, count, size) for hits in _hits(model, rows[first : first + size])]
            digits = [
                hit
                for row, hits in zip(rows, right, strict=True)
                for token, hit in zip(row.tokens[-row.answer :], hits, strict=True)
                if any(map(str.isdigit, tokenizer.decode([token])))
            ]
            exact = sum(map(all, right)) / count
            found[name][str(distance)] = {"exact": exact, "digits": sum(digits) / len(digits)}
            if step is not None:
                step()
    return found


@torch.inference_mode()
def _hits(model, rows: list[Needle]) -> list[list[bool]]:
    """For each row which of its answer's tokens is the most likely one."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
    reading, hits = Reading(model, ids), []
    for index, row in enumerate(rows):
        last = len(row.tokens)
        places = torch.arange(last - row.answer - 1, last - 1)
        guesses = reading.logits(places)[index].argmax(-1).tolist()
        hits.append([guess == token for guess, token in zip(guesses, row.tokens[-row.answer :], strict=True)])
    return hits


@torch.inference_mode()
def second_reading(
    columns: Columns, text: Sequence[int], *, gap: int = GAP, count: int = 4, seed: int = 0
) -> dict[str, float]:
    """Nats a token on the second reading of a passage of `PASSAGE` tokens, `gap` other tokens after its first.

    Its first `RECOGNISED` tokens do not count: only they can tell what is being read again.

    Args:
        text: token ids; passages and what is between are drawn from it.
    Raises:
        ValueError: the text is shorter than one row.
    """
    rng, before = Random(seed), BEFORE[0]
    whole = before + PASSAGE + gap
    if len(text) < whole:
        raise ValueError(f"the text has {len(text)} tokens and a second reading takes {whole}")
    rows = []
    for _ in range(count):
        at = rng.randint(0, len(text) - whole)
        row = list(text[at : at + whole])
        rows.append(row + row[before : before + PASSAGE])
    ids = torch.tensor(rows)
    places = torch.arange(whole + RECOGNISED - 1, ids.shape[1] - 1)
    found = {}
    for name, opened in columns.items():
        losses = []
        with opened() as model:
            for row in ids.split(1):
                log_p = Reading(model, row).logits(places)[0].float().log_softmax(-1)
                losses.append(float(-log_p.gather(-1, row[0, places + 1, None].to(log_p.device)).mean()))
        found[name] = sum(losses) / count
    return found
