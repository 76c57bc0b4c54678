"""Training data: sources in any usual layout -> tokenized examples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from liger_cli.checkpoint.hub import spare_retries
from liger_cli.checkpoint.tokenizer import put_before, token_ids
from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.training.conversations import Document
from liger_cli.training.files import READERS, local_rows
from liger_cli.training.layouts import Tally, documents, find_layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
DEMO = "demo"
DEMO_DOCUMENTS = 1500
ENCODED_BLOCK = 1 << 21  # characters tokenized at once, or 1,000 documents
LOOKED_AT = 100  # first rows that tell a source's layout


@dataclass(frozen=True)
class Example:
    """One document, cut to the sequence length. input_ids, labels: [T] int32; labels are IGNORED in a prompt."""

    input_ids: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """Tokens that the loss counts; the first token is never predicted."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Source:
    """One part of `--data`: a path, a hub id or `demo`, and its weight or None."""

    name: str
    weight: float | None = None


@dataclass(frozen=True)
class Data:
    """Tokenized data. report: one dict a source, with its layout, examples, tokens and how many were cut or empty."""

    train: list[Example]
    held_out: list[Example]
    report: list[dict]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.train))


def parse_sources(text: str) -> list[Source]:
    """`a.jsonl:0.7,b.parquet:0.3` -> sources. Raises UsageError: weights for some only, or not positive."""
    sources = []
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon or Path(part.strip()).exists():
            sources.append(Source(part.strip()))
            continue
        try:
            value = float(weight)
        except ValueError:
            raise UsageError(f"--data has {part.strip()!r}, but what follows the colon has to be a weight") from None
        if not 0 < value < float("inf"):
            raise UsageError(f"--data gives {name} the weight {weight}, but it has to be positive")
        sources.append(Source(name, value))
    if any(not source.name for source in sources):
        raise UsageError(f"--data is {text!r}; give paths or hub ids, separated by commas")
    if len({source.weight is None for source in sources}) > 1:
        raise UsageError("--data gives weights to some sources only; give all of them one, or none")
    return sources


def load_data(
    spec: str, tokenizer: "PreTrainedTokenizerBase", seq_len: int, held_out: int = 200, seed: int = 0
) -> Data:
    """Read, detect the layout, tokenize, hold out.

    Args:
        spec: the value of `--data`.
        seq_len: longer instruction examples are cut, longer plain texts are cut into pieces.
        held_out: the first examples of every source, in proportion, but never more than a tenth of it.
        seed: of the choice of examples where weights are given.
    Raises:
        UsageError: no such file, an unknown layout. LigerError: a broken file or example. SetupError: no network.
        ModelError: the tokenizer has no chat template for chat data.
    """
    sources = parse_sources(spec)
    parts = [_tokenized(source, tokenizer, seq_len) for source in sources]
    total = sum(len(examples) for examples, _ in parts)
    train, others = [], []
    for examples, report in parts:
        count = min(round(held_out * len(examples) / total), len(examples) // 10)
        others += examples[:count]
        report["held_out"] = count
        train.append(examples[count:])
    reports = [report for _, report in parts]
    mixed = _mixed(train, [source.weight for source in sources], seed)
    for source, report in zip(sources, reports, strict=True):
        report["weight"] = source.weight
    return Data(mixed, others, reports)


def _mixed(parts: list[list[Example]], weights: list[float | None], seed: int) -> list[Example]:
    """All examples; with weights as many in all, each source repeated or thinned to its share."""
    if weights[0] is None:
        return [example for part in parts for example in part]
    total, rng, mixed = sum(map(len, parts)), Random(seed), []
    for part, weight in zip(parts, weights, strict=True):
        wanted = max(1, round(total * weight / sum(weights)))
        while wanted > 0:
            mixed += part if wanted >= len(part) else rng.sample(part, wanted)
            wanted -= len(part)
    return mixed


def _tokenized(source: Source, tokenizer, seq_len: int) -> tuple[list[Example], dict]:
    opened = open_source(source.name, tokenizer, seq_len)
    layout, tally = opened.layout, opened.tally
    report = {"source": source.name, "layout": layout, "examples": 0, "tokens": 0, "cut": 0, "without_targets": 0}
    examples: list[Example] = []
    for example, cut in opened.examples:
        report["cut"] += cut
        if not example.targets:
            report["without_targets"] += layout != "text"  # a text's last piece may be a single token
            continue
        examples.append(example)
    report["examples"], report["tokens"] = len(examples), sum(map(len, examples))
    if not examples:
        raise nothing_to_learn(source.name, seq_len, tally)
    return examples, report | not_used(tally)


def not_used(tally: Tally) -> dict:
    """The part of a source's report that says what of it was not used."""
    return {"skipped": dict(tally.skipped.most_common()), "unused": sorted(tally.unused)}


def nothing_to_learn(name: str, seq_len: int, tally: Tally | None = None) -> LigerError:
    """The error for a source without a single target."""
    if tally is not None and sum(tally.skipped.values()) == tally.rows:
        return LigerError(f"{name} has no row that can be used ({tally.words()})")
    return LigerError(f"{name} has no example with anything to learn within {seq_len} tokens; raise --seq-len")


@dataclass(frozen=True)
class Opened:
    """A source that is being read.

    Attributes:
        layout: the name of its layout.
        examples: as `encode` gives them, read as they are asked for.
        tally: of the rows read so far.
    """

    layout: str
    examples: Iterator[tuple[Example, bool]]
    tally: Tally


def open_source(name: str, tokenizer, seq_len: int, streaming: bool = False) -> Opened:
    """Open a source; its layout is that of the first row that has one.

    Args:
        streaming: a data set of the hub is read from there, and not downloaded first.
    Raises:
        As `load_data`.
    """
    rows, tally = read_rows(name, streaming), Tally()
    first = list(islice(rows, LOOKED_AT))
    if not first:
        raise LigerError(f"{name} has no examples")
    for number, row in enumerate(first, 1):
        try:
            layout = find_layout(row, name)
            break
        except UsageError:
            if number == len(first):
                raise
    found = documents(chain(first, rows), layout, tokenizer, tally)
    return Opened(layout.name, encode(found, tokenizer, seq_len), tally)


def read_rows(name: str, streaming: bool = False) -> Iterator[dict]:
    """The rows of a local file, the training split of a hub data set, or the shipped generator's.

    Raises:
        UsageError: no such file, an unknown kind of file. SetupError: the hub cannot be reached. LigerError: broken.
    """
    if name == DEMO:
        return _demo_rows()
    path = _checked(name)
    return _hub_rows(name, streaming) if path is None else local_rows(path)


def check_sources(spec: str | None, option: str = "--data") -> None:
    """What can be told of `option` without reading it. Raises UsageError: no such file, of no known kind, weights."""
    for source in parse_sources(spec) if spec is not None else ():
        _checked(source.name, option)


def _checked(name: str, option: str = "--data") -> Path | None:
    """The file of a source; None for the shipped generator and for a data set of the hub."""
    if name == DEMO:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"{option} names the folder {name}; name its files, separated by commas")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UsageError(f"{name} ends in {path.suffix!r}; liger reads {', '.join(READERS)}")
        return path
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"{option} names {name}, which is neither a file nor a hub id such as yahma/alpaca-cleaned")
    return None


