"""Examples -> rows of several documents -> micro-batches in a fixed order.

A row holds documents one behind another, up to `seq_len` tokens. Positions begin anew at each, which is what tells the
model to begin state, window and mask anew there, and no document is asked to predict the next one's first token: packed
and separate documents give the same loss. A recipe that joins documents makes a row one text instead.
"""

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from liger_cli.system.errors import UsageError
from liger_cli.training.data import IGNORED, Example

if TYPE_CHECKING:
    import torch

SAMPLE = 10_000  # examples, about, that stand for all of them
POOL = 512  # examples fitted into rows at a time: enough to fill them, small enough to keep batches varied

Row = list[Example]


def pack_rows(lengths: Sequence[int], capacity: int, packing: bool, rng: Random) -> list[list[int]]:
    """Group examples into rows: indices, every example once.

    First-fit decreasing within pools of `POOL` examples (at most 11/9 of the fewest rows, Johnson 1973; a few per cent
    in practice), in an order drawn from `rng`.

    Args:
        lengths: tokens of each example, none above `capacity`.
        capacity: tokens of a row.
        packing: False gives every document a row of its own.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if not packing:
        return [[index] for index in order]
    rows: list[list[int]] = []
    for first in range(0, len(order), POOL):
        rows += first_fit(order[first : first + POOL], lengths, capacity)
    rng.shuffle(rows)
    return rows


def first_fit(indices: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: the longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda index: -lengths[index]):
        at = next((at for at, left in enumerate(room) if left >= lengths[index]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(capacity)
        rows[at].append(index)
        room[at] -= lengths[index]
    return rows


class Schedule:
    """The micro-batches of a whole run in order: a map-style data set that needs no shuffling.

    Args:
        examples: the training examples.
        seq_len, batch_size, micro_batch_size, packing, seed: of the recipe.
        epochs: passes over the examples; an incomplete last batch is dropped.
        max_steps: ends (or prolongs) the run there, whatever the epochs.
    Attributes:
        micro_batches: for each its rows, and for each row the indices of its examples.
        steps: optimizer steps. per_step: micro-batches of one. per_epoch: micro-batches of one pass.
    Raises:
        UsageError: not even one global batch.
    """

    def __init__(self, examples, seq_len, batch_size, micro_batch_size, packing, seed, epochs, max_steps=None):
        self.examples = examples
        self.per_step = batch_size // micro_batch_size
        self.micro_batches: list[list[list[int]]] = []
        lengths = [len(example) for example in examples]
        wanted = None if max_steps is None else max_steps * self.per_step
        epoch, passed = 0, 0.0
        self.per_epoch = 0
        while (passed < epochs) if wanted is None else (len(self.micro_batches) < wanted):
            rows = pack_rows(lengths, seq_len, packing, Random(seed * 1_000_003 + epoch))
            groups = [rows[first : first + micro_batch_size] for first in range(0, len(rows), micro_batch_size)]
            self.per_epoch = self.per_epoch or len(groups)
            if wanted is None and epochs - passed < 1:
                groups = groups[: round(len(groups) * (epochs - passed))]
            self.micro_batches += groups
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

    def __getitem__(self, index: int) -> list[Row]:
        return [[self.examples[one] for one in row] for row in self.micro_batches[index]]

    def epoch(self, step: int) -> float | None:
        """Passes over the data after `step` optimizer steps."""
        return step * self.per_step / self.per_epoch

    def samples(self) -> list[tuple[float, list[Example]]]:
        """Examples that stand for those of the run, in groups, each with its share of the rows."""
        return [(1.0, self.examples[:: max(1, len(self.examples) // SAMPLE)])]

    def tokens(self) -> tuple[int, int]:
        """Tokens of the whole run, and how many more are computed as padding."""
        real = padded = 0
        for rows in self.micro_batches:
            lengths = [sum(len(self.examples[index]) for index in row) for row in rows]
            real += sum(lengths)
            padded += len(lengths) * max(lengths)
        return real, padded - real


class Collator:
    """A micro-batch as tensors: rows of documents, padded on the right to the longest row.

    Args:
        joined: a row is one text: positions run on from document to document.
    """

    def __init__(self, pad_token_id: int, joined: bool = False):
        self.pad_token_id, self.joined = pad_token_id, joined

    def __call__(self, items: list[list[Row]]) -> dict[str, "torch.Tensor"]:
        """input_ids, labels [B, T] int64, lengths [B], and, where a row holds several documents, position_ids [B, T].

        No attention mask: a causal model never sees the padding. Padding goes on with the last document's positions.
        """
        import torch

        rows = [row for item in items for row in item]
        lengths = [sum(map(len, row)) for row in rows]
        shape = (len(rows), max(lengths))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example)
                input_ids[index, start:end] = example.input_ids
                labels[index, start + 1 : end] = example.labels[1:]  # nothing before it may predict its first token
                positions[index, start:] = np.arange(shape[1] - start)
                start = end
        batch = {"input_ids": input_ids, "labels": labels, "lengths": np.asarray(lengths)}
        if not self.joined and any(len(row) > 1 for row in rows):
            batch["position_ids"] = positions
        return {name: torch.from_numpy(value) for name, value in batch.items()}
