"""Data that are read as the run goes on: constant memory, the same order again, wherever it is entered."""

import json
import os
import subprocess
import sys
from itertools import islice
from random import Random

import pytest

from liger_cli.system.errors import LigerError, UsageError
from liger_cli.training import streaming
from liger_cli.training.data import load_data, read_rows
from liger_cli.training.streaming import StreamSchedule, open_stream, wants_streaming


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base())


@pytest.fixture
def corpus(tmp_path):
    rng = Random(0)
    rows = [{"text": " ".join(f"w{rng.randrange(4, 128)}" for _ in range(rng.randint(3, 40)))} for _ in range(300)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(micro_batch):
    return [[tuple(example.input_ids.tolist()) for example in row] for row in micro_batch]


def test_a_pass_holds_every_example_once_but_the_held_out(corpus, tokenizer):
    loaded = load_data(str(corpus), tokenizer, 48, held_out=20)
    stream = open_stream(str(corpus), tokenizer, 48, held_out=20)
    same = lambda one, other: contents([one]) == contents([other])  # noqa: E731
    assert same(stream.held_out, loaded.held_out)
    twice = list(islice(stream.examples(0), 2 * len(loaded.train)))
    assert same(twice[: len(loaded.train)], loaded.train) and same(twice[len(loaded.train) :], loaded.train)


def test_schedule_is_the_same_wherever_it_is_entered(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 64)
    make = lambda seed=0: StreamSchedule(  # noqa: E731
        open_stream(str(corpus), tokenizer, 48, 8), 48, 4, 2, True, seed, 200
    )
    whole = make()
    assert len(whole) == 400 and whole.steps == 200
    first = [contents(whole[index]) for index in range(250)]
    assert all(sum(map(len, row)) <= 48 for rows in first for row in rows) and all(len(rows) == 2 for rows in first)
    later = make()
    assert [contents(later[index]) for index in range(120, 250, 2)] == first[120::2]
    assert contents(later[3]) == first[3]
    assert contents(make(1)[0]) != first[0]


def test_weights_are_shares_of_the_examples(tmp_path, tokenizer):
    for name, word in {"a": "w10", "b": "w20"}.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": f"{word} w5"}) + "\n") * 50)
    plain = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    stream = open_stream(f"{tmp_path / 'a.jsonl'}:3,{tmp_path / 'b.jsonl'}:1", tokenizer, 48, 8)
    assert [report["held_out"] for report in stream.report] == [6, 2]
    drawn = list(islice(stream.examples(0), 2000))
    assert 1400 < sum(10 in example.input_ids for example in drawn) < 1600  # 5 standard deviations are 97
    assert [report["held_out"] for report in open_stream(plain, tokenizer, 48, 8).report] == [4, 4]  # by size
    with pytest.raises(UsageError, match="weight"):
        open_stream(f"{plain},user/set", tokenizer, 48, 8)


def test_large_files_are_streamed_and_need_a_length(corpus, monkeypatch):
    assert not wants_streaming(str(corpus), None, None) and wants_streaming(str(corpus), True, 5)
    with pytest.raises(UsageError, match="--streaming.*--max-steps"):
        wants_streaming(str(corpus), True, None)
    monkeypatch.setattr(streaming, "STREAM_ABOVE", 1000)
    assert wants_streaming(str(corpus), None, 5) and not wants_streaming(str(corpus), False, None)
    with pytest.raises(UsageError, match="--max-steps.*--no-streaming"):
        wants_streaming(str(corpus), None, None)


def test_a_stream_without_enough_is_one_sentence(tmp_path, corpus, tokenizer):
    with pytest.raises(UsageError, match="--held-out"):
        open_stream(str(corpus), tokenizer, 48, 500)
    path = tmp_path / "prompts.jsonl"
    whole = {"instruction": "w5", "output": "w6 w7"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [whole, whole, {**whole, "instruction": "w5 " * 99}]))
    stream = open_stream(str(path), tokenizer, 48, 1)
    assert len(list(islice(stream.examples(0), 10))) == 10
    stream.skipped[0] = 2
    with pytest.raises(LigerError, match="anything to learn"):
        next(stream.examples(0))


def test_text_files_are_read_block_by_block(tmp_path, monkeypatch):
    from liger_cli.training import files as rows

    texts = [f"w{index} " * 30 + "\nend" for index in range(40)]
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(texts))
    for block in (7, 64, 1000, 1 << 24):
        monkeypatch.setattr(rows, "TEXT_BLOCK", block)
        read = [row["text"] for row in read_rows(str(path))]
        if block >= 64:  # four blocks hold a document
            assert read == texts
        assert "".join(read).replace("\n", "") == "".join(texts).replace("\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path, tiny_base):
    """A file four times as long takes no more memory, and both less than the long file."""
    code = (
        "import resource, sys\n"
        "from transformers import AutoTokenizer\n"
        "from liger_cli.training import streaming\n"
        "streaming.WINDOW = 64\n"
        "stream = streaming.open_stream(sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), 64, 8)\n"
        "schedule = streaming.StreamSchedule(stream, 64, 8, 8, True, 0, int(sys.argv[3]))\n"
        "schedule[0]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for index in range(len(schedule)): schedule[index]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    line = json.dumps({"text": " ".join(f"w{i % 120 + 4}" for i in range(60)), "note": "x" * 4000}) + "\n"
    grown = []
    for lines in (2_500, 10_000):
        path = tmp_path / f"{lines}.jsonl"
        path.write_text(line * lines)
        command = [sys.executable, "-c", code, str(path), str(tiny_base()), str(lines // 8 - 10)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout.split()[0]) << 10)
    # The longer file has 33 MB more; what the reader's blocks and the allocator vary by stays far below.
    assert grown[1] < grown[0] + (16 << 20), grown