def _hub_rows(name: str, streaming: bool) -> Iterator[dict]:
    import datasets

    spare_retries()
    try:
        yield from datasets.load_dataset(name, split="train", streaming=streaming)
    except KeyboardInterrupt:
        raise
    except datasets.exceptions.DatasetNotFoundError:
        raise UsageError(f"{name} is not a data set of the hub (or needs `hf auth login`)") from None
    except Exception as error:
        raise SetupError(
            f"the data set {name} could not be fetched ({type(error).__name__}); without network pass local data "
            "(--data FILE.jsonl) or the shipped generator's (--data demo)"
        ) from None


def _demo_rows() -> Iterator[dict]:
    from liger_cli.shipped.text import KINDS, TRAIN_SEED, documents

    plain = tuple(kind for kind in KINDS if kind != "chat")
    # A seed away from the base's own training documents.
    for text in islice(documents(TRAIN_SEED + 2**30, plain, min_words=80, max_words=560), DEMO_DOCUMENTS):
        yield {"text": text}


def encode(documents: Iterable[Document], tokenizer, seq_len: int) -> Iterator[tuple[Example, bool]]:
    """Tokenize each document whole. Yields examples, and whether they were cut.

    A token is trained on where it has a character that is: segments tokenized apart would be other tokens.
    """
    start, end = put_before(tokenizer), tokenizer.eos_token_id
    for block in _blocks(documents):
        for document, (ids, mask) in zip(block, _tokens(block, tokenizer), strict=True):
            if document.starts and start and ids[: len(start)] != start:
                ids, mask = start + ids, [False] * len(start) + mask
            if document.ends and end is not None and ids[-1:] != [end]:
                ids, mask = [*ids, end], [*mask, True]
            labels = [one if trained else IGNORED for one, trained in zip(ids, mask, strict=True)]
            for first in range(0, len(ids), seq_len) if document.plain else (0,):
                last = first + seq_len
                cut = not document.plain and len(ids) > seq_len
                yield _example(ids[first:last], labels[first:last]), cut


def _tokens(block: list[Document], tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """For each document its ids, and for each id whether it is trained on."""
    fast = getattr(tokenizer, "is_fast", False)
    found: dict[int, tuple] = {}
    for plain in (True, False):
        chosen = [i for i, one in enumerate(block) if one.tokens is None and one.plain == plain]
        if not chosen:
            continue
        offsets = {"return_offsets_mapping": True} if fast and not plain else {}
        made = tokenizer([block[i].text for i in chosen], add_special_tokens=False, **offsets)
        for place, i in enumerate(chosen):
            ids = list(made["input_ids"][place])
            if plain:
                mask = [True] * len(ids)
            elif offsets:
                mask = _in_spans(made["offset_mapping"][place], block[i].trained)
            else:
                mask = _by_prefixes(ids, block[i], tokenizer)
            found[i] = ids, mask
    for i, document in enumerate(block):
        ids, mask = found[i] if document.tokens is None else document.tokens
        yield list(ids), [bool(one) for one in mask]


def _in_spans(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token has a character of a span. One that its tokenizer trimmed to nothing is the last it has."""
    first, last = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    first, mask = np.minimum(first, last - 1), np.zeros(len(offsets), dtype=bool)
    for begin, end in spans:
        mask |= (first < end) & (last > begin)
    return mask.tolist()


def _by_prefixes(ids: list[int], document: Document, tokenizer) -> list[bool]:
    """The same for a tokenizer without offsets: a text's tokens begin as those of its beginning do."""
    mask = [False] * len(ids)
    for span in document.trained:
        ends = []
        for character in span:
            part = token_ids(tokenizer, document.text[:character])
            same = zip(ids, part, strict=False)
            ends.append(next((i for i, (one, other) in enumerate(same) if one != other), min(len(ids), len(part))))
        last = len(ids) if span[1] == len(document.text) else ends[1]
        mask[ends[0] : last] = [True] * (last - ends[0])
    return mask


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    block, characters = [], 0
    for document in documents:
        block.append(document)
        characters += len(document.text)
        if len(block) == 1000 or characters > ENCODED_BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _example(ids: list[int], labels: list[int]) -> Example:
    return Example(np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))
