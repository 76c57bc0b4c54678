"""Held-out evaluation of any causal language model: recall over a chosen distance, and perplexity."""

import math
from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from liger_cli.checkpoint.tokenizer import put_before, token_ids
from liger_cli.shipped.text import NAMES, TEST_SEED, Story, documents, sample_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DISTANCES = (16, 32, 64, 128, 256, 512, 768)

Probe = tuple[list[int], list[int]]


def recall_probe(
    tokenizer: "PreTrainedTokenizerBase", distance: int, count: int, seed: int = TEST_SEED, pairs: int = 4
) -> list[Probe]:
    """Documents that state `pairs` key-value facts, go on with filler prose and ask for one of them.

    Args:
        distance: tokens between the end of the stated value and the start of the answer, hit exactly. A window of w
            tokens, the newest included, no longer holds the last token of the value when distance >= w.
        count: number of probes.
        seed: from 2**31 up for held-out probes.
        pairs: facts in the document, 1 to 37, as many as there are free names; the base was trained on up to 16. Which
            of them is asked for is random, as far as the facts after it fit into the distance.

    Returns:
        `count` pairs (prompt token ids, answer token ids). Sentences are tokenized one by one.

    Raises:
        ValueError: the distance is too short for any question (below 12 or so), or there are too many pairs.
    """
    rng = Random(seed * 1009 + distance)
    ids, start = partial(token_ids, tokenizer), put_before(tokenizer)
    return [_probe(ids, distance, pairs, rng, start) for _ in range(count)]


def _probe(ids: Callable[[str], list[int]], distance: int, pairs: int, rng: Random, start: list[int]) -> Probe:
    for _ in range(500):
        names = rng.sample(NAMES, len(NAMES))
        story = Story(rng, names[:3])
        facts = sample_facts(rng, pairs, names[3:], len(names))
        asked = rng.randrange(pairs)
        fact = facts[asked]
        tail = ids(f"{fact.tail}.")
        later = [token for other in facts[asked + 1 :] for token in ids(f" {other.statement}")]
        question = ids(f" {fact.question} {fact.prefix}")
        filler = fill(
            lambda story=story: ids(f" {story.sentence()}"), distance - len(tail) - len(later) - len(question)
        )
        if filler is None:
            continue
        before = "".join(f" {other.statement}" for other in facts[:asked])
        prompt = ids(f"{story.sentence()}{before} {fact.prefix}")
        answer = ids(f" {fact.value}")
        return start + prompt + answer + tail + later + filler + question, answer
    raise ValueError(f"no probe with {pairs} facts fits into a distance of {distance} tokens")


def fill(write: Callable[[], list[int]], room: int) -> list[int] | None:
    """Pieces of filler that take exactly `room` tokens, or None; `write` makes the tokens of the next piece."""
    if room <= 0:
        return [] if room == 0 else None
    filler: list[int] = []
    while room >= 32:
        piece = write()
        filler += piece
        room -= len(piece)
    sums: dict[int, list[int]] = {0: []}
    for _ in range(40):
        piece = write()
        for total, tokens in list(sums.items()):
            sums.setdefault(total + len(piece), tokens + piece)
        if room in sums:
            return filler + sums[room]
    return None


def evaluate_recall(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    distances: tuple[int, ...] = DISTANCES,
    count: int = 64,
    seed: int = TEST_SEED,
    batch_size: int = 16,
    pairs: int = 4,
) -> dict[int, float]:
    """Share of recall probes answered exactly, by distance in tokens.

    One teacher-forced pass a batch: an answer counts when the argmax is right at every answer token, which is the same
    as an exact match of greedy generation. Guessing among the facts of the document scores 1 / pairs.

    Args:
        model: a causal language model that takes `input_ids` [B, T] and `logits_to_keep`, on any device.
        distances, count, seed, pairs: see `recall_probe`; `count` probes for each distance.
        batch_size: sequences a pass.
    """
    accuracy = {}
    for distance in distances:
        probes = recall_probe(tokenizer, distance, count, seed, pairs)
        right = sum(
            _answered(model, probes[index : index + batch_size], tokenizer) for index in range(0, count, batch_size)
        )
        accuracy[distance] = right / count
    return accuracy


def guessed_tokens(model, rows: list[list[int]], positions: list, tokenizer) -> list[list[int]]:
    """The model's most likely token after each asked position, in one pass; only those logits are made.

    Args:
        rows: B lists of token ids, of any lengths.
        positions: for every row, the 0-based positions whose next token is guessed.
    Returns:
        For every row, the guesses in the order of its positions.
    """
    import torch

    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    # Padding stands on the right, where a causal model does not see it.
    tensors = [torch.tensor(row) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)  # [B, T]
    wanted = sorted({position for row in positions for position in row})
    column = {position: index for index, position in enumerate(wanted)}
    with torch.inference_mode():
        logits = model(
            input_ids=input_ids.to(model.device),
            logits_to_keep=torch.tensor(wanted, device=model.device),
            use_cache=False,
        ).logits  # [B, len(wanted), V]
    guesses = logits.argmax(-1).tolist()
    return [[guess[column[position]] for position in row] for guess, row in zip(guesses, positions, strict=True)]


def _answered(model, probes: list[Probe], tokenizer) -> int:
    rows = [prompt + answer for prompt, answer in probes]
    positions = [range(len(prompt) - 1, len(prompt) + len(answer) - 1) for prompt, answer in probes]
    guesses = guessed_tokens(model, rows, positions, tokenizer)
    return sum(guess == answer for guess, (_, answer) in zip(guesses, probes, strict=True))


def held_out_text(
    characters: int, seed: int = TEST_SEED, kinds: tuple[str, ...] = ("story", "facts"), max_words: int = 600
) -> list[str]:
    """Documents the base never saw, `characters` characters or a little more in all."""
    texts: list[str] = []
    total = 0
    for text in documents(seed, kinds, max_words=max_words):
        if total >= characters:
            return texts
        texts.append(text)
        total += len(text)


def perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    seq_len: int = 1024,
    batch_size: int = 8,
) -> float:
    """exp of the mean next-token cross-entropy (nats a token) over the texts.

    The texts are joined by the end token and cut into rows of `seq_len` tokens; every token but the first of a row is
    predicted. An incomplete last row is dropped.

    Raises:
        ValueError: the texts hold fewer than `seq_len` tokens.
    """
    import torch
    import torch.nn.functional as F

    ids: list[int] = []
    for text in texts:
        ids += token_ids(tokenizer, text)
        ids.append(tokenizer.eos_token_id)
    rows = torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)
    if not len(rows):
        raise ValueError(f"{len(ids)} tokens of text do not fill one row of {seq_len}; pass more text")
    total = 0.0
    with torch.inference_mode():
        for batch in rows.split(batch_size):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits  # [B, T, V]
            total += F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(total / (len(rows) * (seq_len - 1)))
