"""Text that a language model writes itself, sampled from its own distribution: no network, and it fits any base.

With a chat template it writes conversations, the user's turns too (as Magpie does, arXiv 2406.08464): the template's
own words open each turn. Without one it writes documents.
"""

from collections.abc import Iterator
from itertools import cycle

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from liger_cli.checkpoint.tokenizer import separator, token_ids
from liger_cli.system.errors import LigerError

CACHE_BYTES = 1 << 30  # of the keys and values of the rows that are written at once
MARKS = ("QZXA", "QZXB", "QZXC")  # stand for the turns' texts while the template is read


def own_text(model, tokenizer, rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Rows of text that the model writes at temperature 1.

    Where a turn or a document ends within a row, the row goes on: with what the chat template puts before the next
    turn, or else with a new document. What the model wrote to end it stays.

    Args:
        model: a causal language model; a Liger model writes in the attention mode that it is in.
        tokenizer: its tokenizer; decides how texts begin.
        rows, length: of the result.
        seed: of the sampling; torch's own generators are left as they were.
    Returns:
        [rows, length] int64 on the model's device.
    Raises:
        LigerError: the tokenizer names no token that a text could begin with.
        FloatingPointError: logits that no token can be drawn by; its argument is what is written so far, [B, T].
    """
    start, turns = openings(tokenizer)
    width = torch.finfo(model.dtype).bits // 8
    size = max(1, CACHE_BYTES // (_cache_values(model.config) * width * length))
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(1, length - len(start)),
        eos_token_id=None,
        pad_token_id=start[-1],
    )
    ends = {*tokenizer.all_special_ids, *_listed(getattr(model.generation_config, "eos_token_id", None))}
    own, model.generation_config = model.generation_config, config
    written, device = [], model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        try:
            for first in range(0, rows, size):
                count = min(size, rows - first)
                ids = torch.tensor([start] * count, device=device)
                forced = LogitsProcessorList([Openings(ends, [cycle(turns) for _ in range(count)])])
                ids = model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=forced)
                written.append(ids[:, :length])
        finally:
            model.generation_config = own
    return torch.cat(written).clone()


class Openings(LogitsProcessor):
    """Wherever a row has come to an end, the tokens that open what comes next, one a step.

    Args:
        ends: tokens that end a turn or a document.
        openings: for each row the openings in order, token ids each, without end.
    Raises:
        FloatingPointError: scores that no token can be drawn by; its argument is what is written so far, [B, T].
    """

    def __init__(self, ends: set[int], openings: list[Iterator[list[int]]]):
        self.ends, self.openings = ends, openings
        self.pending: list[list[int]] = [[] for _ in openings]
        self.opening = [True] * len(openings)  # whether the last token was forced

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.max(-1).values.isfinite().all():
            raise FloatingPointError(input_ids)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if token in self.ends and not self.opening[row]:
                self.pending[row] = list(next(self.openings[row]))
                if self.pending[row][:1] == [token]:  # the end itself belongs to the opening
                    del self.pending[row][0]
            self.opening[row] = bool(self.pending[row])
            if self.pending[row]:
                scores[row] = -torch.inf
                scores[row, self.pending[row].pop(0)] = 0.0
        return scores


def openings(tokenizer) -> tuple[list[int], list[list[int]]]:
    """Token ids that a text begins with, and those that come after each end, to be repeated.

    Raises:
        LigerError: neither a chat template nor a token that a text begins with.
    """
    parts = _template_parts(tokenizer)
    if parts is not None:
        first, *between = (token_ids(tokenizer, part) for part in parts)
        if first:
            return first, between
    start = separator(tokenizer)
    if start is None:
        raise LigerError("the tokenizer names no token that a text begins with; give a text (--calibration-data)")
    return [start], [[start] if start == tokenizer.bos_token_id else []]


def _template_parts(tokenizer) -> tuple[str, str, str] | None:
    """What the chat template writes before a user's first turn, before the answer, and before the next user's turn.

    None where there is no template, or it does not show a conversation as it stands.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError

    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
    parts = []
    for mark in MARKS:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return tuple(parts)


def _cache_values(config) -> int:
    """Numbers that a token adds to a softmax cache."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim


def _listed(value) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
