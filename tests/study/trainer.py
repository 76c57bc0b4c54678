"""Trains a small base model from nothing on the shipped text, by a curriculum; resumable.

What it is made of (`Recipe`) is in `train_base`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from liger_cli.shipped.probes import evaluate_recall, held_out_text, perplexity
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
TOKENS_PER_WORD = 1.3  # roughly; a document's length is asked for in words


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


@dataclass(frozen=True)
class Recipe:
    """A base to train.

    Attributes:
        curriculum: the stages, in order.
        build_tokenizer, build_model: of the base; the model has random weights.
        distances, logged_distances: of the recall in the card, and in the log.
        command: trains this base, as the card shows it.
        card: the card's text, with the fields that `write_checkpoint` fills in.
    """

    curriculum: tuple[Stage, ...]
    build_tokenizer: Callable[[], PreTrainedTokenizerFast]
    build_model: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    distances: tuple[int, ...]
    logged_distances: tuple[int, ...]
    command: str
    card: str

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return sum(stage.tokens for stage in self.curriculum)

    def stage_at(self, seen: int) -> Stage:
        """The stage of the curriculum after `seen` training tokens."""
        end = 0
        for stage in self.curriculum:
            end += stage.tokens
            if seen < end:
                return stage
        return self.curriculum[-1]


def train_tokenizer(vocab_size: int, num_documents: int = 2000) -> PreTrainedTokenizerFast:
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


def answer_mask(tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor) -> torch.Tensor:
    """Which of the tokens rows [B, T] only the context answers: those from a question mark up to the next full stop."""
    index = torch.arange(rows.shape[1]).expand_as(rows)
    asked, answered = (
        index.where(rows == token, -1).cummax(1).values for token in tokenizer.convert_tokens_to_ids(["?", "."])
    )
    return asked > answered


def loss_weights(tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor, other: float) -> torch.Tensor:
    """Weights [B, T] of the targets rows[:, 1:]: 1 in an answer (`answer_mask`), 0 on padding, else `other`."""
    weights = torch.where(answer_mask(tokenizer, rows), 1.0, other)[:, :-1]
    return weights.masked_fill(rows[:, 1:] == tokenizer.pad_token_id, 0.0)


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` in float32: that one orthogonalizes in bfloat16, which many processors only emulate."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                average.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalized(param.grad.lerp(average, group["momentum"]))
                scale = max(1, param.shape[0] / param.shape[1]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` [M, N] with singular values near 1, by five quintic Newton-Schulz steps with Muon's coefficients."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def build_optimizers(
    model: PreTrainedModel, muon_lr: float, adam_lr: float, gain_lr: float, float32: bool = False
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and the norms."""
    muon = Float32Muon if float32 else torch.optim.Muon
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
    return [muon(matrices, lr=muon_lr, weight_decay=0.05, momentum=0.95), adam]


def learning_rate_scale(step: int, progress: float, warmup: int = 40, decay: float = 0.4) -> float:
    """Warm-up over `warmup` steps, then constant, then a linear decay to zero over the last `decay` of the tokens."""
    return min(1.0, (step + 1) / warmup, (1 - progress) / decay)


def evaluate(model, tokenizer, characters: int, count: int, seed: int, distances) -> dict:
    """Held-out perplexity and recall by distance, both in float32."""
    model.eval()
    result = {
        "perplexity": perplexity(model, tokenizer, held_out_text(characters, seed)),
        "recall": evaluate_recall(model, tokenizer, distances, count, seed),
    }
    model.train()
    return result


