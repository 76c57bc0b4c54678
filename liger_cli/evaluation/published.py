"""Figures that others have published, to stand beside measured ones, always under the word "published".

All are from Lan et al., "Liger: Linearizing Large Language Models to Gated Recurrent Structures", arXiv 2503.01496.
"""

from dataclasses import dataclass

SOURCE = "arXiv 2503.01496"
TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu")


@dataclass(frozen=True)
class Figures:
    """One line of a published table; None is what the paper does not print.

    Attributes:
        model: its name in the paper.
        tokens_b: training tokens, 10^9; of the base itself, those of its pretraining.
        scores: percent, in the order of `TASKS`; MMLU with 5 examples.
        average, average_without_mmlu: percent.
    """

    model: str
    tokens_b: float | None
    scores: tuple[float | None, ...]
    average: float | None
    average_without_mmlu: float | None

    def as_json(self) -> dict:
        return {
            "model": self.model,
            "tokens_b": self.tokens_b,
            "scores": dict(zip(TASKS, self.scores, strict=True)),
            "average": self.average,
            "average_without_mmlu": self.average_without_mmlu,
        }


@dataclass(frozen=True)
class PublishedBase:
    """A base of the paper, known by its shapes, and what was published about it.

    Attributes:
        name: in the paper. Models of the same shapes (Llama-3.1-8B has those of Llama-3-8B) match, too.
        shapes: entries of a config.
    """

    name: str
    shapes: dict
    figures: tuple[Figures, ...]


def _only_mmlu(score: float) -> tuple[float | None, ...]:
    return (None,) * (len(TASKS) - 1) + (score,)


BASES = (
    PublishedBase(
        "Llama-3-8B",
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256},
        (
            Figures("Llama-3-8B", 15000, (79.4, 80.1, 53.2, 79.2, 72.9, 65.3), 71.7, 73.0),
            Figures("SUPRA-8B", 20, (78.9, 75.1, 46.5, 71.7, 65.8, 40.9), 63.2, 67.6),
            Figures("LoLCATs-8B, rerun by the paper", 0.04, (80.1, 80.4, 53.5, 63.4, 72.9, 42.1), 65.4, 70.0),
            Figures("Liger-GLA-8B", 0.02, (80.3, 81.1, 52.5, 76.3, 72.0, 43.4), 67.6, 72.4),
            Figures("Liger-GLA-8B-H, softmax in 1 of 8", 0.02, (80.6, 80.7, 52.7, 76.9, 71.4, 44.4), 67.8, 72.5),
            Figures("Liger-HGRN2-8B", 0.02, (79.2, 76.8, 48.5, 74.4, 68.8, 36.2), 64.0, 69.5),
            Figures("Liger-GSA-8B", 0.02, (79.5, 78.5, 49.4, 74.5, 70.5, 41.2), 65.6, 70.5),
            Figures("window only, no recurrent branch", 0.02, _only_mmlu(37.0), 66.2, 72.0),
        ),
    ),
    PublishedBase(
        "Mistral-7B",
        {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
        (
            Figures("Mistral-7B", None, (None,) * len(TASKS), 72.2, 74.1),
            Figures("Mistral-7B, Liger-GLA", 0.02, (80.1, 78.7, 49.3, 76.3, 70.1, 36.3), 65.1, 70.9),
        ),
    ),
    PublishedBase(
        "Llama-3.2-1B",
        {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "vocab_size": 128256},
        (
            Figures("Llama-3.2-1B", None, _only_mmlu(31.0), 55.1, 59.9),
            Figures("Llama-3.2-1B, Liger", 0.02, _only_mmlu(22.4), 52.9, 59.0),
        ),
    ),
    PublishedBase(
        "Llama-3.2-3B",
        {"model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "vocab_size": 128256},
        (
            Figures("Llama-3.2-3B", None, _only_mmlu(56.2), 66.1, 68.1),
            Figures("Llama-3.2-3B, Liger", 0.02, _only_mmlu(32.1), 60.7, 66.5),
        ),
    ),
)


def published_base(config) -> PublishedBase | None:
    """The published base that has the shapes of a model's config (Liger's or the base's own), or None."""
    family = str(config.model_type).removeprefix("liger_")
    for base in BASES:
        wanted = {**base.shapes}
        if wanted.pop("model_type") == family and all(getattr(config, name, None) == x for name, x in wanted.items()):
            return base
    return None


def published_figures(config) -> dict | None:
    """What was published about the base of these shapes: `{label, source, base, rows}`, or None."""
    base = published_base(config)
    if base is None:
        return None
    return {
        "label": "published",
        "source": SOURCE,
        "base": base.name,
        "rows": [figures.as_json() for figures in base.figures],
    }
