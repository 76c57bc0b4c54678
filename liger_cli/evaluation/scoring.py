"""Perplexity of every column on one text, and how far each is from the base: one pass over the text for all of it."""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from liger_cli.checkpoint.tokenizer import separator, token_ids
from liger_cli.evaluation.subject import COLUMNS, Subject
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.untrusted import read_bytes

if TYPE_CHECKING:
    from liger_cli.evaluation.position import Positions

MOST_LOSS = 709.0  # nats, whose exponential a float still holds
LOGITS_BYTES = 512 << 20  # float32 logits of one batch at most, where the batch size is free


@dataclass(frozen=True)
class Rows:
    """A text cut into rows of `seq_len` predictions, each overlapping the last by the one token it starts from.

    Attributes:
        ids: [N, seq_len + 1] int64; the last row is padded on the right, where a causal model does not see it.
        lengths: predictions in each row, [N].
        tokens, nbytes: predictions in all, and UTF-8 bytes of what was predicted.
        stream: token ids of the whole text.
    """

    ids: object
    lengths: object
    tokens: int
    nbytes: int
    stream: list[int]


def read_texts(path: Path) -> list[str]:
    """The documents of a file: a `.jsonl` with a field `text` in each line, anything else is one plain text.

    Raises:
        UsageError: not a file. LigerError: not UTF-8, no such field, or empty.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; name a text or a .jsonl file, or leave it out for the shipped prose")
    try:
        content = read_bytes(path, sys.maxsize, LigerError).decode("utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        else:
            texts = [content]
    except UnicodeDecodeError:
        raise LigerError(f"{path} is not UTF-8 text") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LigerError(f"{path} has a line that is not a JSON object with a field `text`") from None
    if not all(isinstance(text, str) for text in texts):
        raise LigerError(f"{path} has a `text` that is no text")
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        raise LigerError(f"{path} has a `text` with half a surrogate pair, which is no text")
    if not any(text.strip() for text in texts):
        raise LigerError(f"{path} holds no text")
    return texts


def make_rows(tokenizer, texts: list[str], seq_len: int, most: int | None = None) -> Rows:
    """Join the texts, each after the tokenizer's BOS token (else its EOS token), and cut them into rows.

    Every token of the texts is predicted exactly once, the separating tokens never.

    Args:
        most: rows that are taken, at even distances; all by default.
    """
    import torch

    start = separator(tokenizer)
    between = [] if start is None else [start]
    rows, lengths = [], []
    stream: list[int] = []
    for text in texts:
        stream += between + token_ids(tokenizer, text)
    if len(stream) < 2:
        raise LigerError("the text is too short to predict a single token")
    starts = range(0, len(stream) - 1, seq_len)
    taken = len(starts) if most is None else min(most, len(starts))
    for first in (starts[index * len(starts) // taken] for index in range(taken)):
        row = stream[first : first + seq_len + 1]
        lengths.append(len(row) - 1)
        rows.append(row + [row[-1]] * (seq_len + 1 - len(row)))
    nbytes = sum(len(text.encode("utf-8")) for text in texts)
    if sum(lengths) < len(stream) - 1:  # what was left out has no bytes of its own to count
        nbytes = round(nbytes * sum(lengths) / (len(stream) - 1))
    return Rows(torch.tensor(rows), torch.tensor(lengths), sum(lengths), nbytes, stream)


def batch_size_for(rows: Rows, vocab_size: int, batch_size: int | None) -> int:
    """The user's batch size, or one whose float32 logits stay below `LOGITS_BYTES`."""
    if batch_size is not None:
        return batch_size
    return max(1, min(rows_at_once(rows.ids.shape[1] - 1, vocab_size), len(rows.ids)))


def rows_at_once(seq_len: int, vocab_size: int) -> int:
    """How many rows' float32 logits stay below `LOGITS_BYTES`, at most 8; at least one row."""
    return max(1, min(8, LOGITS_BYTES // (4 * seq_len * vocab_size)))


def score(subject: Subject, rows: Rows, *, batch_size: int | None = None, agreement: bool = True, step=None) -> dict:
    """Loss of every column, and its agreement with the base.

    Args:
        step: called after each batch of each column.
    Returns:
        `{"perplexity": {column: {token, byte, by_position}}, "agreement": {column: {kl, top1, by_position}}}`: `token`
        is exp of the mean negative log-likelihood, `byte` the same for each UTF-8 byte of the text, `kl` the mean KL
        divergence (base || column) in nats a token, `top1` the share of positions whose most likely token is the
        base's; by_position has `token` or `kl` for each of `evaluation.position.buckets`.
    Raises:
        LigerError: a loss that is not finite; the sentence names the first layer where that shows.
    """
    columns = {column: partial(subject.column, column) for column in COLUMNS}
    size = batch_size_for(rows, subject.liger_model.config.vocab_size, batch_size)
    from liger_cli.evaluation.position import score_positions

    found = score_positions(columns, rows.ids, rows.lengths, batch_size=size, step=step, whose=f" of {subject.folder}")
    result = {"perplexity": {column: _perplexity(positions, rows) for column, positions in found.items()}}
    if agreement:
        result["agreement"] = {
            column: {
                "kl": positions.mean("kl"),
                "top1": positions.mean("top1"),
                "by_position": positions.by_bucket("kl"),
            }
            for column, positions in found.items()
        }
    return result


def _exp(loss: float) -> float:
    """The perplexity of a loss in nats; the largest that a float holds where it is larger."""
    return math.exp(loss) if loss < MOST_LOSS else sys.float_info.max


def _perplexity(positions: "Positions", rows: Rows) -> dict:
    total = float(positions.loss.sum())
    return {
        "token": _exp(total / rows.tokens),
        "byte": _exp(total / rows.nbytes),
        "by_position": {bucket: _exp(loss) for bucket, loss in positions.by_bucket("loss").items()},
    }
