"""Text that a model writes itself: from its own distribution, of the wanted shape, in its tokenizer's form."""

import torch

from liger_cli.calibration import own_text as module
from liger_cli.calibration.own_text import openings, own_text
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.tokenizer import load_tokenizer
from liger_cli.commands.convert import convert
from liger_cli.shipped import BASE_DIR


def tiny(tiny_base, sharpness=40.0):
    """A random model that prefers few tokens, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tiny_base(tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model, load_tokenizer(folder, model.config)


def test_it_is_the_models_own_distribution(tiny_base):
    """Second tokens as often as the model has it, whatever its generation_config.json would do to them."""
    model, tokenizer = tiny(tiny_base)
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=2.0, max_length=5)
    before = model.generation_config
    rows = own_text(model, tokenizer, 3000, 2, seed=1)
    assert rows[:, 0].unique().tolist() == [tokenizer.bos_token_id]
    with torch.no_grad():
        wanted = model(rows[:1, :1]).logits[0, 0].softmax(-1)
    found = torch.bincount(rows[:, 1], minlength=128) / len(rows)
    assert wanted.max() < 0.9
    assert float((found - wanted).abs().sum()) / 2 < 0.06  # total variation; about 0.02 by chance alone
    assert model.generation_config is before


def test_seeds_and_shapes(tiny_base, monkeypatch):
    """A seed gives the same rows, another seed others; rows are written in as many goes as memory asks for."""
    model, tokenizer = tiny(tiny_base)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    rows = own_text(model, tokenizer, 5, 30, seed=2)
    assert torch.equal(torch.rand(1), expected), "torch's own generator was touched"
    assert rows.shape == (5, 30) and rows.dtype == torch.int64
    assert torch.equal(rows, own_text(model, tokenizer, 5, 30, seed=2))
    assert not torch.equal(rows, own_text(model, tokenizer, 5, 30, seed=3))
    assert len({tuple(row) for row in rows.tolist()}) == 5
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * 30 * 4 * (2 * 4 * 2 * 16))  # two rows of 30 tokens in float32
    pieces = own_text(model, tokenizer, 5, 30, seed=2)
    assert pieces.shape == (5, 30) and torch.equal(pieces[:2], own_text(model, tokenizer, 2, 30, seed=2))
    assert own_text(model, tokenizer, 2, 1).tolist() == [[1], [1]]


def test_documents_follow_one_another(tiny_base):
    """Without a chat template: after an end token comes the token that texts begin with, and the row goes on."""
    model, tokenizer = tiny(tiny_base, sharpness=1.0)  # nearly every token is as likely as the next
    tokenizer.chat_template = None
    rows = own_text(model, tokenizer, 16, 100).tolist()
    followers = [row[i + 1] for row in rows for i in range(99) if row[i] == tokenizer.eos_token_id]
    assert len(followers) > 3 and set(followers) == {tokenizer.bos_token_id}
    tokenizer.bos_token = None
    assert openings(tokenizer) == ([tokenizer.eos_token_id], [[]])


def test_conversations(tiny_base, tmp_path):
    """With a chat template both sides take turns, each opened as the template has it; any attention mode writes."""
    folder = tiny_base(tie_word_embeddings=False)
    convert(str(folder), str(tmp_path / "out"))
    model, tokenizer = load_model(tmp_path / "out", dtype=torch.float32).eval(), load_tokenizer(folder)
    model.set_attention_mode("softmax")
    tokenizer.chat_template = (
        "w9 {% for message in messages %}{{ {'user': 'w100 w101 ', 'assistant': 'w110 '}[message.role] }}"
        "{{ message.content }} <eos> {% endfor %}"
    )
    assert openings(tokenizer) == ([9, 100, 101], [[2, 110], [2, 100, 101]])
    rows = own_text(model, tokenizer, 16, 150, seed=0).tolist()  # an end in 128 tokens, or nearly
    ends = 0
    for row in rows:
        assert row[:3] == [9, 100, 101]
        places = [place for place, token in enumerate(row[:147]) if token in (0, 1, 2, 3) and place > 2]
        places = [place for place in places if row[place - 1] not in (0, 1, 3)]
        for turn, place in enumerate(places):
            end = row[place : place + 4]
            wanted = [[2, 110], [2, 100, 101]][turn % 2]
            wanted = wanted if end[0] == 2 else [end[0], *wanted]
            assert end[: len(wanted)] == wanted, (row, place)
            ends += 1
    assert ends > 5


def test_a_template_that_changes_what_is_said_is_not_used():
    tokenizer = load_tokenizer(BASE_DIR, None)
    tokenizer.bos_token = None
    for template in ("{{ messages[0].content | length }}", "{{ raise_exception('system first') }}", "{{ 1 / 0 }}"):
        tokenizer.chat_template = template
        assert openings(tokenizer) == ([tokenizer.eos_token_id], [[]])
