"""Trains the shipped base model from nothing: tokenizer, model, held-out evaluation, model card.

    python -m liger_cli.shipped.train_base --output DIR

An interrupted run goes on from `DIR/training_state.pt`. The shipped checkpoint took 9.0 M tokens and 31 minutes on two
shared CPU cores with avx512_bf16 (one resumption), and reached, on held-out seeds, a perplexity of 2.36 and a recall of
0.995 or more at every distance from 16 to 768 tokens among 1, 4 and 16 facts; `base/README.md` has the table.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from liger_cli.shipped.probes import DISTANCES, evaluate_recall, held_out_text, perplexity
from liger_cli.shipped.text import (
    ASSISTANT_TOKEN,
    NAMES,
    TEST_SEED,
    TRAIN_SEED,
    USER_TOKEN,
    VALIDATION_SEED,
    document,
    documents,
)

END_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """A stretch of the training: short documents dense in questions first, because recall forms there soonest.

    tokens: of the whole stage; seq_len: tokens a row; batch_tokens: tokens an optimizer step; kinds: weights of the
    kinds of documents; other_weight: loss weight of tokens that are not part of an answer.
    """

    tokens: int
    seq_len: int
    batch_tokens: int
    kinds: dict[str, float]
    other_weight: float


CURRICULUM = (
    Stage(1_440_000, 64, 4096, {"drill": 1.0}, 0.1),
    Stage(1_200_000, 128, 4096, {"drill": 0.6, "recall": 0.4}, 0.1),
    Stage(2_000_000, 256, 4096, {"recall": 0.5, "drill": 0.1, "facts": 0.15, "story": 0.2, "chat": 0.05}, 0.3),
    Stage(2_000_000, 512, 8192, {"recall": 0.45, "facts": 0.2, "story": 0.25, "chat": 0.1}, 0.5),
    Stage(2_360_000, 1024, 8192, {"recall": 0.4, "facts": 0.2, "story": 0.3, "chat": 0.1}, 0.5),
)
TOTAL_TOKENS = sum(stage.tokens for stage in CURRICULUM)
TOKENS_PER_WORD = 1.3


def build_tokenizer(vocab_size: int = 1024, num_documents: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on generated documents, with end, padding and chat tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN, USER_TOKEN, ASSISTANT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = documents(TRAIN_SEED)
    # Every name as often as common words, so that keys are single tokens.
    corpus = [next(stream) for _ in range(num_documents)] + [" " + " ".join(NAMES)] * num_documents
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The base with random weights: 2.9 M parameters, 6 layers, 4 query and 2 key/value heads of 64 channels."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def pack_rows(
    tokenizer: PreTrainedTokenizerFast, seed: int, count: int, seq_len: int, kinds: dict[str, float]
) -> torch.Tensor:
    """`count` rows of seq_len + 1 token ids: whole documents, each followed by the end token, then padding.

    The first document of a row is drawn over the row's whole length, the following ones over what is left.
    Attention crosses the documents of a row.
    """
    rng = Random(seed)
    rows: list[list[int]] = []
    for _ in range(count):
        row: list[int] = []
        misses = 0
        while misses < 3 and (room := int((seq_len - len(row)) / TOKENS_PER_WORD)) > 20:
            longest = not row and rng.random() < 0.4
            words = room - 12 if longest else rng.randint(min(30, room), room)
            ids = tokenizer(document(rng, kinds, words))["input_ids"] + [tokenizer.eos_token_id]
            if len(row) + len(ids) <= seq_len + 1:
                row += ids
            else:
                misses += 1
        rows.append(row + [tokenizer.pad_token_id] * (seq_len + 1 - len(row)))
    return torch.tensor(rows)


def loss_weights(tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor, other: float) -> torch.Tensor:
    """Weights [B, T] of the targets rows[:, 1:]: 1 in the sentence after a question, 0 on padding, else `other`."""
    question, stop = tokenizer.convert_tokens_to_ids(["?", "."])
    index = torch.arange(rows.shape[1]).expand_as(rows)
    last_question = index.where(rows == question, -1).cummax(1).values
    last_stop = index.where(rows == stop, -1).cummax(1).values
    # A target belongs to an answer when the last mark before it is a question mark.
    weights = torch.where(last_question > last_stop, 1.0, other)[:, :-1]
    return weights.masked_fill(rows[:, 1:] == tokenizer.pad_token_id, 0.0)


def build_optimizers(
    model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float, gain_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [
            {"params": [model.model.embed_tokens.weight], "lr": adam_lr},
            {"params": gains, "lr": gain_lr},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.05, momentum=0.95), adam]


def learning_rate_scale(step: int, progress: float, warmup: int = 40, decay: float = 0.4) -> float:
    """Warm-up over `warmup` steps, then constant, then a linear decay to zero over the last `decay` of the tokens."""
    return min(1.0, (step + 1) / warmup, (1 - progress) / decay)


def stage_at(seen: int) -> Stage:
    """The stage of the curriculum after `seen` training tokens."""
    end = 0
    for stage in CURRICULUM:
        end += stage.tokens
        if seen < end:
            return stage
    return CURRICULUM[-1]


def evaluate(model, tokenizer, characters: int, count: int, seed: int, distances=DISTANCES) -> dict:
    """Held-out story perplexity and recall by distance, both in float32."""
    model.eval()
    texts = held_out_text(characters, seed)
    result = {
        "perplexity": perplexity(model, tokenizer, texts),
        "recall": evaluate_recall(model, tokenizer, distances, count, seed),
    }
    model.train()
    return result


def accumulate_gradients(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: torch.Tensor,
    other_weight: float,
    micro_tokens: int,
) -> float:
    """Adds the gradients of the weighted mean loss over `rows` [B, T + 1], some `micro_tokens` at a time; the loss."""
    weights = loss_weights(tokenizer, rows, other_weight)
    weights /= weights.sum()
    size = max(1, micro_tokens // weights.shape[1])
    total = 0.0
    for batch, weight in zip(rows.split(size), weights.split(size), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        loss = losses @ weight.flatten()
        loss.backward()
        total += loss.item()
    return total


def train(args: argparse.Namespace) -> None:
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr, args.gain_lr)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    state_path = output / "training_state.pt"
    step, seen, seconds = 0, 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=False)
        step, seen, seconds = state["step"], state["seen"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    start, last_save = time.time() - seconds, time.time()
    log_loss, log_tokens, log_start = [], 0, time.time()
    while seen < TOTAL_TOKENS:
        stage = stage_at(seen)
        scale = learning_rate_scale(step, seen / TOTAL_TOKENS)
        for optimizer, lrs in zip(optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        rows = pack_rows(
            tokenizer, TRAIN_SEED + 1 + step, stage.batch_tokens // stage.seq_len, stage.seq_len, stage.kinds
        )
        log_loss.append(accumulate_gradients(model, tokenizer, rows, stage.other_weight, args.micro_tokens))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seen += stage.batch_tokens
        log_tokens += stage.batch_tokens
        if step % args.log_every == 0:
            rate, loss = log_tokens / (time.time() - log_start), sum(log_loss) / len(log_loss)
            print(
                f"step {step} tokens {seen / 1e6:.2f} M length {stage.seq_len} loss {loss:.3f} "
                f"{rate:.0f} tokens/s {time.time() - start:.0f} s",
                flush=True,
            )
            log_loss, log_tokens, log_start = [], 0, time.time()
        if step % args.eval_every == 0:
            result = evaluate(model, tokenizer, 60_000, 32, VALIDATION_SEED, (32, 64, 128, 256, 512, 768))
            print(json.dumps(result), flush=True)
            log_start, log_tokens = time.time(), 0
        if time.time() - last_save > args.save_seconds or seen >= TOTAL_TOKENS:
            state = {
                "step": step,
                "seen": seen,
                "seconds": time.time() - start,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            temporary = state_path.with_name(state_path.name + ".tmp")
            torch.save(state, temporary)
            os.replace(temporary, state_path)
            last_save = time.time()
    write_checkpoint(model, tokenizer, output / "base", time.time() - start)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The base model of `liger demo`

A Qwen3 model of {parameters:.2f} M parameters ({layers} layers, hidden size {hidden}, {heads} query and {kv_heads}
key/value heads of {head_dim} channels, tied embeddings, byte-level BPE of {vocab} tokens), stored in bfloat16. It was
trained from nothing on text that `liger_cli/shipped/text.py` generates: short stories, facts asked for later, key-value
recall. It knows nothing else. Sequences had up to 1024 tokens; `max_position_embeddings` is larger so that speed can
be measured on longer ones.

Trained in {minutes:.0f} minutes on two shared CPU cores with

    {command}

on {tokens:.1f} M tokens (seed 0, torch {torch}), in bfloat16 autocast.

## Held-out evaluation

Float32, seeds that training never uses (`TEST_SEED`).

- Perplexity of stories and facts, rows of 1024 tokens: {perplexity:.3f}
- Recall: {count} probes a distance, exact match of the whole answer, {pairs} facts in the document. The distance is
  the number of tokens between the end of the stated value and the start of the answer.

{table}
"""


