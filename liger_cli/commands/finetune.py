"""`liger finetune`: plan the run, train a LoRA adapter on a converted model, write it as a folder of its own.

While it runs, everything lives in `<output>.partial`; the output appears when it is whole. A run that was killed goes
on with `resume` from its last complete checkpoint.
"""

import json
import os
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from liger_cli.calibration.text import calibration_note, check_data
from liger_cli.checkpoint.adapters import ADAPTER_WEIGHTS
from liger_cli.checkpoint.folders import next_step, resolve_model
from liger_cli.checkpoint.model_code import load_config
from liger_cli.checkpoint.reader import context_length, fingerprint, read_json, read_shard
from liger_cli.checkpoint.tokenizer import check_ids, load_tokenizer
from liger_cli.commands.finetune_options import FinetuneOptions
from liger_cli.commands.options import check_positive
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, ModelError, UsageError
from liger_cli.system.escape import code_span, markdown, yaml_string
from liger_cli.system.manifest import new_manifest, write_manifest
from liger_cli.system.outputs import atomic_folder, check_output, claimed_folder, place_tree, unchanged, write_whole
from liger_cli.system.processes import is_launched, is_main_process, launch
from liger_cli.system.wording import counted, without_folders
from liger_cli.training.calibrated import (
    calibrated_base,
    calibrated_specs,
    can_be_calibrated,
    copy_path,
    is_calibrated,
    training_text,
)
from liger_cli.training.data import check_sources
from liger_cli.training.plan import (
    Base,
    check_memory,
    check_model,
    check_setup,
    lora_modules,
    make_plan,
    read_base,
    training_dtype,
)
from liger_cli.training.recipes import Recipe, load_recipe, made_for, override, recipe_from
from liger_cli.training.run import train
from liger_cli.training.view import outcome

RUN = "run.json"
NONE = "none"  # of --long-data
DATA = ("data", "long_data")  # fields of a recipe that name files


def run(model: str | Path | None = None, *, as_json: bool = False, quiet: bool = False, **options) -> dict:
    """Fine-tune and print what came out.

    Args:
        model: as in `FinetuneOptions`.
        quiet: no progress on stderr. options: fields of `FinetuneOptions`.
    Returns:
        The report (what `--json` prints).
    Raises:
        LigerError in all its kinds, OSError.
    """
    asked = FinetuneOptions(model=model, **options)
    check_positive(asked, "processes")
    recipe, data, resume, force = asked.recipe, asked.data, asked.resume, asked.force
    fsdp = asked.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    base = read_base(resolve_model(asked.model, "finetune"))
    copy = copy_path(base, asked.output) if _calibrates_first(base, recipe, asked.output, resume) else None
    _check_calibration_data(asked.calibration_data, base, copy)
    target = Path(asked.output) if asked.output else Path(f"{copy.name if copy else base.folder.name}-lora")
    partial = _partial(target)
    limit, changes = None if asked.beyond_context else context_length(base.config), asked.changes()
    if limit and changes.get("seq_len", 0) > limit:
        _say_limit(changes["seq_len"], limit)
        changes["seq_len"] = limit
    if copy and resume:
        base, copy = calibrated_base(base, copy, text=asked.calibration_data, make=False), None
    starts = asked.processes > 1 and not is_launched()
    if resume and not starts:
        recipe, data, checked = _resumed(partial, target, base, recipe, data, changes)
    elif not resume:
        if is_main_process():
            _sweep(partial)
            check_output(target, force, base=base.folder)
        checked = _with_data(load_recipe(recipe or default_recipe(base)), data, changes)
        if limit and checked.seq_len > limit:
            _say_limit(checked.seq_len, limit)
            checked = override(checked, seq_len=limit)
        if starts:  # here, where it is one sentence, and not in every process
            check_setup(checked, asked.report_to, fsdp, asked.processes)
        data = checked.data if data is None else data
        check_sources(data)
        check_sources(checked.long_data, "--long-data")
        if (partial / RUN).exists() and not force and not asked.dry_run and is_main_process():
            raise UsageError(f"{partial} is an unfinished run; go on with it (--resume) or discard it (--force)")
    if starts:
        if copy and not asked.dry_run:
            loaded, _ = load_schedule(base, checked, data, load_tokenizer(base.folder, load_config(base.folder)))
            text = asked.calibration_data or (lambda: training_text(loaded, data, checked.seed))
            calibrated_base(base, copy, force, text)
        return launch(asked.processes)
    report = finetune(
        base,
        checked,
        data,
        target,
        partial,
        resume=resume,
        force=force,
        dry_run=asked.dry_run,
        quiet=quiet,
        dtype=asked.dtype,
        report_to=asked.report_to,
        fsdp=fsdp,
        copy=copy,
        calibration_data=asked.calibration_data,
    )
    if as_json and is_main_process():
        print(json.dumps(report, indent=2))
    return report


