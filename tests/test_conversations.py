"""Conversations: which tokens are the assistant's, in templates of every kind, and which messages can be read."""

import json
from itertools import groupby

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from liger_cli.shipped import BASE_DIR
from liger_cli.system.errors import LigerError, ModelError
from liger_cli.training import data as data_module
from liger_cli.training.data import IGNORED, load_data

END = "<|endoftext|>"
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    # The end token once, after the last message.
    "end last": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    # Reasoning in the last answer only.
    "reasoning": "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think></think>' }}{% endif %}{{ m.content|trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    # The system text before the last message where that is the user's; no prompt of its own; a space before answers.
    "late system": "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST]' }}{% if loop.last and system %}"
    "{{ system + '\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content|trim + eos_token }}"
    "{% endif %}{% endfor %}",
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "marked": "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "no end": "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ONE = [user("Where?"), assistant("Here.")]
TWO = [*ONE, user("And now?"), assistant("s")]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO]
GREETED = [assistant("Hello!"), *ONE]
# What is trained on stands in brackets; a row of several answers may become several documents.
WANTED = {
    ("chatml", "two"): [
        "<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>]\n<|user|>And now?<|end|>\n<|assistant|>[s<|end|>]\n"
    ],
    ("chatml", "greeted"): ["<|assistant|>[Hello!<|end|>]\n<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>]\n"],
    ("end last", "one"): [f"<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>\n{END}]"],
    ("end last", "two"): [
        f"<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>\n{END}]",
        f"<|user|>Where?<|end|>\n<|assistant|>Here.<|end|>\n<|user|>And now?<|end|>\n<|assistant|>[s<|end|>\n{END}]",
    ],
    ("reasoning", "two"): [
        "<|user|>Where?<|end|>\n<|assistant|>[<think></think>Here.<|end|>]\n",
        "<|user|>Where?<|end|>\n<|assistant|>Here.<|end|>\n<|user|>And now?<|end|>\n"
        "<|assistant|>[<think></think>s<|end|>]\n",
    ],
    ("late system", "two"): [f"[INST]Where?[/INST][ Here.{END}][INST]And now?[/INST][ s{END}]"],
    ("late system", "system"): [
        f"[INST]Be brief.\nWhere?[/INST][ Here.{END}]",
        f"[INST]Where?[/INST] Here.{END}[INST]Be brief.\nAnd now?[/INST][ s{END}]",
    ],
    ("strict", "greeted"): ["<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>]\n"],
    ("marked", "two"): [f"<|user|>Where?<|assistant|>[Here.{END}]<|user|>And now?<|assistant|>[s{END}]"],
    ("no end", "one"): [f"user:\nWhere?\nassistant:\n[Here.\n{END}]"],
}  # fmt: skip
CHATS = {"one": ONE, "two": TWO, "system": SYSTEM, "greeted": GREETED}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_DIR)


def loaded(tmp_path, tokenizer, *rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_data(str(tmp_path / "a.jsonl"), tokenizer, 256, held_out=0)


def shown(example, tokenizer):
    """The text of an example, with what is trained on in brackets."""
    text = ""
    for trained, pairs in groupby(zip(example.input_ids, example.labels, strict=True), lambda pair: pair[1] != IGNORED):
        part = tokenizer.decode([int(one) for one, _ in pairs])
        text += f"[{part}]" if trained else part
    return text


@pytest.mark.parametrize(("template", "chat"), WANTED)
def test_the_template_tells_what_the_assistant_says(tmp_path, tokenizer, template, chat):
    tokenizer.chat_template = TEMPLATES[template]
    found = loaded(tmp_path, tokenizer, {"messages": CHATS[chat]})
    assert [shown(example, tokenizer) for example in found.train] == WANTED[template, chat]
    if chat == "greeted":  # nothing prompts for it
        return
    prompts = [
        tokenizer.apply_chat_template(CHATS[chat][:count], tokenize=False, add_generation_prompt=True)
        for count, message in enumerate(CHATS[chat])
        if message["role"] == "assistant"
    ]
    for example in found.train:
        first = int((example.labels != IGNORED).argmax())
        assert tokenizer.decode(example.input_ids[:first]) in prompts


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_offsets_the_same_tokens(tmp_path, tokenizer, template, monkeypatch):
    tokenizer.chat_template = TEMPLATES[template]
    rows = [{"messages": TWO}, {"prompt": "Where?", "completion": " Here."}]
    wanted = loaded(tmp_path, tokenizer, *rows[:1]).train + loaded(tmp_path, tokenizer, *rows[1:]).train
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    found = loaded(tmp_path, tokenizer, *rows[:1]).train + loaded(tmp_path, tokenizer, *rows[1:]).train
    assert [one.input_ids.tolist() for one in found] == [one.input_ids.tolist() for one in wanted]
    if template == "marked":  # offsets are what the marks need
        assert all((one.labels != IGNORED).any() for one in found)
    else:
        assert [shown(one, tokenizer) for one in found] == [shown(one, tokenizer) for one in wanted]


def test_a_template_that_rewrites_answers_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}{{ messages|length }}"
    with pytest.raises(LigerError, match="does not show where an answer begins: 1"):
        loaded(tmp_path, tokenizer, {"messages": ONE})


