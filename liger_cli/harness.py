"""Tasks of lm-evaluation-harness, by its Python API, for every column of an evaluation."""

import logging
import sys
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path

from liger_cli.columns import COLUMNS, Subject
from liger_cli.errors import LigerError, SetupError, UsageError

SUITES = {
    "paper": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu"),  # arXiv 2503.01496, table 2
    "long": ("ruler", "longbench"),
}
FEWSHOT = {"mmlu": 5}
OFFLINE = ("offline", "couldn't reach", "connection", "resolve", "timed out", "cannot find the requested files")


def parse_tasks(text: str) -> tuple[str, ...]:
    """`paper,my_task` as task names, the suites' names replaced by their tasks. Raises UsageError."""
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        names += SUITES.get(name, (name,))
    if not names:
        raise UsageError(f"--tasks is {text!r}; name tasks, or a suite: {', '.join(SUITES)}")
    return tuple(dict.fromkeys(names))


def run_tasks(
    subject: Subject,
    tasks: tuple[str, ...],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = "auto",
    include_path: str | None = None,
    seed: int = 0,
    columns: tuple[str, ...] = COLUMNS,
) -> dict:
    """Run tasks and return `{column: {task: {metric: {value, stderr}}}}`.

    Args:
        tasks: names or groups of the harness, or of YAML files under `include_path`.
        num_fewshot: examples in the prompt; by default each task's own, and 5 for mmlu as in the paper.
        limit: examples of each task, or a share of them below 1.
        batch_size: sequences a pass, or `auto`.
    Raises:
        SetupError: lm-eval is missing, or a task's data cannot be had. UsageError: an unknown task.
    """
    lm_eval, tasks_module, huggingface = _import()
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path names {include_path}, which is not a folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = tasks_module.TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--tasks names {name!r}, which the harness does not have{hint}")
    found: dict[str, dict] = {column: {} for column in columns}
    for column in columns:
        for shots, names in _by_fewshot(tasks, num_fewshot).items():
            # The harness prints to stdout, which is the results' own.
            with subject.column(column) as model, redirect_stdout(sys.stderr):
                wrapped = huggingface.HFLM(
                    pretrained=model,
                    tokenizer=subject.tokenizer,
                    backend="causal",
                    batch_size=batch_size,
                    device=str(subject.liger_model.device),
                )
                try:
                    results = lm_eval.simple_evaluate(
                        model=wrapped,
                        tasks=list(names),
                        num_fewshot=shots,
                        limit=limit,
                        task_manager=manager,
                        log_samples=False,
                        random_seed=seed,
                        numpy_random_seed=seed,
                        torch_random_seed=seed,
                        fewshot_random_seed=seed,
                    )
                except Exception as error:
                    raise _as_sentence(error, names) from error
            for name in names:
                found[column][name] = _metrics(results["results"].get(name, {}))
    return found


def _import():
    try:
        import lm_eval
        import lm_eval.tasks
        from lm_eval.models import huggingface
    except ModuleNotFoundError as error:
        raise SetupError(
            f"--tasks needs lm-evaluation-harness ({error.name} is missing); pip install 'liger-cli[eval]'"
        ) from None
    return lm_eval, lm_eval.tasks, huggingface


def _by_fewshot(tasks: tuple[str, ...], num_fewshot: int | None) -> dict[int | None, list[str]]:
    groups: dict[int | None, list[str]] = {}
    for name in tasks:
        groups.setdefault(FEWSHOT.get(name) if num_fewshot is None else num_fewshot, []).append(name)
    return groups


def _metrics(results: dict) -> dict:
    """`acc,none` and `acc_stderr,none` as `{"acc": {value, stderr}}`; a filter's name is kept where it is not none."""
    metrics = {}
    for key, value in results.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{name}_stderr,{chosen}")
        shown = name if chosen == "none" else f"{name} ({chosen})"
        metrics[shown] = {"value": float(value), "stderr": stderr if isinstance(stderr, float) else None}
    return metrics


def _as_sentence(error: Exception, tasks) -> LigerError:
    reasons, cause = [], error
    while cause is not None:
        reasons.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    if any(word in reason.lower() for reason in reasons for word in OFFLINE):
        return SetupError(
            f"the data of {', '.join(tasks)} could not be had from the hub; check the network, or run local tasks with "
            "--include-path"
        )
    return LigerError(f"the harness failed on {', '.join(tasks)}: {reasons[0]}")
