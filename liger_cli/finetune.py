"""`liger finetune`: plan the run, train a LoRA adapter on a converted model, write it as a folder of its own.

While it runs, everything lives in `<output>.partial`; the output appears when it is whole. A run that was killed goes
on with `resume` from its last complete checkpoint.
"""

import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from liger_cli.checkpoint import Geometry, Shard, fingerprint, read_config, read_json, read_weights
from liger_cli.errors import LigerError, ModelError, UsageError
from liger_cli.folders import resolve_model
from liger_cli.manifest import new_manifest, read_manifest, write_manifest
from liger_cli.outputs import atomic_folder, check_output
from liger_cli.recipes import Recipe, load_recipe, override, recipe_from
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, layer_specs

RUN = "run.json"
CHECKPOINTS = "checkpoints"
MEMORY_SHARE = 0.95  # of what is free; the estimate is one


@dataclass(frozen=True)
class Base:
    """The converted model to be tuned, read without loading a tensor."""

    folder: Path
    config: dict
    geometry: Geometry
    specs: list[LayerSpec]
    shards: tuple[Shard, ...]
    manifest: dict
    fingerprint: dict


def run(
    model: str | Path | None = None,
    *,
    data: str | None = None,
    recipe: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    processes: int = 1,
    dtype: str = "auto",
    report_to: str = "none",
    **flags,
) -> dict:
    """Fine-tune and print what came out.

    Args:
        model: a converted folder; the newest one here by default.
        data: see `data.load_data`; the recipe's by default.
        recipe: a shipped recipe's name or a YAML file; `paper` by default.
        output: the adapter's folder; `<model>-lora` here by default.
        resume: go on with the unfinished run of that output.
        force: replace an adapter that liger made, and discard an unfinished run.
        dry_run: print the plan and train nothing.
        quiet: no progress on stderr.
        processes: data-parallel processes to start on this machine; from the command line only.
        dtype: of the frozen weights while training: `auto` (bfloat16 on CUDA, float32 elsewhere) or a name.
        report_to: `tensorboard`, `wandb` or `none`.
        flags: fields of `Recipe` and of its stages (`lr`, `objective`) that override the recipe's; None leaves them.
    Returns:
        The report (what `--json` prints).
    Raises:
        LigerError in all its kinds, OSError.
    """
    if processes > 1 and "RANK" not in os.environ:
        return _launch(processes)
    folder = resolve_model(model, "finetune")
    target = Path(output) if output else Path(f"{folder.resolve().name}-lora")
    partial = target.with_name(f"{target.name}.partial")
    base = read_base(folder)
    if resume:
        recipe, data, checked = _resumed(partial, target, base, recipe, data, flags)
    else:
        if _main_process():
            check_output(target, force, base=base.folder)
        checked = override(load_recipe(recipe or "paper"), **flags)
        data = data or checked.data
        if partial.exists() and not force and not dry_run and _main_process():
            raise UsageError(f"{partial} is an unfinished run; go on with it (--resume) or discard it (--force)")
    report = finetune(
        base,
        checked,
        data,
        target,
        partial,
        resume=resume,
        force=force,
        dry_run=dry_run,
        quiet=quiet,
        dtype=dtype,
        report_to=report_to,
    )
    if as_json and _main_process():
        print(json.dumps(report, indent=2))
    return report


