"""`liger convert`: link a base's weights into a new folder and write beside them what makes it a Liger model.

No tensor is loaded and neither torch nor transformers is imported, so it costs the same for 1 GB and for 1 TB.
"""

import json
from dataclasses import replace
from pathlib import Path

from liger_cli import __version__
from liger_cli.calibration.sizes import calibration_bytes
from liger_cli.calibration.text import calibration_note, check_data
from liger_cli.checkpoint import gguf, paper_folders, publish
from liger_cli.checkpoint.experimental import family_of
from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.folders import next_step
from liger_cli.checkpoint.hub import Source, find_base
from liger_cli.checkpoint.model_code import code_hashes, model_files
from liger_cli.checkpoint.reader import (
    Geometry,
    context_length,
    own_files,
    read_checkpoint,
    read_config,
)
from liger_cli.checkpoint.tokenizer import has_tokenizer
from liger_cli.commands.convert_options import ConvertOptions
from liger_cli.conversion.folder import planned_files, replace_text, write_converted
from liger_cli.conversion.identity_check import check_identity
from liger_cli.conversion.plan import Plan, make_plan, read_mix, with_defaults
from liger_cli.conversion.plan_edits import with_heads
from liger_cli.conversion.requests import LEAST_SEQ_LEN, Request, read_request
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.system.escape import printable
from liger_cli.system.manifest import MANIFEST, package_versions, read_manifest, utc_now, write_manifest
from liger_cli.system.outputs import (
    LINKS,
    atomic_folder,
    check_output,
    check_unchanged,
    file_versions,
    place_tree,
)
from liger_cli.system.wording import size
from liger_cli.templates.liger_config import FORMAT, LayerSpec, LigerConfigError, layer_specs


def run(*, as_json: bool = False, quiet: bool = False, **options) -> dict:
    """Convert or refresh, and print the plan, or what is new: for people, or one JSON object.

    Args:
        quiet: print nothing. options: fields of `ConvertOptions`.
    Returns:
        The report.
    """
    asked, plan = ConvertOptions(**options), None
    if asked.refresh:
        report = refresh(asked.base, asked.dry_run)
    else:
        report, plan = carry_out(asked)
    if as_json:
        print(json.dumps(report, indent=2))
    elif plan is not None and not quiet:
        from liger_cli.conversion.plan_table import print_plan

        print_plan(report, plan)
    elif not quiet:
        print(f"{'would refresh' if asked.dry_run else 'refreshed'} {asked.base}: {', '.join(report['refreshed'])}")
        print(printable(next_step("dry run" if asked.dry_run else "merged", asked.base)))
    return report


def convert(base: str, output: str | None = None, *, settings: dict | None = None, **options) -> tuple[dict, Plan]:
    """Convert a base model, as `carry_out`.

    Args:
        settings: fields of `LayerSpec` for the Liger layers, and under `layers` what differs in some of them.
        options: the other fields of `ConvertOptions`.
    """
    given = dict(settings or {})
    layer = given.pop("layers", None)
    known = {name: given.pop(name) for name in tuple(given) if name in ConvertOptions.__dataclass_fields__}
    return carry_out(ConvertOptions(base=base, output=output, layer=layer, **known, **options), given)


def carry_out(options: ConvertOptions, others: dict | None = None) -> tuple[dict, Plan]:
    """Convert a base model, and upload the folder where asked.

    Args:
        others: fields of `LayerSpec` that are no options, such as `softmax_kv_heads`.
    Returns:
        The report (what `--json` prints) and the plan.
    Raises:
        UsageError, ModelError, SetupError, LigerError, OSError.
    """
    repo = options.push_to_hub
    if repo:
        publish.check(repo, options.dry_run)
    report, plan = _converted(options, others or {})
    if repo and options.dry_run:
        report["push"] = publish.preview(repo, planned_files(plan))
    elif repo:
        report["push"] = publish.push(Path(report["output"]), repo)
    return report, plan


