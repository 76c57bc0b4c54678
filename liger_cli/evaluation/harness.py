"""Tasks of lm-evaluation-harness, by its Python API, for every column of an evaluation."""

import json
import logging
import math
import sys
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

from liger_cli.checkpoint.hub import spare_retries
from liger_cli.evaluation.scoring import LOGITS_BYTES
from liger_cli.evaluation.subject import COLUMNS, Subject
from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.system.manifest import pip_install
from liger_cli.system.wording import did_you_mean

SUITES = {
    "paper": ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu"),  # arXiv 2503.01496, table 2
    "long": ("ruler", "longbench"),
}
FEWSHOT = {"mmlu": 5}
OFFLINE = (
    "offline", "couldn't reach", "connection", "resolve", "timed out", "cannot find the requested files",
    "nltk downloader", "name or service not known",
)  # fmt: skip
COUNTING = ("acc", "acc_norm", "acc_bytes", "exact_match")  # metrics: shares of examples with the right choice
TOKENS = 2048  # of a row, as far as the automatic batch size on a CPU looks


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
    batch_size: int | None = None,
    include_path: str | None = None,
    metadata: dict | None = None,
    seed: int = 0,
    columns: tuple[str, ...] = COLUMNS,
) -> dict:
    """Run tasks: `{column: {task: {metric: {value, stderr, higher_is_better}}}, "chance", "details", "harness"}`.

    `chance` has what guessing scores in each metric, None where that is not known; `details` of each task the examples
    in its prompt, its version and how many of its examples were run; `harness` the version of lm-eval and the seed.

    Args:
        tasks: names or groups of the harness, or of YAML files under `include_path`.
        num_fewshot: examples in the prompt; by default each task's own, and 5 for mmlu as in the paper.
        limit: examples of each task, or a share of them below 1.
        batch_size: sequences a pass; as many as fit by default.
        metadata: handed to the tasks, as `lm_eval --metadata` does; RULER reads `max_seq_lengths`.
    Raises:
        SetupError: lm-eval is missing, or a task's data cannot be had. LigerError: the harness failed. What
        `check_tasks` finds is not looked for again.
    """
    lm_eval, tasks_module, huggingface = _import()
    # Asks git about the current folder for a figure nobody reads, and git complains where that is no repository.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    with tempfile.TemporaryDirectory(prefix="liger-tokenizer-") as folder:
        metadata = {"tokenizer": _plain_tokenizer(subject.tokenizer, Path(folder)), **(metadata or {})}
        manager = tasks_module.TaskManager(include_path=include_path, metadata=metadata)
        spare_retries()
        settings = {
            "limit": limit if limit is None or limit < 1 else int(limit),
            "task_manager": manager,
            "random_seed": seed,
            "numpy_random_seed": seed,
            "torch_random_seed": seed,
            "fewshot_random_seed": seed,
        }
        found: dict[str, dict] = {column: {} for column in columns}
        details: dict[str, dict] = {}
        chance: dict[str, dict] = {}
        for column in columns:
            for shots, names in _by_fewshot(tasks, num_fewshot).items():
                # The harness prints to stdout, which is the results' own.
                with subject.column(column) as model, redirect_stdout(sys.stderr):
                    wrapped = huggingface.HFLM(
                        pretrained=model,
                        tokenizer=subject.tokenizer,
                        backend="causal",
                        batch_size=batch_size or _automatic_batch_size(subject.liger_model),
                        device=str(subject.liger_model.device),
                    )
                    try:
                        results = lm_eval.simple_evaluate(
                            model=wrapped,
                            tasks=list(names),
                            num_fewshot=shots,
                            log_samples=column == columns[0],  # how many choices an example has
                            **settings,
                        )
                    except Exception as error:
                        raise _as_sentence(error, names) from error
                for name in names:
                    figures = _of_task(results, name)
                    found[column] |= figures
                    if column == columns[0]:
                        details |= {task: _details(results, task) for task in figures}
                        chance |= {
                            task: {metric: _chance(results, task, metric) for metric in metrics}
                            for task, metrics in figures.items()
                        }
    return {**found, "chance": chance, "details": details, "harness": {"lm_eval": version("lm_eval"), "seed": seed}}


def check_tasks(
    tasks: tuple[str, ...], num_fewshot: int | None = None, limit: float | None = None, include_path: str | None = None
) -> None:
    """Find out what cannot be run before anything is: options, the harness itself, and names that it does not have.

    Raises:
        UsageError: an option or a name. SetupError: lm-eval is missing.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"--num-fewshot is {num_fewshot}, but has to be 0 or more")
    if limit is not None and not (0 < limit < 1 or (math.isfinite(limit) and limit >= 1 and limit == int(limit))):
        raise UsageError(f"--limit is {limit:g}, but has to be a number of examples, or a share between 0 and 1")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path names {include_path}, which is not a folder")
    tasks_module = _import()[1]
    for noisy in ("lm_eval", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        known = tasks_module.TaskManager(include_path=include_path).all_tasks
    except Exception as error:  # whatever a YAML file that is none of the harness's makes it raise
        where = f" (one of them under --include-path {include_path})" if include_path else ""
        raise LigerError(f"the harness cannot read its task files{where}: {_sentence(error)}") from error
    for name in tasks:
        if name not in known:
            raise UsageError(f"--tasks names {name!r}, which the harness does not have{did_you_mean(name, known)}")


def parse_metadata(text: str | dict | None) -> dict | None:
    """`--metadata` as a dictionary, which it may be already. Raises UsageError."""
    if text is None or isinstance(text, dict):
        return text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f'--metadata is {text!r}, but has to be a JSON object such as {{"max_seq_lengths": [4096]}}')
    return found


def _plain_tokenizer(tokenizer, folder: Path) -> str:
    """A copy of the tokenizer for tasks that size their texts by it: they load it with leave to run its code."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    config.write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