def write_checkpoint(model, tokenizer, folder: Path, seconds: float) -> None:
    """Writes the bfloat16 checkpoint and its card to `folder`, which must not exist, and prints the evaluation."""
    count = 200
    temporary = folder.with_name(folder.name + ".tmp")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    stored = Qwen3ForCausalLM.from_pretrained(temporary, dtype=torch.float32)
    result = evaluate(stored, tokenizer, 400_000, count, TEST_SEED)
    by_pairs = {pairs: result["recall"] if pairs == 4 else None for pairs in (1, 4, 16)}
    for pairs in (1, 16):
        distances = tuple(distance for distance in DISTANCES if distance >= 64)
        by_pairs[pairs] = evaluate_recall(stored, tokenizer, distances, count, TEST_SEED, pairs=pairs)
    print(json.dumps(result | {"recall_by_pairs": by_pairs}))
    lines = ["| distance | " + " | ".join(str(distance) for distance in DISTANCES) + " |"]
    lines.append("|---" * (len(DISTANCES) + 1) + "|")
    for pairs, accuracy in by_pairs.items():
        cells = [f"{accuracy[distance]:.3f}" if distance in accuracy else "" for distance in DISTANCES]
        lines.append(f"| {pairs} fact{'s' if pairs > 1 else ''} | " + " | ".join(cells) + " |")
    config = stored.config
    card = CARD.format(
        parameters=stored.num_parameters() / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        minutes=seconds / 60,
        command="python -m liger_cli.shipped.train_base --output DIR",
        tokens=TOTAL_TOKENS / 1e6,
        torch=torch.__version__,
        perplexity=result["perplexity"],
        count=count,
        pairs="1, 4 or 16",
        table="\n".join(lines),
    )
    for file in temporary.iterdir():
        file.chmod(0o644)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    os.replace(temporary, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the run; the checkpoint appears in its `base`")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens of a forward pass")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.005)
    parser.add_argument("--gain-lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--save-seconds", type=int, default=120)
    args = parser.parse_args()
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"torch {torch.__version__} has no torch.optim.Muon; install torch 2.9 or newer to train the base")
    train(args)


if __name__ == "__main__":
    main()