def finetune(
    base: Base,
    recipe: Recipe,
    data: str,
    target: Path,
    partial: Path,
    *,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    dtype: str = "auto",
    report_to: str = "none",
    fsdp: bool = False,
    copy: Path | None = None,
    calibration_data: str | None = None,
) -> dict:
    """The run itself; parameters as for `run`. `partial` holds everything until it becomes `target`.

    copy: the folder of a calibrated copy of `base`, which is trained in its place; see `calibrated`.
    """
    check_setup(recipe, report_to, fsdp)
    dtype = training_dtype(dtype)
    from transformers.utils import logging

    from liger_cli.training.view import print_plan

    logging.disable_progress_bar()
    # transformers 5.23 renamed both; PEFT and older releases know the old names only
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    check_model(base, recipe)
    modules = lora_modules(base, recipe)
    tokenizer = load_tokenizer(base.folder, load_config(base.folder))
    loaded, schedule = load_schedule(base, recipe, data, tokenizer)
    planned = replace(base, specs=list(calibrated_specs(base.specs))) if copy else base
    plan = make_plan(planned, recipe, modules, data, loaded, schedule, dtype, target)
    if not quiet and is_main_process():
        print_plan(plan)
    if dry_run:
        if copy and not quiet and is_main_process():
            say(f"{base.folder.name} would first be calibrated into {copy}")
        if not quiet and is_main_process():
            say(next_step("dry run"))
        return {**plan, "dry_run": True}
    check_memory(plan)
    if copy:
        text = calibration_data or (lambda: training_text(loaded, data, recipe.seed))
        base = calibrated_base(base, copy, force, text)
        plan = make_plan(base, recipe, modules, data, loaded, schedule, dtype, target)
    settings = {"recipe": recipe.to_dict(), "data": data, "sources": loaded.report}
    options = {"resume": resume, "quiet": quiet, "dtype": dtype, "report_to": report_to, "fsdp": fsdp}
    with claimed_folder(partial, fresh=not resume) if is_main_process() else nullcontext():
        if resume:
            recorded = read_json(partial / RUN)["sources"]
            if recorded != loaded.report:
                raise UsageError(f"the data behind {data} have changed since the run began; start again with --force")
        elif is_main_process():
            write_whole(partial / RUN, json.dumps({**settings, "fingerprint": base.fingerprint["digest"]}, indent=2))
        try:
            with unchanged(*(shard.path for shard in base.shards)):
                result = train(base, recipe, modules, loaded, schedule, tokenizer, partial, **options)
        except KeyboardInterrupt:
            if is_main_process():
                say(f"{partial} keeps the run's checkpoints; go on with --resume")
            raise
        report = {**plan, "dry_run": False, **result}
        if is_main_process():
            _finish(base, recipe, settings, report, target, partial, force or resume)
            if not quiet:
                say(f"wrote {target}")
                if is_calibrated(base):
                    say(calibration_note(base.manifest["calibration"]))
                for sentence in outcome(report):
                    say(sentence)
                say(next_step("adapter", target))
    return report


def _with_data(recipe: Recipe, data: str | None, flags: dict) -> Recipe:
    """The recipe with its flags; the long documents beside its own data are not those beside other data."""
    found = override(recipe, **flags)
    if found.long_data == NONE or (data is not None and flags.get("long_data") is None):
        return replace(found, long_data=None)
    return found


def _check_calibration_data(calibration_data: str | None, base: Base, copy: Path | None) -> None:
    """Raises UsageError where a text to calibrate on is no file, or nothing is calibrated."""
    if calibration_data is None:
        return
    if copy is None:
        raise UsageError(
            f"--calibration-data is given, but {base.folder.name} is not calibrated first: it is calibrated already, "
            "or the recipe trains it as it is"
        )
    check_data(calibration_data)


def _say_limit(seq_len: int, limit: int) -> None:
    if is_main_process():
        say(
            f"the base's context is {limit:,} tokens, so rows have that and not {seq_len:,}; --beyond-context goes "
            "further"
        )


def default_recipe(base: Base) -> str:
    """`best`, which begins with a calibration; of a model that is not calibrated the recipe that `liger convert` was
    given, or `paper` where it cannot be."""
    if is_calibrated(base):
        return "best"
    return made_for(base.manifest) or ("best" if can_be_calibrated(base) else "paper")


def _calibrates_first(base: Base, recipe: str | None, output: str | Path | None, resume: bool) -> bool:
    """Whether a calibrated copy is trained in the folder's place. Of a run that is resumed its own recipe says it."""
    if is_calibrated(base) or not can_be_calibrated(base):
        return False
    if not resume:
        found = load_recipe(recipe or default_recipe(base))
        return found.calibrate and found.attention == "liger"
    run = _partial(Path(output or f"{base.folder.name}-lora")) / RUN
    if run.is_file():
        return bool(read_json(run)["recipe"].get("calibrate"))
    copy = copy_path(base, output)
    return copy.exists() or (output is None and (_partial(Path(f"{copy.name}-lora")) / RUN).is_file())


def _partial(target: Path) -> Path:
    """Where a run lives until it is `target`."""
    return target.with_name(f"{target.name}.partial")


