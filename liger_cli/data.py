"""Training data: sources in any usual layout -> tokenized examples -> rows that never let one document see another.

A row holds documents of similar length, side by side and padded on the right, with no more than `seq_len` tokens in
all, padding included. A causal model never sees right padding, so packed and separate documents give the same loss.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from liger_cli.errors import LigerError, ModelError, SetupError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
DEMO = "demo"
DEMO_DOCUMENTS = 1500
POOL = 512  # examples sorted by length at a time: enough to pad little, small enough to keep batches varied
END_OF_TEXT = "<|endoftext|>"
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
    rows = read_rows(source.name)
    first = next(rows, None)
    if first is None:
        raise LigerError(f"{source.name} has no examples")
    layout = detect_layout(first, source.name)
    report = {"source": source.name, "layout": layout, "examples": 0, "tokens": 0, "cut": 0, "without_targets": 0}
    examples: list[Example] = []
    for example, cut in encode(_documents(first, rows, layout, source.name, tokenizer), tokenizer, seq_len):
        report["cut"] += cut
        if not example.targets:
            report["without_targets"] += layout != "text"  # a text's last piece may be a single token
            continue
        examples.append(example)
    report["examples"], report["tokens"] = len(examples), sum(map(len, examples))
    if not examples:
        raise LigerError(
            f"{source.name} has no example with anything to learn within {seq_len} tokens; raise --seq-len"
        )
    return examples, report


def read_rows(name: str) -> Iterator[dict]:
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
        if path.suffix.lower() not in LOADERS:
            raise UsageError(f"{name} ends in {path.suffix!r}; liger reads {', '.join(LOADERS)}")
        return _local_rows(path)
    if path.suffix.lower() in LOADERS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"--data names {name}, which is neither a file nor a hub id such as yahma/alpaca-cleaned")
    return _hub_rows(name)


def _local_rows(path: Path) -> Iterator[dict]:
    if path.suffix.lower() == ".txt":
        texts = path.read_text(encoding="utf-8", errors="replace").split(END_OF_TEXT)
        yield from ({"text": text.strip("\n")} for text in texts if text.strip())
        return
    import datasets

    try:
        yield from datasets.load_dataset(
            LOADERS[path.suffix.lower()], data_files=str(path), split="train", streaming=True
        )
    except (OSError, KeyboardInterrupt):
        raise
    except Exception as error:  # each reader has its own kinds
        raise LigerError(f"{path} cannot be read as {path.suffix.lower()[1:]}: {str(error)[:300]}") from None


def _hub_rows(name: str) -> Iterator[dict]:
    import datasets

    if not _hub_answers():
        # Its own retries would take most of a minute; what is in the cache is still found.
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    try:
        yield from datasets.load_dataset(name, split="train")
    except KeyboardInterrupt:
        raise
    except datasets.exceptions.DatasetNotFoundError:
        raise UsageError(f"{name} is not a data set of the hub (or needs `hf auth login`)") from None
    except Exception as error:
        raise SetupError(
            f"the data set {name} could not be fetched ({type(error).__name__}); without network pass local data "
            "(--data FILE.jsonl) or the shipped generator's (--data demo)"
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached; taken for granted behind a proxy, where a connection of our own tells nothing."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    address = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=5):
            return True
    except OSError:
        return False


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
        f"{name} has the columns {', '.join(row)}; liger knows messages, conversations, instruction + output, "
        "prompt + completion, and text"
    )


def _documents(first: dict, rows: Iterable[dict], layout: str, name: str, tokenizer) -> Iterator[tuple[Segments, bool]]:
    """Segments of each row, and whether it is plain text, which is cut into pieces and not cut off."""
    number = 1
    while first is not None:
        try:
            yield from ((segments, layout == "text") for segments in segments_of(first, layout, tokenizer))
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
        column = next(column for column in TEXT_COLUMNS if column in row)
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

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

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
    documents = iter(documents)
    while block := list(islice(documents, 1000)):
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


def make_rows(examples: list[Example], capacity: int, packing: bool, rng: Random) -> list[list[int]]:
    """Group examples into rows: indices, every example once.

    Args:
        capacity: tokens of a row, padding included: documents of a row x the longest of them never exceeds it.
        packing: False gives every document a row of its own.
    """
    order = list(range(len(examples)))
    rng.shuffle(order)
    if not packing:
        return [[index] for index in order]
    rows = []
    for first in range(0, len(order), POOL):
        pool = sorted(order[first : first + POOL], key=lambda index: -len(examples[index]))
        while pool:
            count = max(1, capacity // len(examples[pool[0]]))
            rows.append(pool[:count])
            pool = pool[count:]
    rng.shuffle(rows)
    return rows


class Schedule:
    """The micro-batches of a whole run in order: a map-style data set that needs no shuffling.

    Args:
        examples: the training examples.
        seq_len, batch_size, micro_batch_size, packing, seed: of the recipe.
        epochs: passes over the examples; an incomplete last batch is dropped.
        max_steps: ends (or prolongs) the run there, whatever the epochs.
    Raises:
        UsageError: not even one global batch.
    """

    def __init__(self, examples, seq_len, batch_size, micro_batch_size, packing, seed, epochs, max_steps=None):
        self.examples = examples
        self.per_step = batch_size // micro_batch_size
        self.micro_batches: list[list[int]] = []
        capacity = seq_len * micro_batch_size
        wanted = None if max_steps is None else max_steps * self.per_step
        epoch, passed = 0, 0.0
        self.per_epoch = 0
        while (passed < epochs) if wanted is None else (len(self.micro_batches) < wanted):
            rows = make_rows(examples, capacity, packing, Random(seed * 1_000_003 + epoch))
            if not packing:
                rows = [sum(rows[i : i + micro_batch_size], []) for i in range(0, len(rows), micro_batch_size)]
            self.per_epoch = self.per_epoch or len(rows)
            if wanted is None and epochs - passed < 1:
                rows = rows[: round(len(rows) * (epochs - passed))]
            self.micro_batches += rows
            epoch, passed = epoch + 1, passed + 1
        self.steps = len(self.micro_batches) // self.per_step if max_steps is None else max_steps
        if not self.steps:
            raise UsageError(
                f"the data fill {len(self.micro_batches) * micro_batch_size} rows of {seq_len} tokens, less than one "
                f"batch of {batch_size}; give more data, a smaller --batch-size or --seq-len, or --max-steps"
            )
        del self.micro_batches[self.steps * self.per_step :]

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.examples[one] for one in self.micro_batches[index]]

    def tokens(self) -> tuple[int, int]:
        """Tokens of the whole run, and how many of the tokens computed are padding."""
        real = padded = 0
        for row in self.micro_batches:
            lengths = [len(self.examples[index]) for index in row]
            real += sum(lengths)
            padded += len(lengths) * max(lengths)
        return real, padded - real


class Collator:
    """A micro-batch as tensors: documents side by side, padded on the right.

    This is the one place that knows how documents share a micro-batch: packing them into one row, with the model's
    state, window and positions reset at each, would be a collator of its own.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[list[Example]]) -> dict[str, "torch.Tensor"]:
        """input_ids, labels [B, T] int64 and lengths [B]. No attention mask: a causal model never sees the padding."""
        import torch

        examples = [example for item in items for example in item]
        longest = max(map(len, examples))
        input_ids = np.full((len(examples), longest), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(examples), longest), IGNORED, dtype=np.int64)
        for index, example in enumerate(examples):
            input_ids[index, : len(example)] = example.input_ids
            labels[index, : len(example)] = example.labels
        lengths = torch.tensor([len(example) for example in examples])
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels), "lengths": lengths}