def test_a_tokenizer_without_a_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        loaded(tmp_path, tokenizer, {"messages": ONE})


@pytest.fixture
def sentencepiece():
    """A tokenizer that puts a space before every text, as Llama 2's, Mistral's and Phi-3's do."""
    marks = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    special = marks + [f"<0x{byte:02X}>" for byte in range(256)]
    raw.train_from_iterator(
        ["Where", "Here.", "And now"] * 9, trainers.BpeTrainer(vocab_size=330, special_tokens=special)
    )
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": marks[3:]}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return made


def test_a_text_is_tokenized_whole(tmp_path, sentencepiece):
    (example,) = loaded(tmp_path, sentencepiece, {"messages": TWO}).train
    assert example.input_ids.tolist() == sentencepiece.apply_chat_template(TWO, tokenize=True, return_dict=False)
    assert shown(example, sentencepiece) == (
        "<s><|user|>\nWhere?</s><|assistant|>\n[Here.</s>]<|user|>\nAnd now?</s><|assistant|>\n[s</s>]"
    )
    for row in ({"instruction": "Where?", "output": "Here."}, {"prompt": "Where?\n", "completion": "Here."}):
        (example,) = loaded(tmp_path, sentencepiece, row).train
        text = shown(example, sentencepiece)
        assert text.endswith("\n[Here.</s>]") and text.startswith("<s>") and "\n Here" not in text
        assert example.input_ids.tolist().count(1) == example.input_ids.tolist().count(2) == 1


def test_tokens_that_their_tokenizer_trims(tokenizer):
    """Offsets leave out a token's leading spaces; a token of spaces only has none left, and is still in its span."""
    assert data_module._in_spans([(0, 3), (4, 9), (10, 10), (11, 14)], [(3, 10)]) == [False, True, True, False]


NAMES = [
    ("from", "value", "human", "gpt"), ("from", "value", "Human", "chatgpt"), ("from", "value", "user", "model"),
    ("role", "content", "User", "Assistant"), ("role", "text", "prompter", "assistant"),
    ("speaker", "text", "USER:", "AI"),
    ("from", "value", "human", "gpt-4"), ("from", "content", "customer", "agent"),
    ("role", "value", "question", "answer"),
]  # fmt: skip
COLUMNS = ("messages", "conversations", "conversation", "dialogue", "turns", "items")


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("form", [list, json.dumps])
def test_names_that_people_use(tmp_path, tokenizer, names, form):
    tokenizer.chat_template = TEMPLATES["chatml"]
    role, content, asks, says = names
    turns = [{role: asks, content: "Where?"}, {role: says, content: "Here."}]
    column = COLUMNS[NAMES.index(names) % len(COLUMNS)]
    (example,) = loaded(tmp_path, tokenizer, {column: form(turns)}).train
    assert shown(example, tokenizer) == "<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>]\n"


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"human": "Where?", "assistant": "Here."}]},
        {"prompt": [user("Where?")], "completion": [assistant("Here.")]},
        {"prompt": [user("Where?")], "response": "Here."},
        {"prompt": json.dumps([user("Where?")]), "completion": json.dumps([assistant("Here.")])},
        {
            "messages": [
                {**user(""), "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ere?"}]},
                ONE[1],
            ]
        },
        {"messages": [*ONE, user("And now?")]},
    ],
)
def test_forms_that_people_use(tmp_path, tokenizer, row):
    tokenizer.chat_template = TEMPLATES["chatml"]
    found = loaded(tmp_path, tokenizer, row)
    assert [shown(one, tokenizer) for one in found.train] == ["<|user|>Where?<|end|>\n<|assistant|>[Here.<|end|>]\n"]
    assert not found.report[0]["skipped"] and not found.report[0]["unused"]