def _automatic_batch_size(model) -> int | str:
    """The harness's own search for the largest batch on CUDA; it would take a machine's whole memory on a CPU."""
    if model.device.type == "cuda":
        return "auto"
    tokens = min(getattr(model.config, "max_position_embeddings", None) or TOKENS, TOKENS)
    return max(1, min(16, LOGITS_BYTES // (4 * tokens * model.config.vocab_size)))


def _import():
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
        from lm_eval.models import huggingface
    except ModuleNotFoundError as error:
        raise SetupError(
            f"--tasks needs lm-evaluation-harness ({error.name} is missing); {pip_install('eval')}"
        ) from None
    return lm_eval, lm_eval.tasks, huggingface


def _by_fewshot(tasks: tuple[str, ...], num_fewshot: int | None) -> dict[int | None, list[str]]:
    groups: dict[int | None, list[str]] = {}
    for name in tasks:
        groups.setdefault(FEWSHOT.get(name) if num_fewshot is None else num_fewshot, []).append(name)
    return groups


def _of_task(results: dict, name: str) -> dict[str, dict]:
    """The task's figures, or, of a group that has none of its own, those of its tasks."""
    metrics = _metrics(results["results"].get(name, {}), results.get("higher_is_better", {}).get(name) or {})
    children = results.get("group_subtasks", {}).get(name, [])
    if metrics or not children:
        return {name: metrics}
    return {child: figures for each in children for child, figures in _of_task(results, each).items()}


def _details(results: dict, name: str) -> dict:
    """What a task's figures rest on; None where a group's tasks differ. A group's examples are those of its tasks."""
    children = results.get("group_subtasks", {}).get(name, [])
    own = (results.get("n-samples", {}).get(name) or {}).get("effective")
    return {
        "num_fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
        "examples": sum(_details(results, child)["examples"] or 0 for child in children) if children else own,
    }


def _chance(results: dict, name: str, metric: str) -> float | None:
    """What guessing scores in a metric of a task, or of a group that averages its tasks: 1 / choices, else 0.

    None where choices are scored by a metric that does not count right answers, or by a function of the task's own.
    """
    children = results.get("group_subtasks", {}).get(name, [])
    if children:
        shares = [(_chance(results, child, metric), _details(results, child)["examples"] or 1) for child in children]
        if any(share is None for share, _ in shares):
            return None
        return sum(share * count for share, count in shares) / sum(count for _, count in shares)
    config = results.get("configs", {}).get(name, {})
    if config.get("output_type") != "multiple_choice":
        return 0.0
    if metric not in COUNTING or config.get("process_results"):
        return None
    # A task with acc_mutual_info asks for every choice twice, once without its question.
    asked = 1 + any(one.get("metric") == "acc_mutual_info" for one in config.get("metric_list") or [])
    choices = [len(sample["filtered_resps"]) // asked for sample in results.get("samples", {}).get(name, [])]
    return sum(1 / count for count in choices) / len(choices) if choices else None


def _metrics(results: dict, better: dict) -> dict:
    """`acc,none` and `acc_stderr,none` as `{"acc": {value, stderr, higher_is_better}}`.

    A filter's name is kept where it is not none. `better`: of each metric, None where the harness cannot tell.
    """
    metrics = {}
    for key, value in results.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        if value == -1:  # RULER's mark of a length that was not asked for
            continue
        shown = name if chosen == "none" else f"{name} ({chosen})"
        metrics[shown] = {
            "value": _finite(value),
            "stderr": _finite(results.get(f"{name}_stderr,{chosen}")),
            "higher_is_better": better.get(name),
        }
    return metrics


def _finite(value) -> float | None:
    """A figure, or None for what JSON has no number for: the error of a single example is NaN, or the text N/A."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _as_sentence(error: Exception, tasks) -> LigerError:
    reasons, cause = [], error
    while cause is not None:
        if isinstance(cause, ImportError):
            return SetupError(
                f"{', '.join(tasks)} needs a package that is missing ({' '.join(str(cause).split())}); "
                f"{pip_install('eval')} gets those of RULER and LongBench"
            )
        reasons.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    if any(word in reason.lower() for reason in reasons for word in OFFLINE):
        return SetupError(
            f"the data of {', '.join(tasks)} could not be had from the hub; check the network, or run local tasks with "
            "--include-path"
        )
    return LigerError(f"the harness failed on {', '.join(tasks)}: {_sentence(error)}")


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