def accumulate_gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: torch.Tensor,
    other_weight: float,
    micro_tokens: int,
    float32: bool = False,
) -> float:
    """Adds the gradients of the weighted mean loss over `rows` [B, T + 1], some `micro_tokens` at a time; the loss."""
    weights = loss_weights(tokenizer, rows, other_weight)
    weights /= weights.sum()
    size = max(1, micro_tokens // weights.shape[1])
    total = 0.0
    for batch, weight in zip(rows.split(size), weights.split(size), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=not float32):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
        loss = losses @ weight.flatten()
        loss.backward()
        total += loss.item()
    return total


def train(recipe: Recipe, args: argparse.Namespace) -> dict:
    """Trains to the end of the curriculum, from `training_state.pt` where it is; writes `base` and its card.

    Returns:
        The held-out evaluation of the written base, see `write_checkpoint`.
    """
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = recipe.build_tokenizer()
    model = recipe.build_model(tokenizer).train()
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr, args.gain_lr, args.float32)
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
    while seen < recipe.tokens:
        stage = recipe.stage_at(seen)
        scale = learning_rate_scale(step, seen / recipe.tokens)
        for optimizer, lrs in zip(optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        count = stage.batch_tokens // stage.seq_len
        rows = pack_rows(tokenizer, TRAIN_SEED + 1 + step, count, stage.seq_len, stage.kinds)
        log_loss.append(
            accumulate_gradients(model, tokenizer, rows, stage.other_weight, args.micro_tokens, args.float32)
        )
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
            result = evaluate(model, tokenizer, 60_000, 32, VALIDATION_SEED, recipe.logged_distances)
            print(json.dumps(result), flush=True)
            log_start, log_tokens = time.time(), 0
        if time.time() - last_save > args.save_seconds or seen >= recipe.tokens:
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
    return write_checkpoint(recipe, model, tokenizer, output / "base", time.time() - start)


def write_checkpoint(recipe: Recipe, model, tokenizer, folder: Path, seconds: float) -> dict:
    """Writes the bfloat16 checkpoint and its card to `folder`, which must not exist, and prints the evaluation.

    Returns:
        perplexity, recall_by_pairs: {pairs: {distance: share}}, count: probes a distance, minutes.
    """
    count = 200
    temporary = folder.with_name(folder.name + ".tmp")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    stored = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32)
    result = evaluate(stored, tokenizer, 400_000, count, TEST_SEED, recipe.distances)
    by_pairs = {pairs: result["recall"] if pairs == 4 else None for pairs in (1, 4, 16)}
    for pairs in (1, 16):
        distances = tuple(distance for distance in recipe.distances if distance >= 64)
        by_pairs[pairs] = evaluate_recall(stored, tokenizer, distances, count, TEST_SEED, pairs=pairs)
    figures = {"perplexity": result["perplexity"], "recall_by_pairs": by_pairs, "count": count, "minutes": seconds / 60}
    print(json.dumps(figures))
    lines = ["| distance | " + " | ".join(str(distance) for distance in recipe.distances) + " |"]
    lines.append("|---" * (len(recipe.distances) + 1) + "|")
    for pairs, accuracy in by_pairs.items():
        cells = [f"{accuracy[distance]:.3f}" if distance in accuracy else "" for distance in recipe.distances]
        lines.append(f"| {pairs} fact{'s' if pairs > 1 else ''} | " + " | ".join(cells) + " |")
    config = stored.config
    card = recipe.card.format(
        parameters=stored.num_parameters() / 1e6,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        vocab=config.vocab_size,
        minutes=seconds / 60,
        command=recipe.command,
        tokens=recipe.tokens / 1e6,
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
    return figures


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every training script."""
    parser.add_argument("--output", required=True, help="folder of the run; the checkpoint appears in its `base`")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="tokens of a forward pass")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.005)
    parser.add_argument("--gain-lr", type=float, default=0.01)
    parser.add_argument(
        "--float32", action="store_true", help="no bfloat16, several times as fast on processors that emulate it"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--save-seconds", type=int, default=120)


def run(recipe: Recipe, parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """Trains, where torch has the optimizer; the evaluation of `train`."""
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"torch {torch.__version__} has no torch.optim.Muon; install torch 2.9 or newer to train the base")
    return train(recipe, args)