def test_answers_of_a_prompt_are_not_learned(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"]
    (example,) = loaded(tmp_path, tokenizer, {"prompt": TWO[:3], "completion": TWO[3:]}).train
    assert shown(example, tokenizer).count("[") == 1 and shown(example, tokenizer).endswith("[s<|end|>]\n")


@pytest.mark.parametrize("template", ["chatml", "marked", "end last"])
@pytest.mark.parametrize("flags", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0.0}])
def test_answers_that_are_not_to_be_learned(tmp_path, tokenizer, template, flags):
    tokenizer.chat_template = TEMPLATES[template]
    turns = [user("Where?"), assistant("Here.", **flags), user("And now?"), assistant("s", weight=1)]
    found = loaded(tmp_path, tokenizer, {"messages": turns})
    (example,) = found.train
    text = shown(example, tokenizer)
    assert text.count("[") == 1 and "assistant|>Here." in text and "assistant|>[s" in text
    assert not found.report[0]["unused"]


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES["strict"]
    found = loaded(
        tmp_path,
        tokenizer,
        {"messages": ONE},
        {"messages": [user("Where?")]},
        {"messages": [user("Where?"), {"role": "narrator", "content": "x"}]},
        {"messages": [user("Where?"), user("Where?"), assistant("Here.")]},
        {"messages": [user("Where?"), assistant("Here.", weight=0.5)]},
        {"messages": [user("Where?"), {"content": "Here."}]},
        {"messages": [{**user("x"), "content": [{"type": "image"}]}, assistant("Here.")]},
        {"messages": [user("Where?"), assistant("  ")]},
        {"messages": None},
        {"messages": "words"},
        {"messages": [user("\ud800"), assistant("Here.")]},
    )
    assert len(found.train) == 1
    assert found.report[0]["skipped"] == {
        "no list of messages": 2,
        "no assistant turn": 1,
        "the role 'narrator' is not known": 1,
        "the chat template fails on it (roles must alternate)": 1,
        "a message whose weight is 0.5, not 0 or 1": 1,
        "a message without a role (its fields are content)": 1,
        "a message with a part that is no text": 1,
        "no answer to learn": 1,
        "no text (half a surrogate pair)": 1,
    }


def test_fields_are_honoured_or_named(tmp_path, tokenizer):
    """What a template knows reaches it; what nothing takes note of is named."""
    row = {
        "messages": [user("Where?"), assistant("Here.", mood="glad", reasoning_content="r")],
        "chat_template_kwargs": {"style": "x", "tokenize": 1}, "system": "Be brief.", "tools": '[{"name": "t"}]',
        "score": 0.3, "empty": None,
    }  # fmt: skip
    tokenizer.chat_template = TEMPLATES["chatml"]
    found = loaded(tmp_path, tokenizer, row)
    assert found.report[0]["unused"] == [
        "mood of messages", "reasoning_content of messages", "score", "style of chat_template_kwargs",
        "tokenize of chat_template_kwargs", "tools",
    ]  # fmt: skip
    assert "<|system|>Be brief." in shown(found.train[0], tokenizer)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}{{ style }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.reasoning_content %}{{ m.reasoning_content + '/' }}{% endif %}{{ m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    found = loaded(tmp_path, tokenizer, row)
    assert found.report[0]["unused"] == ["mood of messages", "score", "tokenize of chat_template_kwargs"]
    assert shown(found.train[0], tokenizer) == (
        "tx<|system|>Be brief.<|end|><|user|>Where?<|end|><|assistant|>[r/Here.<|end|>]"
    )


def test_tool_calls(tmp_path, tokenizer):
    """Arguments that are JSON become objects; a call is an answer only where the template writes it."""
    call = {"type": "function", "function": {"name": "look", "arguments": '{"where": "box"}'}}
    turns = [user("Where?"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "3"}, assistant("Here.")]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + ' ' + call.function.arguments.where }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    (example,) = loaded(tmp_path, tokenizer, {"messages": turns}).train
    assert shown(example, tokenizer) == (
        "<|user|>Where?<|end|><|assistant|>[look box<|end|>]<|tool|>3<|end|><|assistant|>[Here.<|end|>]"
    )
    tokenizer.chat_template = TEMPLATES["chatml"]
    found = loaded(tmp_path, tokenizer, {"messages": turns})
    assert found.report[0]["unused"] == ["tool_calls of messages"]
    assert shown(found.train[0], tokenizer).count("[") == 1
