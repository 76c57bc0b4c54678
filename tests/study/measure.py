"""What a unit of the study is measured by, on texts and probes of held-out seeds."""

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from liger_cli.benchmark.contest import Side, cache_tensors
from liger_cli.evaluation.recall import Probe, generated
from liger_cli.evaluation.scoring import Rows, make_rows
from liger_cli.evaluation.subject import Subject, open_subject
from liger_cli.shipped.text import TEST_SEED
from liger_cli.system.errors import LigerError
from liger_cli.system.outputs import write_whole
from study.rows import Effort
from study.sources import Source

SEED = TEST_SEED + 2**20  # held out, and no seed of `liger eval`, of a base's training or of choosing layers
HARD = 0.5  # nats between the losses of the base and of the untrained window
NOT_PROSE = ("drill", "chat", "copy", "echo")  # kinds that are mostly chance
TEXT_BATCH, PROBE_BATCH = 8, 32
STATE_TOKENS = 1024


def reference(subject: Subject, text: Rows, path: Path) -> dict[str, np.ndarray]:
    """Losses of the base and of the untrained window, in nats, [tokens] each; kept at `path`.

    They say which tokens are hard, the same ones for every row of a base.

    Args:
        subject: the base, converted and not trained.
    """
    found = {column: _read(subject, column, text)["loss"].numpy() for column in ("base", "window_only")}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez_compressed(content, **found)
    write_whole(path, content.getvalue())
    return found


def text_rows(tokenizer, source: Source, effort: Effort) -> Rows:
    """The held-out text that every row of a base is read on."""
    kinds = tuple(kind for kind in source.kinds if kind not in NOT_PROSE)
    return make_rows(tokenizer, source.held_out_text(effort.characters, SEED, kinds=kinds), effort.seq_len)


def measure(
    folder: Path, source: Source, column: str, effort: Effort, losses: dict[str, np.ndarray], text: Rows | None = None
) -> dict:
    """The figures of one column of a folder.

    Args:
        losses: see `reference`.
    Returns:
        `loss` (nats a token), `perplexity`, `kl` (base || column, nats), `top1` (share of positions whose most likely
        token is the base's), `hard` (loss on the tokens where base and untrained window differ by more than half a nat,
        with the base's and that window's, and how many there are), `recall` by generation, for each distance, and
        `state_bytes` of one sequence after 1,024 tokens.
    """
    subject = open_subject(folder)
    text = text or text_rows(subject.tokenizer, source, effort)
    found = _read(subject, column, text)
    hard = np.abs(losses["base"] - losses["window_only"]) > HARD
    loss = found["loss"].numpy()
    if not np.isfinite(loss).all():
        raise LigerError(f"{folder}: the {column} column has a loss that is not finite")
    return {
        "loss": float(loss.mean()),
        "perplexity": float(np.exp(loss.mean())),
        "kl": float(found["kl"].mean()),
        "top1": float(found["same"].mean()),
        "tokens": int(loss.size),
        "hard": {
            "tokens": int(hard.sum()),
            "loss": float(loss[hard].mean()) if hard.any() else None,
            "base": float(losses["base"][hard].mean()) if hard.any() else None,
            "window": float(losses["window_only"][hard].mean()) if hard.any() else None,
        },
        "recall": {
            where: {str(distance): _recall(subject, source, column, distance, effort.probes) for distance in distances}
            for where, distances in (("inside", effort.inside), ("beyond", effort.beyond))
        },
        "state_bytes": state_bytes(subject, column),
        "effort": asdict(effort),
    }


def _read(subject: Subject, column: str, text: Rows) -> dict[str, torch.Tensor]:
    """`loss`, `kl` and `same` of every token of the text, [tokens] float64."""
    parts: dict[str, list[torch.Tensor]] = {"loss": [], "kl": [], "same": []}
    length = text.ids.shape[1] - 1
    for ids, lengths in zip(text.ids.split(TEXT_BATCH), text.lengths.split(TEXT_BATCH), strict=True):
        counted = torch.arange(length)[None] < lengths[:, None]
        log_p = {}
        for name in ("base", column):
            if name not in log_p:
                with subject.column(name) as model, torch.inference_mode():
                    logits = model(input_ids=ids[:, :-1].to(model.device), use_cache=False).logits
                log_p[name] = logits.float().log_softmax(-1).cpu()
        base, model = log_p["base"], log_p[column]
        figures = {
            "loss": -model.gather(-1, ids[:, 1:, None])[..., 0],
            "kl": (base.exp() * (base - model)).sum(-1),
            "same": (base.argmax(-1) == model.argmax(-1)),
        }
        for name, values in figures.items():
            parts[name].append(values[counted].double())
    return {name: torch.cat(values) for name, values in parts.items()}


def _recall(subject: Subject, source: Source, column: str, distance: int, count: int) -> float:
    """Share of probes answered exactly by greedy generation."""
    probes = [
        Probe(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))
        for prompt, answer in source.recall_probe(subject.tokenizer, distance, count, SEED)
    ]
    with subject.column(column) as model:
        right = sum(
            generated(model, probes[first : first + PROBE_BATCH], subject.tokenizer)
            for first in range(0, len(probes), PROBE_BATCH)
        )
    return right / len(probes)


def state_bytes(subject: Subject, column: str) -> int:
    """Bytes of the cache of one sequence after `STATE_TOKENS` tokens; a window alone needs no recurrent state."""
    device = str(subject.liger_model.device)
    side = Side(column, lambda: subject.column(column), subject.liger_model.config.vocab_size, device, 1, False)
    return sum(
        x.numel() * x.element_size()
        for layer in cache_tensors(side.filled_cache(STATE_TOKENS))
        for name, x in layer.items()
        if not (column == "window_only" and name.startswith("state_"))
    )
