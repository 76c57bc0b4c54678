"""Generations of every column side by side: likelihoods hide a generation that is broken."""

from itertools import islice

from liger_cli.evaluation.subject import COLUMNS, Subject

PROMPT_TOKENS = 96  # longer than the usual window
NEW_TOKENS = 48


def write_samples(subject: Subject, texts: list[str], count: int, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """Greedy continuations of `count` prompts (fewer of a short text), `[{prompt, <column>: text}]`.

    Prompts are the beginnings of the texts and, where there are not enough, what stands further on in them.
    """
    import torch

    samples = []
    for ids in islice(_prompts(subject.tokenizer, texts), count):
        ids = ids.to(subject.liger_model.device)
        sample = {"prompt": subject.tokenizer.decode(ids[0], skip_special_tokens=True)}
        for column in columns:
            with subject.column(column) as model, torch.inference_mode():
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=subject.tokenizer.pad_token_id,
                )
            sample[column] = subject.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append(sample)
    return samples


def _prompts(tokenizer, texts: list[str]):
    """[1, PROMPT_TOKENS] token ids: the first of each text (shorter where the text is), then the second of each ..."""
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    yield from (ids[:, :PROMPT_TOKENS] for ids in rows if ids.shape[1])
    for first in range(PROMPT_TOKENS, max(ids.shape[1] for ids in rows), PROMPT_TOKENS):
        yield from (piece for ids in rows if (piece := ids[:, first : first + PROMPT_TOKENS]).shape[1] == PROMPT_TOKENS)
