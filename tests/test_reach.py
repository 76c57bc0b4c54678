"""What of a run's tokens lies beyond window and kept tokens, and long documents beside short ones."""

import json
from dataclasses import replace

import numpy as np
import pytest

from liger_cli.checkpoint.tokenizer import load_tokenizer
from liger_cli.commands import finetune
from liger_cli.commands.convert import convert
from liger_cli.system.errors import UsageError
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.training.data import IGNORED, Example, load_data
from liger_cli.training.packing import Schedule
from liger_cli.training.reach import exact_tokens, share_beyond
from liger_cli.training.recipes import load_recipe
from liger_cli.training.streaming import MixedSchedule, StreamSchedule, open_stream

SMALL = {"recipe": "paper", "seq_len": 64, "batch_size": 4, "micro_batch_size": 1, "held_out": 0, "quiet": False}


def example(length, prompt=0):
    ids = np.arange(length, dtype=np.int32)
    return Example(ids, np.where(ids < prompt, IGNORED, ids).astype(np.int32))


def test_what_heads_keep():
    specs = [
        LayerSpec(window=8, sinks=2, kept=6),
        LayerSpec(kind="softmax"),
        LayerSpec(window=4, kept=(0, 10), softmax_kv_heads=(0,)),
    ]
    assert exact_tokens(specs, 2) == [16, 16, 14]


def test_share_by_hand():
    """Every prediction that is made from more than 10 tokens; of answers those that the loss counts."""
    examples = [example(20), example(5), example(16, prompt=12)]
    # of all 41 tokens 10, 0 and 6; of the predicted 19, 4 and 4: made from 11 to 19 tokens 9, none, and from 12 to 15 4
    assert share_beyond([(1.0, examples)], [10], every=True) == pytest.approx(16 / 41)
    assert share_beyond([(1.0, examples)], [10], every=False) == pytest.approx(13 / 27)
    assert share_beyond([(1.0, examples)], [10, 100], every=True) == pytest.approx(8 / 41)
    groups = [(0.25, [example(20)]), (0.75, [example(5)])]
    assert share_beyond(groups, [10], every=True) == pytest.approx(0.25 * 0.5)
    # joined into rows of 30: 30 and 11 tokens, of which 20 and 1 have more than 10 before them
    assert share_beyond([(1.0, examples)], [10], every=True, joined=30) == pytest.approx(21 / 41)
    assert share_beyond([(1.0, examples)], [], every=True) is None
    assert share_beyond([(1.0, [])], [10], every=True) is None


@pytest.fixture
def texts(tmp_path):
    """short.jsonl: 40 examples of 8 tokens; long.txt: one document of 900 tokens."""
    rows = [{"text": " ".join(f"w{4 + (7 * n + i) % 50}" for i in range(7))} for n in range(40)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "long.txt").write_text(" ".join(f"w{60 + (i * i) % 60}" for i in range(900)))
    return tmp_path


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_mixed_rows(tiny_base, texts, share):
    """Every row of the main data once an epoch, those of the stream between them, wherever the run is entered."""
    tokenizer = load_tokenizer(tiny_base())
    short = load_data(str(texts / "short.jsonl"), tokenizer, 64, held_out=0)
    main = Schedule(short.train, 64, 2, 1, False, 0, 2)
    stream = open_stream(str(texts / "long.txt"), tokenizer, 64, 0)
    make = lambda: MixedSchedule(  # noqa: E731
        main, StreamSchedule(stream, 64, 2, 1, False, 0, main.steps), share, None
    )
    mixed = make()
    assert len(mixed) == mixed.steps * 2 == pytest.approx(80 / (1 - share), abs=2)
    rows = [[one.input_ids.tolist() for row in mixed[index] for one in row] for index in range(len(mixed))]
    is_long = [rows[index][0][0] >= 60 for index in range(len(rows))]
    assert sum(is_long) == pytest.approx(share * len(rows), abs=1)
    for first in range(0, len(rows) - 20, 7):  # at even distances
        assert sum(is_long[first : first + 20]) == pytest.approx(20 * share, abs=1)
    assert [row for row, long in zip(rows, is_long, strict=True) if not long][:80] == [
        [one.input_ids.tolist() for row in main[index] for one in row] for index in range(80)
    ]
    later = make()
    assert [[one.input_ids.tolist() for row in later[index] for one in row] for index in (50, 51, 3)] == [
        rows[index] for index in (50, 51, 3)
    ]
    assert mixed.epoch(mixed.steps) == pytest.approx(2, abs=0.1)
    assert [weight for weight, _ in mixed.samples()] == [1 - share, share]


def test_a_run_says_what_it_teaches(tiny_base, texts, capsys, monkeypatch):
    """Short examples: a warning that goes with long documents beside them. Their figures are in the report."""
    monkeypatch.chdir(texts)
    convert(str(tiny_base()), "model", settings={"window": 8})
    capsys.readouterr()
    plan = finetune.run("model", data="short.jsonl", dry_run=True, **SMALL)
    said = capsys.readouterr().err
    assert plan["beyond_exact_memory"] == 0.0
    assert "0.0% of the trained tokens" in said and "next to nothing about distance" in said and "--long-data" in said
    report = finetune.run("model", data="short.jsonl", long_data="long.txt", max_steps=2, **SMALL)
    said = capsys.readouterr().err
    assert report["beyond_exact_memory"] == pytest.approx(0.5 * 55 / 63, abs=0.01)
    assert "50% of the rows" in said and "next to nothing" not in said
    assert report["steps_done"] == 2 and report["sources"][1]["share_of_rows"] == 0.5


def test_which_long_documents(tiny_base, texts, monkeypatch):
    """The recipe's go with the recipe's data; data of one's own are trained on alone unless others are named."""
    best = load_recipe("best")
    assert best.long_data == "emozilla/pg19"
    assert finetune._with_data(best, None, {}).long_data == best.long_data
    assert finetune._with_data(best, "short.jsonl", {}) == replace(best, long_data=None)
    assert finetune._with_data(best, "short.jsonl", {"long_data": "long.txt"}).long_data == "long.txt"
    assert finetune._with_data(best, None, {"long_data": "none"}).long_data is None
    monkeypatch.chdir(texts)
    convert(str(tiny_base()), "model", settings={"window": 8})
    with pytest.raises(UsageError, match="--long-data names nothing.txt, which is neither a file nor a hub id"):
        finetune.run("model", data="short.jsonl", long_data="nothing.txt", dry_run=True, **SMALL)