def _converted(options: ConvertOptions, others: dict) -> tuple[dict, Plan]:
    calibrate, dry_run, link = options.calibrate, options.dry_run, options.link
    if link not in LINKS:
        raise UsageError(f"--link is {link!r}, but has to be one of {', '.join(LINKS)}")
    of_recipe, measured, values = {}, {}, None
    if options.recipe:
        from liger_cli.training.recipes import model_settings, recipe_names

        of_recipe = model_settings(options.recipe)
        if options.recipe in recipe_names():
            measured["recipe"] = options.recipe
    settings = of_recipe | options.settings() | others
    own_kept = any("kept=" in text for text in settings.get("layers", ()))
    shared = 0 if not calibrate or options.budget or own_kept else 2 * settings.get("window", LayerSpec.window)
    kept = settings.get("kept")
    request = read_request(
        options.softmax_layers, options.softmax_heads, kept, options.budget, calibrate, default_kept=shared
    )
    if request.kept is not None or request.budget:
        settings["kept"] = request.kept or 0
    elif isinstance(kept, str):
        settings["kept"] = int(kept)
    check_data(options.calibration_data)
    if (length := options.calibration_seq_len) < LEAST_SEQ_LEN:
        raise UsageError(f"--calibration-seq-len is {length}, but has to be a whole number, {LEAST_SEQ_LEN} or more")
    made = "calibrated" if calibrate else settings.get("gate") or LayerSpec.gate
    source, note = _source(options, made)
    checkpoint = read_checkpoint(source.folder, options.experimental)
    versions = file_versions(shard.path for shard in checkpoint.shards)
    if "mix" in settings:
        settings["mix"] = read_mix(settings["mix"])
    if checkpoint.paper_gate:
        settings = paper_folders.fixed_settings(settings, checkpoint.paper_gate, checkpoint.config)
    settings = with_defaults(settings, calibrate)
    if not (request.chooses or calibrate) and options.calibration_data is not None:
        raise UsageError(
            "--calibration-data is given, but nothing is measured; ask for --calibrate or --softmax-layers auto:N"
        )
    plan = make_plan(
        checkpoint, settings, "none" if request.layers else options.softmax_layers, options.linearize_local
    )
    if checkpoint.paper_gate:
        about = paper_folders.notes(checkpoint.family.model_type, checkpoint.paper_gate, settings)
        plan = replace(plan, notes=plan.notes + about)
    if note:
        plan = replace(plan, notes=(*plan.notes, note))
    if checkpoint.left_out:
        fields = ", ".join(checkpoint.left_out)
        note = f"left out of config.json, since it says how to run a model and not what it is: {fields}"
        plan = replace(plan, notes=(*plan.notes, note))
    if not calibrate and any(spec.kept for spec in plan.specs):
        note = "the scores that choose kept tokens are not fitted: --calibrate fits them"
        plan = replace(plan, notes=(*plan.notes, note))
    if not has_tokenizer(checkpoint.support_files):
        note = f"{source.name} has no tokenizer, so the output has none: finetune and eval need one beside the weights"
        plan = replace(plan, notes=(*plan.notes, note))
    gate = next(spec.gate for spec in plan.specs if spec.kind == "liger")
    made = "calibrated" if calibrate else gate
    target = Path(options.output).expanduser() if options.output else Path(f"{source.short_name}-liger-{made}")
    check_output(target, options.force, base=checkpoint.folder)
    if checkpoint.family.model_type not in FAMILIES:
        result = check_identity(checkpoint.family, checkpoint.config)
        plan = replace(plan, notes=(*plan.notes, result.sentence()))
    plan = with_heads(plan, request.named)
    if (calibrate or request.chooses) and dry_run:
        plan = replace(plan, notes=(*plan.notes, _not_yet(plan, request, calibrate, options.calibration_seq_len)))
    elif calibrate or request.chooses:
        from liger_cli.calibration.calibrate import calibrate as fitted

        plan, values, report = fitted(
            plan, options.calibration_data, request, fit=calibrate, seq_len=options.calibration_seq_len
        )
        measured["calibration" if calibrate else "selection"] = report
    noted = plan
    if "calibration" in measured:  # in the card it has a section of its own
        noted = replace(plan, notes=(*plan.notes, calibration_note(measured["calibration"])))
    report = _report(source, noted, target, dry_run) | measured
    check_unchanged(versions)  # what was measured is told of the weights that are there now
    if not dry_run:
        report["link"] = write_converted(source, plan, target, link, options.force, measured, values)
    return report, noted


