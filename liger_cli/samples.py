"""Generations of every column side by side: likelihoods hide a generation that is broken."""

from liger_cli.columns import COLUMNS, Subject

PROMPT_TOKENS = 96  # longer than the usual window
NEW_TOKENS = 48


def write_samples(subject: Subject, texts: list[str], count: int, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """Greedy continuations of the beginnings of `count` texts, `[{prompt, <column>: text}]`."""
    import torch

    samples = []
    for text in texts[:count]:
        ids = subject.tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS].to(subject.liger_model.device)
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
