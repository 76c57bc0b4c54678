"""Sources, layouts and labels of `training.data`."""

import json

import numpy as np
import pytest

from liger_cli.system.errors import LigerError, ModelError, UsageError
from liger_cli.training.data import IGNORED, load_data, parse_sources


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one(path, tokenizer, seq_len=64):
    """The only example of a file."""
    data = load_data(str(path), tokenizer, seq_len, held_out=0)
    assert len(data.train) == 1
    return data.train[0], data.report[0]


def learned(example):
    return [int(label) for label in example.labels if label != IGNORED]


def test_alpaca_learns_the_response_only(tmp_path, tokenizer):
    row = {"instruction": "w10", "input": "", "output": "w20 w21"}
    example, report = one(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert report["layout"] == "alpaca"
    assert learned(example) == [20, 21, tokenizer.eos_token_id]
    assert 10 in example.input_ids and example.targets == 3


def test_text_learns_everything_and_long_text_is_cut_into_pieces(tmp_path, tokenizer):
    words = [f"w{4 + i % 100}" for i in range(150)]
    path = write(tmp_path / "a.jsonl", [{"text": " ".join(words)}])
    data = load_data(path, tokenizer, 64, held_out=0)
    assert [len(example) for example in data.train] == [64, 64, 23]  # 150 words and the end token
    joined = np.concatenate([example.labels for example in data.train]).tolist()
    assert joined == [int(word[1:]) for word in words] + [tokenizer.eos_token_id]


@pytest.mark.parametrize("layout", ["messages", "sharegpt"])
def test_chat_learns_every_assistant_turn(tmp_path, tokenizer, layout):
    turns = [("user", "w10 "), ("assistant", "w20 "), ("user", "w11 "), ("assistant", "w21 w22")]
    if layout == "messages":
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    else:
        names = {"user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    example, report = one(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert report["layout"] == "messages"
    assert example.input_ids.tolist() == [10, 20, 11, 21, 22, tokenizer.eos_token_id]
    assert learned(example) == [20, 21, 22, tokenizer.eos_token_id]


def test_formats_hold_the_same(tmp_path, tokenizer):
    import pandas

    rows = [{"text": f"w{10 + i} w{20 + i}"} for i in range(5)]
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(row["text"] for row in rows))
    write(tmp_path / "a.jsonl", rows)
    read = {}
    for suffix in ("parquet", "csv", "json", "txt", "jsonl"):
        data = load_data(str(tmp_path / f"a.{suffix}"), tokenizer, 64, held_out=0)
        read[suffix] = [example.input_ids.tolist() for example in data.train]
    assert all(value == [[10 + i, 20 + i, 2] for i in range(5)] for value in read.values()), read


def test_broken_inputs_are_one_sentence(tmp_path, tokenizer):
    cases = {
        "unknown.jsonl": (json.dumps({"foo": "x"}) + "\n", UsageError, "foo"),
        "null.jsonl": (json.dumps({"instruction": "w4", "output": None}) + "\n", UsageError, "with something in them"),
        "field.jsonl": (json.dumps({"instruction": "", "output": "w4"}) + "\n", LigerError, "instruction is empty: 1"),
        "broken.jsonl": ('{"text": "w4"}\n{"text": ', LigerError, "broken.jsonl"),
        "empty.txt": ("", LigerError, "no examples"),
        "a.xyz": ("x", UsageError, "xyz"),
        "long.jsonl": (json.dumps({"instruction": "w4 " * 99, "output": "w5"}) + "\n", LigerError, "--seq-len"),
    }
    for name, (text, kind, needle) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(kind, match=needle):
            load_data(str(tmp_path / name), tokenizer, 64)
    with pytest.raises(UsageError, match="neither a file nor a hub id"):
        load_data(str(tmp_path / "missing.jsonl"), tokenizer, 64)


def test_chat_without_a_template(tmp_path, tokenizer):
    bare = type("Bare", (), {"chat_template": None, "bos_token_id": None, "eos_token_id": 2, "__call__": tokenizer})()
    row = {"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]}
    with pytest.raises(ModelError, match="chat template"):
        load_data(write(tmp_path / "a.jsonl", [row]), bare, 64)


def test_weights_decide_the_shares(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [{"text": "w10 w11"}] * 30)
    write(tmp_path / "b.jsonl", [{"text": "w20 w21"}] * 70)
    spec = f"{tmp_path / 'a.jsonl'}:0.6,{tmp_path / 'b.jsonl'}:0.4"
    data = load_data(spec, tokenizer, 64, held_out=0)
    assert sum(10 in example.input_ids for example in data.train) == 60
    assert sum(20 in example.input_ids for example in data.train) == 40
    plain = load_data(spec.replace(":0.6", "").replace(":0.4", ""), tokenizer, 64, held_out=10)
    assert len(plain.train) == 90 and len(plain.held_out) == 10
    assert sum(10 in example.input_ids for example in plain.held_out) == 3


@pytest.mark.parametrize("spec", ["a.jsonl:x", "a.jsonl:-1", "a.jsonl:0.5,b.jsonl", "a.jsonl,,b.jsonl", ""])
def test_sources_refused(spec):
    with pytest.raises(UsageError, match="--data"):
        parse_sources(spec)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6b" * 32 + b"\nsize 17209920\n"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
def test_a_pointer_of_git_is_named(tmp_path, tokenizer, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(POINTER)
    with pytest.raises(LigerError, match="git lfs pull"):
        load_data(str(tmp_path / f"a.{suffix}"), tokenizer, 64)


@pytest.mark.parametrize(
    ("value", "indent", "count"),
    [
        ({"data": [{"text": "w4"}, {"text": "w5"}]}, 1, 2),
        ({"version": "1", "data": [{"text": "w4"}, {"text": "w5"}]}, None, 2),
        ([{"text": "w4"}, {"text": "w5"}], 1, 2),
        ({"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]}, None, 1),
    ],
)
def test_json_files_that_hold_their_rows(tmp_path, tokenizer, value, indent, count):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert len(load_data(str(tmp_path / "a.json"), tokenizer, 64, held_out=0).train) == count


def test_json_without_rows(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"text": "w4"}], "test": [{"text": "w5"}]}, indent=1))
    with pytest.raises(LigerError, match=r"one object \(train, test\) with 2 lists"):
        load_data(str(tmp_path / "a.json"), tokenizer, 64)


def test_unusable_rows_are_counted(tmp_path, tokenizer):
    rows = [
        {"text": None, "id": 1},
        {"text": "w4", "source": ""},
        {"text": ["w4"]},
        {"text": ""},
        {"text": "w5", "id": 2},
    ]
    data = load_data(write(tmp_path / "a.jsonl", rows), tokenizer, 64, held_out=0)
    assert len(data.train) == 2
    wanted = {"text is null": 1, "text is list, not text": 1, "text is empty": 1}
    assert data.report[0]["skipped"] == wanted and data.report[0]["unused"] == ["id"]
    with pytest.raises(LigerError, match="no row that can be used .text is null: 2"):
        load_data(write(tmp_path / "b.jsonl", [{"text": "\ud800"}, *[{"text": None}] * 2]), tokenizer, 64)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "w10", "output": "w20"},
        {"instruction": "w10", "input": None, "response": "w20", "category": "x"},
        {"question": "w10", "answer": "w20"},
        {"query": "w10", "response": "w20"},
        {"input": "w10", "output": "w20"},
        {"instruction": "w10", "context": "", "response": "w20"},
        {"instruction": "w10", "input": "", "output": "w20", "history": []},
    ],
)
def test_names_of_instructions(tmp_path, tokenizer, row):
    example, report = one(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert report["layout"] == "alpaca" and learned(example) == [20, tokenizer.eos_token_id]
    assert report["unused"] == (["category"] if "category" in row else [])


def test_instruction_fields_that_change_the_prompt(tmp_path, tokenizer):
    row = {"instruction": "w10", "context": "w11", "output": "w20", "system": "w12"}
    example, _ = one(write(tmp_path / "a.jsonl", [row]), tokenizer)
    assert example.input_ids[0] == 12 and 11 in example.input_ids
    row["history"] = [["w13", "w14"]]
    with pytest.raises(LigerError, match="history"):
        one(write(tmp_path / "a.jsonl", [row]), tokenizer)


def test_one_end_and_one_start(tmp_path, tokenizer):
    """A text that has its end token already gets no second one; the start token is the tokenizer's."""
    example, _ = one(write(tmp_path / "a.jsonl", [{"text": "w4 <eos>"}]), tokenizer)
    assert example.input_ids.tolist() == [4, 2]
    example, _ = one(write(tmp_path / "a.jsonl", [{"instruction": "w10", "output": "w20 <eos>"}]), tokenizer)
    assert learned(example) == [20, 2]
