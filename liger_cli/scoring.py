"""Perplexity of every column on one text, and how far each is from the base: one pass over the text for all of it."""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from liger_cli.columns import COLUMNS, Subject
from liger_cli.errors import LigerError, UsageError
from liger_cli.untrusted import read_bytes

LOGITS_BYTES = 512 << 20  # float32 logits of one batch at most, where the batch size is free
FIRST_BUCKET = 64  # tokens; the next buckets double


@dataclass(frozen=True)
class Rows:
    """A text cut into rows of `seq_len` predictions, each overlapping the last by the one token it starts from.

    Attributes:
        ids: [N, seq_len + 1] int64; the last row is padded on the right, where a causal model does not see it.
        lengths: predictions in each row, [N].
        tokens, nbytes: predictions in all, and UTF-8 bytes of the text.
    """

    ids: object
    lengths: object
    tokens: int
    nbytes: int


def read_texts(path: Path) -> list[str]:
    """The documents of a file: a `.jsonl` with a field `text` in each line, anything else is one plain text.

    Raises:
        UsageError: not a file. LigerError: not UTF-8, no such field, or empty.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; name a text or a .jsonl file")
    try:
        content = read_bytes(path, sys.maxsize, LigerError).decode("utf-8")
        if path.suffix == ".jsonl":
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
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


def make_rows(tokenizer, texts: list[str], seq_len: int) -> Rows:
    """Join the texts, each after the tokenizer's BOS token (else its EOS token), and cut them into rows.

    Every token of the texts is predicted exactly once, the separating tokens never.
    """
    import torch

    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    separator = [] if start is None else [start]
    rows, lengths = [], []
    stream: list[int] = []
    for text in texts:
        stream += separator + tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(stream) < 2:
        raise LigerError("the text is too short to predict a single token")
    for first in range(0, len(stream) - 1, seq_len):
        row = stream[first : first + seq_len + 1]
        lengths.append(len(row) - 1)
        rows.append(row + [row[-1]] * (seq_len + 1 - len(row)))
    return Rows(
        torch.tensor(rows), torch.tensor(lengths), sum(lengths), sum(len(text.encode("utf-8")) for text in texts)
    )


def batch_size_for(rows: Rows, vocab_size: int, batch_size: int | None) -> int:
    """The user's batch size, or one whose float32 logits stay below `LOGITS_BYTES`."""
    if batch_size is not None:
        return batch_size
    row = (rows.ids.shape[1] - 1) * vocab_size * 4
    return max(1, min(8, LOGITS_BYTES // row, len(rows.ids)))


def score(subject: Subject, rows: Rows, *, batch_size: int | None = None, agreement: bool = True, step=None) -> dict:
    """Loss of every column, and its agreement with the base.

    Args:
        step: called after each batch of each column.
    Returns:
        `{"perplexity": {column: {token, byte, by_position}}, "agreement": {column: {kl, top1}}}`: `token` is exp of the
        mean negative log-likelihood, `byte` the same for each UTF-8 byte of the text, `kl` the mean KL divergence
        (base || column) in nats a token, `top1` the share of positions whose most likely token is the base's.
    Raises:
        LigerError: a loss that is not finite; the sentence names the first layer where that shows.
    """
    import torch

    length = rows.ids.shape[1] - 1
    sums = {column: torch.zeros(3, length, dtype=torch.float64) for column in COLUMNS}  # loss, KL, top-1
    counts = torch.zeros(length, dtype=torch.float64)
    size = batch_size_for(rows, subject.liger_model.config.vocab_size, batch_size)
    for ids, lengths in zip(rows.ids.split(size), rows.lengths.split(size), strict=True):
        counted = torch.arange(length)[None] < lengths[:, None]  # [B, T]
        counts += counted.sum(0)
        base_logits = None
        for column in COLUMNS:
            with subject.column(column) as model, torch.inference_mode():
                run = partial(model, input_ids=ids[:, :-1].to(model.device), use_cache=False)
                logits = run().logits  # [B, T, V]
            if column == "base" and agreement:
                base_logits = logits
            for row in range(len(ids)):
                reference = None if base_logits is None else base_logits[row]
                figures = _compare(logits[row], reference, ids[row, 1:].to(logits.device))
                sums[column] += torch.where(counted[row], figures.double().cpu(), 0)
            if not torch.isfinite(sums[column]).all():
                with subject.column(column):
                    raise _not_finite(subject, column, run)
            if step is not None:
                step()
    perplexity = {column: _perplexity(sums[column][0], counts, rows) for column in COLUMNS}
    result = {"perplexity": perplexity}
    if agreement:
        result["agreement"] = {
            column: {
                "kl": float(sums[column][1].sum() / counts.sum()),
                "top1": float(sums[column][2].sum() / counts.sum()),
            }
            for column in COLUMNS
        }
    return result


def _not_finite(subject: Subject, column: str, run) -> LigerError:
    from liger_cli.finite import first_non_finite

    original = subject.original if column == "base" else None
    where = first_non_finite(original if original is not None else subject.liger_model, run)
    dtype = str(subject.liger_model.dtype).removeprefix("torch.")
    advice = "; try --dtype float32" if dtype != "float32" else ""
    return LigerError(
        f"the {column} column of {subject.folder} has a loss that is not finite in {dtype}"
        f"{f', first in {where}' if where else ''}{advice}"
    )


def _compare(logits, reference, targets):
    """Loss, KL and top-1 agreement of one row, [3, T]. logits, reference [T, V]; targets [T]."""
    import torch

    figures = torch.zeros(3, len(targets), device=logits.device)
    for first in range(0, len(targets), 256):
        part = slice(first, first + 256)
        log_p = logits[part].float().log_softmax(-1)
        figures[0, part] = -log_p.gather(-1, targets[part, None])[:, 0]
        if reference is not None:
            base = reference[part].float().log_softmax(-1)
            figures[1, part] = (base.exp() * (base - log_p)).sum(-1)
            figures[2, part] = (log_p.argmax(-1) == base.argmax(-1)).float()
    return figures


def _perplexity(loss, counts, rows: Rows) -> dict:
    total = float(loss.sum())
    by_position = {}
    first, last = 0, FIRST_BUCKET
    while first < len(loss):
        held = float(counts[first:last].sum())
        if held:
            name = f"{first + 1}-{min(last, len(loss))}"
            by_position[name] = math.exp(float(loss[first:last].sum()) / held)
        first, last = last, 2 * last
    return {
        "token": math.exp(total / rows.tokens),
        "byte": math.exp(total / rows.nbytes),
        "by_position": by_position,
    }
