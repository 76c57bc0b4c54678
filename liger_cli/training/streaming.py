"""Training data that are read and tokenized as the run goes on, in constant memory, in an order that a seed decides."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from liger_cli.system.errors import UsageError
from liger_cli.system.wording import size
from liger_cli.training.data import Example, Opened, Source, not_used, nothing_to_learn, open_source, parse_sources
from liger_cli.training.packing import Row, pack_rows

STREAM_ABOVE = 2 << 30  # bytes of local files; above, their tokens would take several times that in memory
SAMPLE = 200  # examples that stand for a source
WINDOW = 4096  # examples in memory at a time, shuffled and packed together


@dataclass(frozen=True)
class Stream:
    """Sources to be read again and again, without end.

    Attributes:
        sources: with weights, which are shares of the examples.
        skipped: for each source how many of its first examples are left out of training.
        held_out: those examples.
        report: one dict a source, as in `data.Data`; what only a whole pass could count is None.
    """

    sources: list[Source]
    tokenizer: object
    seq_len: int
    skipped: list[int]
    held_out: list[Example]
    report: list[dict]

    def examples(self, seed: int) -> Iterator[Example]:
        """Training examples without end. Raises LigerError: a source has none."""
        parts = [self._again(*pair) for pair in zip(self.sources, self.skipped, strict=True)]
        if len(parts) == 1:
            yield from parts[0]
        rng, weights = Random(seed), [source.weight for source in self.sources]
        while True:
            yield next(rng.choices(parts, weights)[0])

    def _again(self, source: Source, skipped: int) -> Iterator[Example]:
        while True:
            found = False
            for example in islice(_examples(source.name, self.tokenizer, self.seq_len), skipped, None):
                found = True
                yield example
            if not found:
                raise nothing_to_learn(f"{source.name} (beyond the {skipped} held out)", self.seq_len)


def _examples(name: str, tokenizer, seq_len: int) -> Iterator[Example]:
    return _with_targets(open_source(name, tokenizer, seq_len, streaming=True))


def _with_targets(opened: Opened) -> Iterator[Example]:
    return (example for example, _ in opened.examples if example.targets)


def wants_streaming(spec: str, streaming: bool | None, max_steps: int | None) -> bool:
    """Whether a run streams its data: as told, else where the local files are large.

    Raises:
        UsageError: it would, but how long it should last is not said.
    """
    nbytes = sum(path.stat().st_size for path in _files(spec))
    wanted = nbytes > STREAM_ABOVE if streaming is None else streaming
    if wanted and max_steps is None:
        why = "--streaming" if streaming else f"{spec} ({size(nbytes)}, which is streamed)"
        raise UsageError(
            f"{why} does not tell how many examples there are; give --max-steps"
            + ("" if streaming else ", or load it whole with --no-streaming")
        )
    return wanted


def open_stream(spec: str, tokenizer, seq_len: int, held_out: int) -> Stream:
    """Detect the layouts and take the first examples of each source, by its weight, for evaluation.

    Raises:
        UsageError: several sources without weights whose sizes are not known; and as `data.load_data`.
    """
    sources = parse_sources(spec)
    given = [source.weight for source in sources]
    if len(sources) > 1 and sources[0].weight is None:
        if len(_files(spec)) < len(sources):
            raise UsageError("--data streams several sources, so each needs a weight: a.jsonl:0.7,user/set:0.3")
        sources = [Source(source.name, Path(source.name).expanduser().stat().st_size) for source in sources]
    total = sum(source.weight or 1 for source in sources)
    counts = [round(held_out * (source.weight or 1) / total) for source in sources]
    first_ones, report = [], []
    for source, count, weight in zip(sources, counts, given, strict=True):
        opened = open_source(source.name, tokenizer, seq_len, streaming=True)
        first = list(islice(_with_targets(opened), count + 1))
        if len(first) <= count:
            raise UsageError(
                f"{source.name} has {len(first)} examples, and {count} are to be held out; lower --held-out, or "
                "load it whole with --no-streaming"
            )
        first_ones += first[:count]
        files = [path.stat().st_size for path in _files(source.name)]
        report.append(
            {"source": source.name, "layout": opened.layout, "examples": None, "tokens": None, "cut": None,
             "without_targets": None, "held_out": count, "weight": weight, "bytes": sum(files) or None,
             **not_used(opened.tally)}
        )  # fmt: skip
    return Stream(sources, tokenizer, seq_len, counts, first_ones, report)


def _files(spec: str) -> list[Path]:
    paths = [Path(source.name).expanduser() for source in parse_sources(spec)]
    return [path for path in paths if path.is_file()]


class StreamSchedule:
    """The micro-batches of a whole run, made when they are asked for: what `packing.Schedule` is for data in memory.

    They are asked for in order. A resumed run reads the stream again up to where it was; processes of one run each
    read all of it and take their share.

    Args:
        stream: the data.
        seq_len, batch_size, micro_batch_size, packing, seed, max_steps: of the recipe.
    """

    per_epoch = None

    def __init__(self, stream, seq_len, batch_size, micro_batch_size, packing, seed, max_steps):
        self.stream, self.seq_len, self.packing, self.seed = stream, seq_len, packing, seed
        self.rows_at_once = micro_batch_size
        self.per_step, self.steps = batch_size // micro_batch_size, max_steps
        self._next, self._made = 0, None

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, index: int) -> list[Row]:
        if self._made is None or index < self._next:
            self._next, self._made = 0, self._micro_batches()
        while True:
            item = next(self._made)
            self._next += 1
            if self._next > index:
                return item

    def epoch(self, step: int) -> None:
        """How often the data have been passed is not known."""

    def samples(self) -> list[tuple[float, list[Example]]]:
        """Examples that stand for those of the run: the first ones. As `packing.Schedule.samples`."""
        return [(1.0, list(islice(self.stream.examples(self.seed), SAMPLE)))]

    def tokens(self) -> tuple[None, None]:
        """Not known before the run."""
        return None, None

    def _micro_batches(self) -> Iterator[list[Row]]:
        examples, rows, number = self.stream.examples(self.seed), [], 0
        while True:
            window = list(islice(examples, WINDOW))
            order = Random(f"{self.seed}/{number}")
            made = pack_rows([len(example) for example in window], self.seq_len, self.packing, order)
            rows += [[window[index] for index in row] for row in made]
            while len(rows) >= self.rows_at_once:
                yield rows[: self.rows_at_once]
                del rows[: self.rows_at_once]
            number += 1


class MixedSchedule:
    """The micro-batches of one schedule with those of a stream between them, at even distances.

    All those of the first are there, so that its epochs are whole, unless `max_steps` says how long the run is.

    Args:
        main: a `packing.Schedule` or a `StreamSchedule`.
        beside: a `StreamSchedule` of rows of the same size.
        share: of the micro-batches that come from `beside`.
        max_steps: of the recipe.
    """

    def __init__(self, main, beside: StreamSchedule, share: float, max_steps: int | None):
        self.main, self.beside, self.share, self.per_step = main, beside, share, main.per_step
        self.per_epoch = None if main.per_epoch is None else main.per_epoch / (1 - share)
        self.steps = round(len(main) / (1 - share)) // self.per_step if max_steps is None else max_steps

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, index: int) -> list[Row]:
        before = self._of_beside(index)
        return self.main[index - before] if self._of_beside(index + 1) == before else self.beside[before]

    def _of_beside(self, index: int) -> int:
        """How many of the first `index` micro-batches come from the stream."""
        return int(index * self.share + 1e-9)

    def epoch(self, step: int) -> float | None:
        """Passes over the data of `main` after `step` optimizer steps."""
        return None if self.per_epoch is None else step * self.per_step / self.per_epoch

    def samples(self) -> list[tuple[float, list[Example]]]:
        """As `packing.Schedule.samples`."""
        parts = ((self.main, 1 - self.share), (self.beside, self.share))
        return [(weight * part, examples) for one, weight in parts for part, examples in one.samples()]

    def tokens(self) -> tuple[None, None]:
        """Not known before the run."""
        return None, None
