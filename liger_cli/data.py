"""Training data: sources in any usual layout -> tokenized examples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from liger_cli.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.hub import spare_retries
from liger_cli.rows import READERS, local_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
DEMO = "demo"
DEMO_DOCUMENTS = 1500
ENCODED_BLOCK = 1 << 24  # characters tokenized at once, or 1,000 documents
MAX_TURNS = 1000  # of a conversation
TEXT_COLUMNS = ("text", "content")
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Segments = list[tuple[str, bool]]  # text, and whether its tokens are trained on


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
    train, kept = [], []
    for examples, report in parts:
        count = min(round(held_out * len(examples) / total), len(examples) // 10)
        kept += examples[:count]
        report["held_out"] = count
        train.append(examples[count:])
    reports = [report for _, report in parts]
    mixed = _mixed(train, [source.weight for source in sources], seed)
    for source, report in zip(sources, reports, strict=True):
        report["weight"] = source.weight
    return Data(mixed, kept, reports)


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
    layout, encoded = open_source(source.name, tokenizer, seq_len)
    report = {"source": source.name, "layout": layout, "examples": 0, "tokens": 0, "cut": 0, "without_targets": 0}
    examples: list[Example] = []
    for example, cut in encoded:
        report["cut"] += cut
        if not example.targets:
            report["without_targets"] += layout != "text"  # a text's last piece may be a single token
            continue
        examples.append(example)
    report["examples"], report["tokens"] = len(examples), sum(map(len, examples))
    if not examples:
        raise nothing_to_learn(source.name, seq_len)
    return examples, report


def nothing_to_learn(name: str, seq_len: int) -> LigerError:
    """The error for a source without a single target."""
    return LigerError(f"{name} has no example with anything to learn within {seq_len} tokens; raise --seq-len")


def open_source(
    name: str, tokenizer, seq_len: int, streaming: bool = False
) -> tuple[str, Iterator[tuple[Example, bool]]]:
    """The layout of a source, and its examples as `encode` gives them, read as they are asked for.

    Args:
        streaming: a data set of the hub is read from there, and not downloaded first.
    Raises:
        As `load_data`.
    """
    rows = read_rows(name, streaming)
    first = next(rows, None)
    if first is None:
        raise LigerError(f"{name} has no examples")
    layout = detect_layout(first, name)
    return layout, encode(_documents(first, rows, layout, name, tokenizer), tokenizer, seq_len)


def read_rows(name: str, streaming: bool = False) -> Iterator[dict]:
    """The rows of a local file, the training split of a hub data set, or the shipped generator's.

    Raises:
        UsageError: no such file, an unknown kind of file. SetupError: the hub cannot be reached. LigerError: broken.
    """
    if name == DEMO:
        return _demo_rows()
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"--data names the folder {name}; name its files, separated by commas")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UsageError(f"{name} ends in {path.suffix!r}; liger reads {', '.join(READERS)}")
        return local_rows(path)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"--data names {name}, which is neither a file nor a hub id such as yahma/alpaca-cleaned")
    return _hub_rows(name, streaming)


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


def detect_layout(row: dict, name: str) -> str:
    """`messages`, `sharegpt`, `alpaca`, `prompt` or `text`, by the columns. Raises UsageError."""
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(row.get("conversations"), list):
        return "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "prompt"
    if any(isinstance(row.get(column), str) for column in TEXT_COLUMNS):
        return "text"
    raise UsageError(
        f"{name} has the columns {', '.join(map(str, row))[:300]}; liger knows messages, conversations, "
        "instruction + output, prompt + completion, and text"
    )


def _documents(first: dict, rows: Iterable[dict], layout: str, name: str, tokenizer) -> Iterator[tuple[Segments, bool]]:
    """Segments of each row, and whether it is plain text, which is cut into pieces and not cut off."""
    number = 1
    while first is not None:
        try:
            for segments in segments_of(first, layout, tokenizer):
                "".join(text for text, _ in segments).encode("utf-8")  # half a surrogate pair is no text
                yield segments, layout == "text"
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LigerError(
                f"{name}: example {number} is not a whole {layout} example ({type(error).__name__}: {error})"
            ) from None
        first, number = next(rows, None), number + 1


def segments_of(row: dict, layout: str, tokenizer) -> list[Segments]:
    """One row as documents of segments. Only responses are trained on; of plain text everything is.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or is no text. ModelError: no chat template.
    """
    if layout == "text":
        column = next((column for column in TEXT_COLUMNS if column in row), "text")
        return [[(_text(row[column]), True)]]
    if layout == "alpaca":
        fields = {"instruction": _text(row["instruction"]), "input": _text(row.get("input") or "")}
        prompt = (ALPACA_INPUT if fields["input"] else ALPACA_NO_INPUT).format(**fields)
        return [[(prompt, False), (_text(row["output"]), True)]]
    if layout == "prompt":
        response = row["completion"] if "completion" in row else row["response"]
        if isinstance(row["prompt"], list):
            return chat_segments([*row["prompt"], *response], tokenizer)
        return [[(_text(row["prompt"]), False), (_text(response), True)]]
    if layout == "sharegpt":
        turns = [{"role": ROLES[turn["from"]], "content": _text(turn["value"])} for turn in row["conversations"]]
        return chat_segments(turns, tokenizer)
    return chat_segments(row["messages"], tokenizer)


def chat_segments(messages: list[dict], tokenizer) -> list[Segments]:
    """A conversation through the tokenizer's chat template, trained on the assistant's turns.

    A template that writes a turn differently once others follow (it drops earlier reasoning, say) gives one document
    for each assistant turn; any other gives one in all.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError("the tokenizer has no chat template, which chat data needs; use Alpaca or plain-text data")

    from jinja2 import TemplateError

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, RecursionError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the tokenizer's chat template fails on it: {error}") from None

    if len(messages) > MAX_TURNS:  # every assistant turn is rendered after all those before it
        raise ValueError(f"{len(messages)} turns, more than {MAX_TURNS}")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("no assistant turn")
    spans = [(render(index, True), render(index + 1, False)) for index in turns]
    whole = spans[-1][1]
    if all(whole.startswith(after) and after.startswith(before) for before, after in spans):
        segments, position = [], 0
        for before, after in spans:
            segments += [(whole[position : len(before)], False), (after[len(before) :], True)]
            position = len(after)
        return [segments]
    documents = []
    for before, after in spans:
        common = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
        documents.append([(after[:common], False), (after[common:], True)])
    return documents