def read_base(folder: Path) -> Base:
    """Read and check the model to be tuned. Raises ModelError, UsageError."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest["kind"] == "adapter":
        raise UsageError(f"{folder} is an adapter; name the converted model, or merge the adapter first")
    config = read_config(folder.resolve())
    if "liger" not in config:
        raise ModelError(f"{folder} is not linearized; run `liger convert {folder}` first")
    geometry = Geometry.of(config)
    try:
        specs = layer_specs(config["liger"], geometry.num_hidden_layers)
    except LigerConfigError as error:
        raise ModelError(f"{folder}: {error}") from None
    shards = read_weights(folder)
    return Base(folder.resolve(), config, geometry, specs, shards, manifest or {}, fingerprint(shards))


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
) -> dict:
    """The run itself; parameters as for `run`. `partial` holds everything until it becomes `target`."""
    from transformers.utils import logging

    from liger_cli.data import Schedule, load_data
    from liger_cli.train_view import print_plan

    logging.disable_progress_bar()
    # transformers 5.23 renamed both; PEFT and older releases know the old names only
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    modules = lora_modules(base, recipe)
    tokenizer = load_tokenizer(base.folder)
    loaded = load_data(data, tokenizer, recipe.seq_len, recipe.held_out, recipe.seed)
    schedule = Schedule(
        loaded.train,
        recipe.seq_len,
        recipe.batch_size,
        recipe.micro_batch_size,
        recipe.packing,
        recipe.seed,
        recipe.epochs,
        recipe.max_steps,
    )
    device, dtype = _device(), _dtype(dtype)
    plan = _plan(base, recipe, modules, data, loaded, schedule, device, dtype, target)
    if not quiet and _main_process():
        print_plan(plan)
    if dry_run:
        return {**plan, "dry_run": True}
    _check_memory(plan, device)
    settings = {"recipe": recipe.to_dict(), "data": data, "sources": loaded.report}
    if resume:
        recorded = read_json(partial / RUN)["sources"]
        if recorded != loaded.report:
            raise UsageError(f"the data behind {data} have changed since the run began; start again with --force")
    elif _main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / RUN).write_text(json.dumps({**settings, "fingerprint": base.fingerprint["digest"]}, indent=2))
    try:
        result = _train(base, recipe, modules, loaded, schedule, tokenizer, partial, resume, quiet, dtype, report_to)
    except KeyboardInterrupt:
        if _main_process():
            print(f"liger: {partial} keeps the run's checkpoints; go on with --resume", file=sys.stderr)
        raise
    report = {**plan, "dry_run": False, **result}
    if _main_process():
        _finish(base, recipe, settings, report, target, partial, force or resume)
        if not quiet:
            print(f"liger: wrote {target}; merge it with `liger merge {target}`", file=sys.stderr)
    return report


def lora_modules(base: Base, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every linear layer that gets LoRA. Raises UsageError where a target module is not there."""
    layers = [index for index, spec in enumerate(base.specs) if spec.kind == "liger" or recipe.train_softmax_layers]
    shapes = {name: tensor.shape for shard in base.shards for name, tensor in shard.tensors.items()}
    found = {}
    for wanted in _fused(recipe.target_modules, shapes):
        matching = {
            name.removesuffix(".weight"): shape
            for name, shape in shapes.items()
            if name.endswith(f".{wanted}.weight") and len(shape) == 2 and _layer(name) in layers
        }
        if not matching:
            names = sorted(
                {name.split(".")[-2] for name, shape in shapes.items() if len(shape) == 2 and "layers" in name}
            )
            raise UsageError(f"--target-modules names {wanted!r}; the layers to be trained have {', '.join(names)}")
        found |= matching
    return found


def _fused(targets: tuple[str, ...], tensors) -> tuple[str, ...]:
    """q_proj, k_proj and v_proj become qkv_proj where the family has fused them (Phi-3)."""
    split = ("q_proj", "k_proj", "v_proj")
    fused = any(".qkv_proj." in name for name in tensors) and not any(".q_proj." in name for name in tensors)
    if not fused or not set(targets) & set(split):
        return targets
    return ("qkv_proj", *(name for name in targets if name not in split))


def load_tokenizer(folder: Path):
    """The folder's tokenizer; no code of the folder is run. Raises ModelError."""
    from transformers import AutoTokenizer

    from liger_cli.experimental import family_of
    from liger_cli.modeling import model_classes

    family = family_of(read_config(folder)["model_type"].removeprefix("liger_"))
    try:
        config = model_classes(family)[0].from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({str(error)[:200]})") from None


