"""Recall probes of the shipped base's own world, by the distance in tokens. Likelihoods hide what they show."""

from dataclasses import dataclass
from random import Random

from liger_cli.checkpoint.tokenizer import token_ids
from liger_cli.shipped.probes import guessed_tokens, recall_probe
from liger_cli.shipped.text import NAMES, TEST_SEED, Story, sample_facts

KINDS = ("single", "key_value", "multi", "copy")
PAIRS = 4  # facts of the key_value and multi probes
COPIED = 8  # tokens scored at the end of a copy


@dataclass(frozen=True)
class Probe:
    """Tokens, and where the answers stand in them.

    Attributes:
        tokens: prompt and answers, token ids.
        spans: (first, last + 1) of each answer; the last answer ends the tokens.
    """

    tokens: list[int]
    spans: tuple[tuple[int, int], ...]


def make_probes(kind: str, tokenizer, distance: int, count: int, seed: int = TEST_SEED) -> list[Probe]:
    """Held-out probes of one kind.

    Kinds:
        single, key_value: one, or four, key-value facts, filler prose, and the question for one of them; `distance`
            tokens lie between the end of the stated value and the start of the answer (`recall_probe`).
        multi: four facts, filler, and the question for every one of them in another order; right only where all four
            are. `distance` tokens of filler and questions lie before the first answer.
        copy: a list of names and things of `distance` tokens, and the list once more; its last tokens are scored.
    Raises:
        ValueError: the distance is too short for this kind.
    """
    if kind in ("single", "key_value"):
        probes = recall_probe(tokenizer, distance, count, seed, 1 if kind == "single" else PAIRS)
        return [Probe(prompt + answer, ((len(prompt), len(prompt) + len(answer)),)) for prompt, answer in probes]
    make = {"multi": _multi_probe, "copy": _copy_probe}[kind]
    rng = Random(seed * 1013 + distance)
    return [make(rng, tokenizer, distance) for _ in range(count)]


def _multi_probe(rng: Random, tokenizer, distance: int) -> Probe:
    names = rng.sample(NAMES, len(NAMES))
    facts = sample_facts(rng, PAIRS, names[3:])
    story = Story(rng, names[:3])
    tokens = _start(tokenizer) + token_ids(tokenizer, story.opening())
    for fact in facts:
        tokens += token_ids(tokenizer, f" {fact.statement}")
    stated = len(tokens)
    asked = rng.sample(facts, PAIRS)
    questions = [token_ids(tokenizer, f" {fact.question} {fact.prefix}") for fact in asked]
    if distance < len(questions[0]):
        raise ValueError(f"no multi probe fits into a distance of {distance} tokens")
    filler: list[int] = []
    while len(filler) < distance - len(questions[0]):
        filler += token_ids(tokenizer, f" {story.sentence()}")
    tokens += filler[len(filler) - (distance - len(questions[0])) :]
    assert len(tokens) == stated + distance - len(questions[0])
    spans = []
    for fact, question in zip(asked, questions, strict=True):
        tokens += question
        answer = token_ids(tokenizer, f" {fact.value}")
        spans.append((len(tokens), len(tokens) + len(answer)))
        tokens += answer
        if fact is not asked[-1]:
            tokens += token_ids(tokenizer, f"{fact.tail}.")
    return Probe(tokens, tuple(spans))


def _copy_probe(rng: Random, tokenizer, distance: int) -> Probe:
    passage: list[int] = []
    while len(passage) < distance:
        fact = sample_facts(rng, 1, rng.sample(NAMES, 1))[0]
        passage += token_ids(tokenizer, f" {fact.statement}")
    passage = passage[:distance]
    tokens = _start(tokenizer) + passage + passage
    return Probe(tokens, ((len(tokens) - min(COPIED, distance // 2), len(tokens)),))


def _start(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def teacher_forced(model, probes: list[Probe], tokenizer) -> int:
    """How many probes have every answer token as the argmax, in one pass over them all."""
    positions = [[i - 1 for first, last in probe.spans for i in range(first, last)] for probe in probes]
    guesses = guessed_tokens(model, [probe.tokens for probe in probes], positions, tokenizer)
    return sum(
        guess == [probe.tokens[position + 1] for position in row]
        for guess, row, probe in zip(guesses, positions, probes, strict=True)
    )


def generated(model, probes: list[Probe], tokenizer) -> int:
    """How many last answers greedy decoding writes exactly; prompts are padded on the left, as `generate` wants."""
    import torch

    prompts = [probe.tokens[: probe.spans[-1][0]] for probe in probes]
    answers = [probe.tokens[probe.spans[-1][0] :] for probe in probes]
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        written = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )[:, width:].tolist()
    return sum(row[: len(answer)] == answer for row, answer in zip(written, answers, strict=True))