def load_schedule(base: Base, recipe: Recipe, data: str, tokenizer):
    """The data, in memory or streamed, and the micro-batches of the whole run. Raises as `data.load_data`."""
    from liger_cli.training.data import load_data
    from liger_cli.training.packing import Schedule
    from liger_cli.training.streaming import MixedSchedule, StreamSchedule, open_stream, wants_streaming

    rows = (recipe.seq_len, recipe.batch_size, recipe.micro_batch_size, recipe.packing, recipe.seed)
    if wants_streaming(data, recipe.streaming, recipe.max_steps):
        loaded = open_stream(data, tokenizer, recipe.seq_len, recipe.held_out)
        schedule = StreamSchedule(loaded, *rows, recipe.max_steps)
    else:
        loaded = load_data(data, tokenizer, recipe.seq_len, recipe.held_out, recipe.seed)
        largest = max(int(example.input_ids.max()) for example in (*loaded.train, *loaded.held_out))
        check_ids(largest, base.geometry.vocab_size, base.folder)
        schedule = Schedule(loaded.train, *rows, recipe.epochs, recipe.max_steps)
    if recipe.long_data is None:
        return loaded, schedule
    try:
        beside = open_stream(recipe.long_data, tokenizer, recipe.seq_len, held_out=0)
    except LigerError as error:
        raise type(error)(str(error).replace("--data", "--long-data")) from None
    for source in beside.report:
        source["share_of_rows"] = recipe.long_share
    beside_schedule = StreamSchedule(beside, *rows, schedule.steps)
    schedule = MixedSchedule(schedule, beside_schedule, recipe.long_share, recipe.max_steps)
    return replace(loaded, report=[*loaded.report, *beside.report]), schedule


def _finish(base: Base, recipe: Recipe, settings: dict, report: dict, target: Path, partial: Path, force: bool) -> None:
    """Make the finished run the output: the files are linked, so that a kill in between loses nothing."""
    import yaml

    check_output(target, force)
    (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=110))
    converted = base.manifest
    manifest = new_manifest(
        "adapter",
        base={"path": str(base.folder), "name": base.folder.name, "model_type": base.config["model_type"]},
        fingerprint=base.fingerprint,
        source={"base": converted.get("base"), "fingerprint": converted.get("fingerprint")},
        settings=_named(settings),
        seed=recipe.seed,
        result={name: value for name, value in report.items() if name not in ("recipe", "dry_run", "data", "sources")},
    )
    card = (
        f"---\nlibrary_name: peft\nbase_model: {yaml_string(base.folder.name)}\ntags: [liger, lora]\n---\n"
        f"# {markdown(target.name)}\n\n"
        f"A LoRA adapter for the Liger model {code_span(base.folder.name)}, trained with the recipe "
        f"{code_span(recipe.name)} (recipe.yaml) on {code_span(without_folders(settings['data']))} for "
        f"{counted(report['steps_done'], 'step')}. "
        "log.jsonl and loss.png show the run; `liger merge` makes a model of its own of it.\n"
    )
    with atomic_folder(target, force) as folder:
        place_tree(partial, folder)
        for name in (RUN, "README.md"):
            (folder / name).unlink(missing_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        written = fingerprint((read_shard(folder.resolve(), ADAPTER_WEIGHTS),))
        write_manifest(folder, {**manifest, "written": written})
    (partial / RUN).unlink()  # from here on it is no unfinished run, even if what follows is killed
    shutil.rmtree(partial, ignore_errors=True)


def _named(settings: dict) -> dict:
    """What a run was made with for those who get its adapter: files of data by their names alone."""
    recipe = {name: without_folders(one) if name in DATA and one else one for name, one in settings["recipe"].items()}
    sources = [{**source, "source": without_folders(source["source"])} for source in settings["sources"]]
    return {"recipe": recipe, "data": without_folders(settings["data"]), "sources": sources}


def _sweep(partial: Path) -> None:
    """Remove what a run left that was killed before it began or after it had finished."""
    if partial.is_dir() and not (partial / RUN).exists():
        with claimed_folder(partial, fresh=True):
            partial.rmdir()


def _resumed(partial: Path, target: Path, base: Base, recipe, data, flags) -> tuple[None, str, Recipe]:
    """What the unfinished run was started with. Raises UsageError where the command now says something else."""
    if not (partial / RUN).is_file():
        done = f"; {target} is finished" if target.exists() else ""
        raise UsageError(f"there is no unfinished run {partial} to resume{done}")
    recorded = read_json(partial / RUN)
    if recorded["fingerprint"] != base.fingerprint["digest"]:
        raise ModelError(f"{partial} was begun on other weights than those of {base.folder}")
    kept = recipe_from(recorded["recipe"])
    if recipe is not None and load_recipe(recipe).name != kept.name:
        raise UsageError(f"--recipe is {recipe!r}, but the unfinished run has {kept.name!r}; leave it out or --force")
    if data is not None and data != recorded["data"]:
        raise UsageError(
            f"--data is {data!r}, but the unfinished run has {recorded['data']!r}; leave it out or --force"
        )
    if _with_data(kept, None, flags) != kept:
        raise UsageError(f"the options differ from those {partial} was begun with; leave them out, or use --force")
    return None, recorded["data"], kept