def _train(base, recipe, modules, loaded, schedule, tokenizer, partial, resume, quiet, dtype, report_to) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import EarlyStoppingCallback, PrinterCallback

    from liger_cli.modeling import load_model
    from liger_cli.objectives import TrainedModel
    from liger_cli.train_view import TrainView, write_plot
    from liger_cli.training import (
        LOG,
        LigerTrainer,
        Recorder,
        checkpoint_step,
        last_checkpoint,
        read_log,
        training_arguments,
    )

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if schedule.per_step % world:
        raise UsageError(
            f"--processes is {world}, but a batch of {recipe.batch_size} has {schedule.per_step} micro-batches; "
            "choose a divisor"
        )
    checkpoints = partial / CHECKPOINTS
    last = last_checkpoint(checkpoints) if resume else None
    start = checkpoint_step(last) if last else 0
    torch.manual_seed(recipe.seed)
    model = load_model(base.folder, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    model.set_attention_mode(recipe.attention)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in modules}),
        layers_to_transform=sorted({_layer(name) for name in modules}),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base.folder)
    adapted.__class__ = TrainedModel
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    view = TrainView(schedule, start, quiet or not _main_process())
    log = partial / LOG
    callbacks = [Recorder(log, schedule, view, start)]
    if recipe.early_stop:
        callbacks.append(EarlyStoppingCallback(recipe.early_stop))
    args = training_arguments(
        recipe,
        schedule.steps,
        checkpoints,
        schedule.per_step // world,
        bool(loaded.held_out),
        report_to=report_to,
        use_cpu=not torch.cuda.is_available(),
        eval_on_start=bool(loaded.held_out) and not start,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    trainer = LigerTrainer(adapted, recipe, schedule, loaded.held_out, pad, args, callbacks)
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    with view:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        last_step = [one for one in trainer.state.log_history if one["step"] == trainer.state.global_step]
        if loaded.held_out and not any("eval_loss" in one for one in last_step):
            trainer.evaluate()
    seconds = time.perf_counter() - began
    records = read_log(log)
    losses = [record["loss"] for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    if _main_process():
        adapted.save_pretrained(partial)
        write_plot(records, partial / "loss.png", recipe)
    return {
        "steps_done": trainer.state.global_step,
        "resumed_from_step": start,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(view.tokens / view.seconds, 1) if view.seconds else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": sum(losses[-10:]) / len(losses[-10:]) if losses else None,
        "held_out_perplexity_before": evaluations[0]["eval_perplexity"] if evaluations else None,
        "held_out_perplexity": evaluations[-1]["eval_perplexity"] if evaluations else None,
    }  # fmt: skip


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
        settings=settings,
        seed=recipe.seed,
        result={name: value for name, value in report.items() if name not in ("recipe", "dry_run")},
    )
    card = (
        f"---\nlibrary_name: peft\nbase_model: {base.folder.name}\ntags: [liger, lora]\n---\n# {target.name}\n\n"
        f"A LoRA adapter for the Liger model `{base.folder.name}`, trained with the recipe `{recipe.name}` "
        f"(recipe.yaml) on `{settings['data']}` for {report['steps_done']} steps. log.jsonl and loss.png show the "
        "run; `liger merge` makes a model of its own of it.\n"
    )
    with atomic_folder(target, force) as folder:
        shutil.copytree(partial, folder, copy_function=os.link, dirs_exist_ok=True)
        for name in (RUN, "README.md"):
            (folder / name).unlink(missing_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder, manifest)
    shutil.rmtree(partial, ignore_errors=True)


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
    if override(kept, **flags) != kept:
        raise UsageError(f"the options differ from those {partial} was begun with; leave them out, or use --force")
    return None, recorded["data"], kept


def _plan(base, recipe, modules, data, loaded, schedule, device, dtype, target) -> dict:
    tokens, padding = schedule.tokens()
    trainable = sum(recipe.lora_rank * (rows + columns) for rows, columns in modules.values())
    return {
        "model": str(base.folder),
        "output": str(target),
        "recipe": recipe.name,
        "objectives": [stage.objective for stage in recipe.stages],
        "data": data,
        "sources": loaded.report,
        "held_out_examples": len(loaded.held_out),
        "train_examples": len(loaded.train),
        "parameters": sum(tensor.numel for shard in base.shards for tensor in shard.tensors.values()),
        "trainable_parameters": trainable,
        "tokens": tokens,
        "padding_tokens": padding,
        "steps": schedule.steps,
        "epochs": round(len(schedule) / schedule.per_epoch, 2),
        "batch_size": recipe.batch_size,
        "seq_len": recipe.seq_len,
        "device": device,
        "dtype": dtype,
        "memory_estimate_bytes": estimate_memory(base, recipe, trainable, dtype),
    }


def estimate_memory(base: Base, recipe: Recipe, trainable: int, dtype: str) -> int:
    """Bytes that training will take: weights, LoRA with its gradients and AdamW moments, activations, logits.

    An estimate: the activations are counted by the tensors that a decoder layer keeps for its backward pass.
    """
    width = 4 if dtype == "float32" else 2
    sizes = base.geometry
    inner = base.config.get("intermediate_size") or 4 * sizes.hidden_size
    heads = (sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * sizes.head_dim
    tokens = recipe.seq_len * recipe.micro_batch_size
    per_layer = tokens * (width * (8 * sizes.hidden_size + 4 * inner + 4 * heads) + 4 * 6 * heads)
    if recipe.gradient_checkpointing:
        activations = per_layer + sizes.num_hidden_layers * tokens * sizes.hidden_size * width
    else:
        activations = per_layer * sizes.num_hidden_layers
    weights = sum(tensor.numel for shard in base.shards for tensor in shard.tensors.values()) * width
    logits = 3 * 4 * min(1 << 25, tokens * sizes.vocab_size)
    return weights + 16 * trainable + activations + logits


def _check_memory(plan: dict, device: str) -> None:
    """Refuse a run that cannot fit. Raises LigerError naming what would make it fit."""
    free = _free_memory(device)
    if free is not None and plan["memory_estimate_bytes"] > MEMORY_SHARE * free:
        raise LigerError(
            f"training needs an estimated {plan['memory_estimate_bytes'] / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            f"are free on the {device}; try --gradient-checkpointing, --micro-batch-size 1, a smaller --seq-len or "
            "--dtype bfloat16"
        )


def _free_memory(device: str) -> int | None:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(name: str) -> str:
    if name == "auto":
        return "bfloat16" if _device() == "cuda" else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype is {name!r}, but has to be auto, float32, bfloat16 or float16")
    return name


def _layer(name: str) -> int | None:
    from liger_cli.checkpoint import layer_index

    match = layer_index(name)
    return int(match[1]) if match else None


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _launch(processes: int) -> dict:
    """The same command in `processes` data-parallel processes."""
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run([*command, "-m", "liger_cli", *sys.argv[1:]])
    if done.returncode:
        raise LigerError(f"one of the {processes} processes failed; its message is above")
    return {}