def _source(options: ConvertOptions, gate: str) -> tuple[Source, str | None]:
    """The base's folder, and a sentence where it was made of a GGUF file."""
    if not gguf.is_gguf(options.base) or Path(options.base).expanduser().is_dir():
        if options.dtype is not None:
            raise UsageError("--dtype is for GGUF files; the weights of a folder are linked as they are")
        return find_base(options.base, options.revision, options.experimental), None
    path, dtype = Path(options.base).expanduser(), options.dtype or gguf.DEFAULT_DTYPE
    target = Path(options.output).expanduser() if options.output else Path(f"{path.stem}-liger-{gate}")
    check_output(target, options.force)
    folder = gguf.whole_folder(path, target, dtype)
    gguf.whole_weights(path, folder, dtype, options.dry_run)
    note = f"whole weights ({dtype}) were made of {path.name}, once, in the folder {folder.name}; they are linked"
    return Source(folder.resolve(), path.stem, None), note


def _not_yet(plan: Plan, request: Request, calibrate: bool, seq_len: int) -> str:
    """What a dry run leaves out."""
    what = "a calibration" if calibrate else "the choice of what stays softmax"
    room = min(seq_len, context_length(plan.checkpoint.config) or seq_len)
    memory = size(calibration_bytes(plan, room))
    needs = f"{what} would read rows of {room:,} tokens, with about {memory} beside the weights"
    return f"{needs}; what it chooses is not in this table" if request.chooses or request.kept is not None else needs


def refresh(folder: str, dry_run: bool = False) -> dict:
    """Give a folder that liger made the model code of this version; weights, settings and the rest stay.

    Args:
        folder: a converted or merged folder.
        dry_run: check only.
    Returns:
        What `--json` prints.
    Raises:
        UsageError: not such a folder. ModelError: its config is broken or of a format that this version cannot renew.
    """
    target = Path(folder).expanduser().resolve()
    manifest = read_manifest(target)
    if manifest is None or manifest["kind"] == "adapter":
        raise UsageError(f"{folder} is not a converted or merged folder of liger's, so there is nothing to refresh")
    config = read_config(target)
    family = family_of(str(config.get("model_type")).removeprefix("liger_"))
    block = config.get("liger")
    if isinstance(block, dict) and block.get("format") != FORMAT:
        raise ModelError(f"{folder}: its format is {block.get('format')!r}, which liger {__version__} cannot renew")
    try:
        layer_specs(block, Geometry.of(family.with_defaults(config)).num_hidden_layers)
    except LigerConfigError as error:
        raise ModelError(f"{folder}: {error}") from None
    own_files(target)
    if not dry_run:
        with atomic_folder(target, force=True) as new:
            place_tree(target, new)
            for name, text in model_files(family).items():
                replace_text(new / name, text)
            (new / MANIFEST).unlink()
            now = {"refreshed": utc_now(), "versions": package_versions()}
            write_manifest(new, {**manifest, "code": code_hashes(family), **now})
    return {"output": folder, "dry_run": dry_run, "refreshed": sorted(model_files(family))}


def _report(source: Source, plan: Plan, target: Path, dry_run: bool) -> dict:
    return {
        "base": {"name": source.name, "revision": source.revision, "model_type": plan.checkpoint.family.model_type},
        "output": str(target),
        "dry_run": dry_run,
        "layers": plan.layers(),
        "parameters": plan.parameters(),
        "added_parameters": plan.added_parameters(),
        "bytes": plan.weight_bytes(),
        "memory": plan.memory(),
        "notes": list(plan.notes),
    }
