"""The options of `liger eval`, and of its Python function."""

from dataclasses import dataclass

from liger_cli.commands.options import device, dtype, measured, option, output_format, save

TEXT, TASKS = "Text and recall", "Tasks of lm-evaluation-harness"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure MODEL beside its base and its window alone: --perplexity and --recall by default."""

    model: str | None = measured()
    data: str | None = option(
        None, "Text or .jsonl file to read; by default shipped prose that no calibration is fitted on.", metavar="FILE"
    )
    perplexity: bool = option(False, "Perplexity and KL divergence from the base, by position.")
    recall: bool = option(False, "Needles by distance, and the second reading of a passage.")
    tasks: str | None = option(
        None, "Tasks of lm-evaluation-harness, by commas; paper and long are suites.", metavar="NAMES"
    )
    samples: int = option(0, "Generations of base and model to show side by side.")
    against: str | None = option(None, "Base to compare with; the folder's own by default.")
    compare: list[str] | None = option(
        None, "Results of a model to compare, a file or folder; repeat it.", "--from", metavar="RESULTS"
    )
    device: str = device()
    dtype: str = dtype()
    batch_size: str = option("auto", "Sequences a pass, or auto: as many as fit.")
    seq_len: int = option(2048, "Tokens a row of the text.", panel=TEXT)
    rows: int = option(8, "Rows of the text that are read, at most.", panel=TEXT)
    recall_distances: str | None = option(
        None, "Tokens between needle and question, by commas.", shown="128, 512 ... up to --seq-len", panel=TEXT
    )
    recall_count: int = option(10, "Needles of each distance.", panel=TEXT)
    seed: int = option(0, "Seed of needles and passages.", panel=TEXT)
    beyond_context: bool = option(False, "Go beyond the context that the base was made for.", panel=TEXT)
    num_fewshot: int | None = option(None, "Examples in a task's prompt; its own by default, 5 for mmlu.", panel=TASKS)
    limit: float | None = option(None, "Examples of each task, or a share below 1.", panel=TASKS)
    include_path: str | None = option(None, "Folder with task YAML files of your own.", metavar="DIR", panel=TASKS)
    metadata: str | None = option(
        None,
        "For the tasks: '{\"max_seq_lengths\": [4096, 8192]}' for RULER's lengths.",
        metavar="JSON",
        panel=TASKS,
    )
    output_format: str = output_format()
    save: bool = save()
