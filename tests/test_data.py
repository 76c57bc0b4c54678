"""Sources, layouts and labels of `liger_cli.data`."""

import json

import numpy as np
import pytest

from liger_cli.data import (
    IGNORED,
    chat_segments,
    load_data,
    parse_sources,
)
from liger_cli.errors import LigerError, ModelError, UsageError


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
    assert report["layout"] == layout
    assert example.input_ids.tolist() == [10, 20, 11, 21, 22, tokenizer.eos_token_id]
    assert learned(example) == [20, 21, 22, tokenizer.eos_token_id]


def test_template_that_rewrites_earlier_turns_gives_one_document_a_turn(tokenizer):
    class Rewriting:
        chat_template = "yes"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            texts = [f"[{m['role'][0]}:{m['content']}]" for m in messages]
            if messages[-1]["role"] == "assistant":
                texts[-1] = f"[a:<think>{messages[-1]['content']}]"
            return "".join(texts) + ("[a:" if add_generation_prompt else "")

    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert chat_segments(messages, Rewriting()) == [
        [("[u:1][a:", False), ("<think>2]", True)],
        [("[u:1][a:2][u:3][a:", False), ("<think>4]", True)],
    ]


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
        "field.jsonl": (json.dumps({"instruction": "w4", "output": None}) + "\n", LigerError, "example 1"),
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
