"""The shipped base: its generator, its probes and the bars its checkpoint has to meet."""

import json
import re
from itertools import islice
from random import Random

import pytest

from liger_cli.shipped import BASE_DIR, PROSE_DIR, prose
from liger_cli.shipped.probes import DISTANCES, evaluate_recall, held_out_text, perplexity, recall_probe
from liger_cli.shipped.text import (
    KINDS,
    NAMES,
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    documents,
    held_out,
    instructions,
    render_chat,
    sample_facts,
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_generator_is_deterministic_and_seeds_differ(kind):
    first, again, other = (set(islice(documents(seed, (kind,)), 50)) for seed in (5, 5, TEST_SEED))
    assert first == again
    assert not first & other


def test_seed_halves():
    assert not held_out(TRAIN_SEED)
    assert held_out(VALIDATION_SEED) and held_out(TEST_SEED)


def test_documents_keep_to_the_length_asked_for():
    for kind in KINDS:
        for text in islice(documents(3, (kind,), min_words=200, max_words=200), 20):
            assert 150 <= len(text.split()) <= 260, (kind, text)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="poem"):
        next(documents(0, ("poem",)))


def test_every_question_of_a_recall_document_is_answered_by_its_facts():
    for text in islice(documents(8, ("recall",)), 30):
        for answer in re.findall(r"\? ([^.]+\.)", text):  # a character's question ends with ?"
            assert text.count(answer) >= 2


def test_facts_have_distinct_keys_and_values():
    facts = sample_facts(Random(0), 16, NAMES)
    assert len({fact.prefix for fact in facts}) == len({fact.value for fact in facts}) == 16
    with pytest.raises(ValueError, match="17"):
        sample_facts(Random(0), 17, NAMES)
    for seed in range(20):  # one relation has too few values for these
        assert len({fact.value for fact in sample_facts(Random(seed), 32, NAMES, 40)}) == 32


def test_instructions_and_their_chat_format_agree_with_the_template(tokenizer):
    record = next(instructions(TEST_SEED))
    prompt, output = render_chat(record).split("<|assistant|>")
    messages = [
        {"role": "user", "content": prompt.removeprefix("<|user|>")},
        {"role": "assistant", "content": output},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == render_chat(record) + tokenizer.eos_token
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) in rendered


@pytest.mark.parametrize("pairs", (1, 4, 16))
@pytest.mark.parametrize("distance", DISTANCES)
def test_probe_distance_is_exact(tokenizer, distance, pairs):
    for prompt, answer in recall_probe(tokenizer, distance, 5, pairs=pairs):
        end = len(prompt) - distance
        assert prompt[end - len(answer) : end] == answer
        assert answer == tokenizer(tokenizer.decode(answer), add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(prompt)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == prompt


def test_probe_too_short_for_a_question(tokenizer):
    with pytest.raises(ValueError, match="distance of 3 tokens"):
        recall_probe(tokenizer, 3, 1)


def test_tokenizer_reads_back_any_text(tokenizer):
    for text in ("Mia put the red box in the kitchen.", "naïve 東京 \n\t x=1"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2
    assert all(len(tokenizer(f" {name}")["input_ids"]) == 1 for name in NAMES)


def test_checkpoint_is_small_and_qwen3():
    assert sum(path.stat().st_size for path in BASE_DIR.rglob("*")) <= 8 * 2**20
    assert json.loads((BASE_DIR / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_parameters(model):
    assert 2e6 <= model.num_parameters() <= 4e6


def test_perplexity(model, tokenizer):
    assert 1.5 < perplexity(model, tokenizer, held_out_text(60_000)) < 4


@pytest.mark.parametrize("distance", (128, 256, 512))
def test_recall_beyond_the_window(model, tokenizer, distance):
    assert evaluate_recall(model, tokenizer, (distance,), count=50)[distance] > 0.9


def test_teacher_forced_recall_is_greedy_recall(model, tokenizer):
    import torch

    probes = recall_probe(tokenizer, 64, 8)
    greedy = 0
    for prompt, answer in probes:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False)
        greedy += out[0, len(prompt) :].tolist() == answer
    assert evaluate_recall(model, tokenizer, (64,), count=8, batch_size=3)[64] == greedy / 8


def test_perplexity_needs_a_full_row(model, tokenizer):
    with pytest.raises(ValueError, match="do not fill"):
        perplexity(model, tokenizer, ["Mia ran."])


def test_prose_is_prose():
    """Two different documents, long enough for many rows, without the marks of the editions they were taken from."""
    texts = prose()
    assert [len(text) > 100_000 for text in texts] == [True, True]
    for text in texts:
        assert not any(mark in text for mark in ("_", "[Illustration", "Gutenberg", "\r", "  "))
        paragraphs = text.split("\n\n")
        assert all(paragraph.strip() and "\n" not in paragraph.strip("\n") for paragraph in paragraphs)
        assert len(set(paragraphs)) > 0.98 * len(paragraphs)
    source = (PROSE_DIR / "README.md").read_text("utf-8")
    assert all(path.name in source for path in PROSE_DIR.glob("*.txt")) and "public domain" in source
