"""Rows, micro-batches and their order."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from liger_cli.system.errors import UsageError
from liger_cli.training.data import IGNORED, Example
from liger_cli.training.packing import Collator, Schedule, first_fit, pack_rows
from liger_cli.training.recipes import load_recipe, override


def examples_of(lengths):
    return [Example(np.arange(5, 5 + n, dtype=np.int32), np.arange(5, 5 + n, dtype=np.int32)) for n in lengths]


def test_rows_hold_every_example_once_and_are_nearly_full():
    lengths = [Random(1).randint(2, 100) for _ in range(50)] + [Random(i).randint(2, 128) for i in range(2000)]
    rows = pack_rows(lengths, 128, True, Random(0))
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert max(totals) <= 128
    assert len(rows) <= 1.05 * sum(totals) / 128
    assert rows == pack_rows(lengths, 128, True, Random(0)) != pack_rows(lengths, 128, True, Random(1))
    assert all(len(row) == 1 for row in pack_rows(lengths, 128, False, Random(0)))


def test_first_fit_takes_the_longest_first():
    assert first_fit([0, 1, 2, 3, 4], [3, 7, 2, 5, 3], 10) == [[1, 0], [3, 4, 2]]


def test_schedule_is_the_same_again_and_ends_where_asked():
    examples = examples_of([Random(i).randint(2, 64) for i in range(400)])
    make = lambda **more: Schedule(examples, 64, 8, 2, True, 3, 2, **more)  # noqa: E731
    first = make()
    assert first.micro_batches == make().micro_batches
    assert len(first) == first.steps * 4
    assert make(max_steps=500).steps == 500 and make(max_steps=3).micro_batches == first.micro_batches[:12]
    seen = [index for rows in first.micro_batches[: first.per_epoch] for row in rows for index in row]
    assert sorted(seen) == list(range(400))
    assert first.micro_batches[: first.per_epoch] != first.micro_batches[first.per_epoch : 2 * first.per_epoch]
    with pytest.raises(UsageError, match="batch"):
        Schedule(examples[:3], 64, 8, 2, True, 3, 1)


def test_schedule_counts_tokens_and_padding():
    schedule = Schedule(examples_of([60, 50, 40, 10, 20, 30, 64, 64]), 64, 4, 4, True, 0, 1, max_steps=1)
    batch = Collator(0)([schedule[0]])
    real, padding = schedule.tokens()
    assert real == int(batch["lengths"].sum()) and real + padding == batch["input_ids"].numel()


def test_collator_restarts_positions_and_asks_no_document_for_the_next():
    batch = Collator(0)([[examples_of([3, 2]), examples_of([1, 2])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 5, 6], [5, 5, 6, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 6], [IGNORED, IGNORED, 6, IGNORED, IGNORED]]
    assert batch["lengths"].tolist() == [5, 3]
    assert "position_ids" not in Collator(0)([[examples_of([3]), examples_of([2])]])
    joined = Collator(0, joined=True)([[examples_of([3, 2]), examples_of([1, 2])]])
    assert "position_ids" not in joined
    assert all(torch.equal(joined[name], batch[name]) for name in ("input_ids", "labels", "lengths"))


def test_joined_documents_are_for_comparing_with_the_original():
    """Where labels are trained on, a document sees its own alone."""
    best = load_recipe("best")
    assert best.joined and not override(best, objective="ce").joined
    with pytest.raises(UsageError, match="joined is True, but has to be false where a stage trains on labels"):
        replace(best, stages=(replace(best.stages[0], objective="distill", ce_weight=0.5),))