def encode(documents: Iterable[tuple[Segments, bool]], tokenizer, seq_len: int) -> Iterator[tuple[Example, bool]]:
    """Tokenize; segments one by one, as a prompt is at generation time. Yields examples and whether they were cut."""
    start, end = _start_tokens(tokenizer), tokenizer.eos_token_id
    for block in _blocks(documents):
        texts = [text for segments, _ in block for text, _ in segments]
        tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for segments, plain in block:
            ids: list[int] = []
            labels: list[int] = []
            for _, trained in segments:
                part = next(tokens)
                ids += part
                labels += part if trained else [IGNORED] * len(part)
            if start and ids[: len(start)] != start:
                ids, labels = start + ids, [IGNORED] * len(start) + labels
            if end is not None and end not in ids[-2:]:
                ids, labels = [*ids, end], [*labels, end]
            pieces = range(0, len(ids), seq_len) if plain else (0,)
            for first in pieces:
                last = first + seq_len
                yield _example(ids[first:last], labels[first:last]), not plain and len(ids) > seq_len


def _blocks(documents: Iterable[tuple[Segments, bool]]) -> Iterator[list[tuple[Segments, bool]]]:
    block, characters = [], 0
    for document in documents:
        block.append(document)
        characters += sum(len(text) for text, _ in document[0])
        if len(block) == 1000 or characters > ENCODED_BLOCK:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _example(ids: list[int], labels: list[int]) -> Example:
    return Example(np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))


def _start_tokens(tokenizer) -> list[int]:
    """The token that the tokenizer puts before every text, if there is one."""
    start = tokenizer("a")["input_ids"][:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value
