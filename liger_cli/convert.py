"""`liger convert`: link a base's weights into a new folder and write beside them what makes it a Liger model.

No tensor is loaded and neither torch nor transformers is imported, so it costs the same for 1 GB and for 1 TB.
"""

import json
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from liger_cli import __version__, publish, released
from liger_cli.checkpoint import (
    EXTRAS,
    INDEX,
    Checkpoint,
    Geometry,
    fingerprint,
    inside,
    own_files,
    read_checkpoint,
    read_config,
    read_shard,
)
from liger_cli.errors import LigerError, ModelError, UsageError
from liger_cli.escape import code_span, yaml_string
from liger_cli.experimental import family_of, run_gate
from liger_cli.extras import extra_shapes, initial_values, shard_names, write_extras
from liger_cli.families import FAMILIES
from liger_cli.hub import Source, find_base
from liger_cli.manifest import MANIFEST, new_manifest, package_versions, read_manifest, utc_now, write_manifest
from liger_cli.modeling import code_hashes, model_files
from liger_cli.outputs import (
    LINKS,
    atomic_folder,
    check_output,
    check_unchanged,
    copy_file,
    file_versions,
    place,
    place_tree,
)
from liger_cli.plan import Plan, make_plan, read_mix, with_defaults
from liger_cli.selection import read_request, selected_plan
from liger_cli.sizes import read_budget, read_share, sized_plan
from liger_cli.templates.liger_config import FORMAT, LigerConfigError, layer_specs, liger_block
from liger_cli.tokenizer import CONFIG as TOKENIZER_CONFIG
from liger_cli.tokenizer import converted_tokenizer_config
from liger_cli.wording import by_layer

FRONT_BYTES = 64 << 10  # of a model card, looked through for its licence
MADE_BY_LIGER = ("config.json", "README.md", MANIFEST)


def run(
    base: str, output: str | None = None, *, push_to_hub: str | None = None, as_json: bool = False, **options
) -> None:
    """Convert, upload where asked, and print the plan: a table, or one JSON object. Options as for `convert`."""
    if push_to_hub:
        publish.check(push_to_hub, options.get("dry_run", False))
    report, plan = convert(base, output, **options)
    if push_to_hub and report["dry_run"]:
        report["push"] = publish.preview(push_to_hub, _planned_files(plan))
    elif push_to_hub:
        report["push"] = publish.push(Path(report["output"]), push_to_hub)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from liger_cli.plan_table import print_plan

        print_plan(report, plan)


def run_refresh(folder: str, *, dry_run: bool = False, as_json: bool = False) -> None:
    """Refresh and print which files are new. Parameters as for `refresh`."""
    report = refresh(folder, dry_run)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{'would refresh' if dry_run else 'refreshed'} {folder}: {', '.join(report['refreshed'])}")


def convert(
    base: str,
    output: str | None = None,
    *,
    settings: dict | None = None,
    softmax_layers: str = "none",
    softmax_heads: str = "none",
    calibrate: bool = False,
    calibration_data: str | None = None,
    linearize_local: bool = False,
    experimental: bool = False,
    revision: str | None = None,
    link: str = "auto",
    dry_run: bool = False,
    force: bool = False,
) -> tuple[dict, Plan]:
    """Convert a base model.

    Args:
        base: a local folder or a hub id.
        output: the folder to write; `./<name>-liger-<gate>` by default.
        settings: fields of `LayerSpec` for the Liger layers. `window` or `kept` may be `auto:BYTES`: each layer's own,
            measured, within so many bytes of constant cache (see `sizes`); `kept` may be `share:N`: N on average,
            shared out by the calibration (see `kept_shares`), which is its default with twice the window.
        softmax_layers: layers kept as softmax attention: `none`, `every:N`, `auto:N` (measured, which loads the base
            and torch; see `selection`), or a list such as `3,11`.
        softmax_heads: key/value heads kept as softmax inside Liger layers: `none`, `auto:N` or `auto:2%` of all
            (measured), or layers and heads such as `4:0,5:1`.
        calibrate: fit what has a closed form on a little text (loads the base and torch; see `calibrate`).
        calibration_data: a text or .jsonl file to measure and to calibrate on; a shipped text by default.
        linearize_local: linearize layers that are local in the base, too.
        experimental: try model types that no family describes; the identity gate on a tiny model decides.
        link: `auto` (reflink, else hard link, else copy), `hard` or `copy`.
        dry_run: plan and check only.
        force: replace an output that liger made.
    Returns:
        The report (what `--json` prints) and the plan.
    Raises:
        UsageError, ModelError, SetupError, LigerError, OSError.
    """
    if link not in LINKS:
        raise UsageError(f"--link is {link!r}, but has to be one of {', '.join(LINKS)}")
    settings, share = read_share(settings or {}, calibrate)
    settings, budget = read_budget(settings, calibrate)
    source = find_base(base, revision, experimental)
    checkpoint = read_checkpoint(source.folder, experimental)
    versions = file_versions(shard.path for shard in checkpoint.shards)
    if "mix" in settings:
        settings["mix"] = read_mix(settings["mix"])
    if checkpoint.released_gate:
        settings = released.fixed_settings(settings, checkpoint.released_gate, checkpoint.config)
    settings = with_defaults(settings, calibrate)
    request = read_request(softmax_layers, softmax_heads)
    if budget and request.measured:
        raise UsageError(
            f"{budget.option} does not go with --softmax-layers or --softmax-heads auto:N; run those first, then name "
            "what they found"
        )
    if not (request.measured or calibrate or budget) and calibration_data is not None:
        raise UsageError(
            "--calibration-data is given, but nothing is measured; ask for --calibrate or --softmax-layers auto:N"
        )
    plan = make_plan(checkpoint, settings, "none" if request.layers else softmax_layers, linearize_local)
    if checkpoint.released_gate:
        about = released.notes(checkpoint.family.model_type, checkpoint.released_gate, settings)
        plan = replace(plan, notes=plan.notes + about)
    if checkpoint.left_out:
        fields = ", ".join(checkpoint.left_out)
        note = f"left out of config.json, since it says how to run a model and not what it is: {fields}"
        plan = replace(plan, notes=(*plan.notes, note))
    gate = next(spec.gate for spec in plan.specs if spec.kind == "liger")
    target = Path(output).expanduser() if output else Path(f"{source.short_name}-liger-{gate}")
    check_output(target, force, base=checkpoint.folder)
    if checkpoint.family.model_type not in FAMILIES:
        result = run_gate(checkpoint.family, checkpoint.config)
        plan = replace(plan, notes=(*plan.notes, result.sentence()))
    plan, selection = selected_plan(plan, request, calibration_data, dry_run, calibrate)
    if budget:
        plan, selection = sized_plan(plan, budget, calibration_data, dry_run)
    measured, values = ({"selection": selection} if selection else {}), None
    if calibrate and dry_run:
        shared = ", and share the kept tokens out between the layers" if share else ""
        about = f"a calibration would run the base over some 20,000 tokens{shared}"
        plan = replace(plan, notes=(*plan.notes, about))
    elif calibrate:
        from liger_cli.calibrate import calibrate as fitted
        from liger_cli.calibrate import calibration_note

        plan, values, measured["calibration"] = fitted(plan, calibration_data, share)
    noted = plan
    if "calibration" in measured:  # in the card it has a section of its own
        noted = replace(plan, notes=(*plan.notes, calibration_note(measured["calibration"])))
    report = _report(source, noted, target, dry_run) | measured
    check_unchanged(versions)  # what was measured is told of the weights that are there now
    if not dry_run:
        report["link"] = write_converted(source, plan, target, link, force, measured, values)
    return report, noted


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
                _replace(new / name, text)
            (new / MANIFEST).unlink()
            now = {"refreshed": utc_now(), "versions": package_versions()}
            write_manifest(new, {**manifest, "code": code_hashes(family), **now})
    return {"output": folder, "dry_run": dry_run, "refreshed": sorted(model_files(family))}


def _planned_files(plan: Plan) -> dict[str, int | None]:
    """What the folder would hold: name -> bytes, None for what is made only then."""
    checkpoint = plan.checkpoint
    extras = extra_shapes(plan.specs, checkpoint.geometry)
    names = shard_names(checkpoint, bool(extras))
    files = dict.fromkeys((*MADE_BY_LIGER, *([EXTRAS] if extras else ())))
    files |= {name: path.stat().st_size for name, path in checkpoint.support_files.items() if name not in files}
    files |= {name: len(text.encode()) for name, text in model_files(checkpoint.family).items()}
    return files | {names[shard.name]: shard.size for shard in checkpoint.shards}


def _replace(path: Path, text: str) -> None:
    """Write a file that may be a link to one that has to stay."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


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


def write_converted(
    source: Source, plan: Plan, target: Path, link: str, force: bool, measured: dict, values: dict | None = None
) -> str:
    """Write the folder and return how the weights were placed.

    Args:
        measured: sections of liger.json beside the usual ones. values: of the extra tensors, where they were fitted.
    """
    checkpoint = plan.checkpoint
    with atomic_folder(target, force) as folder:
        ways = set()
        extras = extra_shapes(plan.specs, checkpoint.geometry)
        names = shard_names(checkpoint, bool(extras))
        for shard in checkpoint.shards:
            _check_room(shard.size, folder, link)
            ways.add(place(shard.path, folder / names[shard.name], link))
        if extras:
            write_extras(folder, checkpoint, initial_values(extras) | (values or {}))
        elif checkpoint.indexed:
            shutil.copyfile(checkpoint.folder / INDEX, folder / INDEX)
        for name, path in checkpoint.support_files.items():
            if name in MADE_BY_LIGER:
                continue
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(path, folder / name)
        if own := converted_tokenizer_config(checkpoint):
            _replace(folder / TOKENIZER_CONFIG, own)
        how = "+".join(sorted(ways))
        config = converted_config(plan)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, text in model_files(checkpoint.family).items():
            (folder / name).write_text(text, encoding="utf-8")
        manifest = _manifest(source, plan, how)
        if extras:
            manifest["extras"] = fingerprint((read_shard(folder.resolve(), EXTRAS),))
        manifest |= measured
        if selection := measured.get("selection"):
            from liger_cli.plots import selection_plots

            manifest["selection"] = {**selection, "plots": selection_plots(selection, folder)}
        (folder / "README.md").write_text(model_card(source, plan, manifest), encoding="utf-8")
        write_manifest(folder, manifest)
    return how


def converted_config(plan: Plan) -> dict:
    """The base's config.json, every field kept, with the names of the Liger classes and the `liger` block."""
    family = plan.checkpoint.family
    module, model = f"modeling_liger_{family.model_type}", f"Liger{family.prefix}"
    return {
        **plan.checkpoint.config,
        "architectures": [f"{model}ForCausalLM"],
        "model_type": f"liger_{family.model_type}",
        "auto_map": {"AutoConfig": f"{module}.{model}Config", "AutoModelForCausalLM": f"{module}.{model}ForCausalLM"},
        "liger": liger_block(list(plan.specs)),
    }


def model_card(source: Source, plan: Plan, manifest: dict) -> str:
    """README.md of the converted folder. Names come from strangers: the sandbox and the filters keep them text."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["yaml"] = yaml_string
    environment.filters["code"] = code_span
    template = files("liger_cli.templates").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    kinds = [spec.kind for spec in plan.specs]
    return environment.from_string(template).render(
        name=source.name,
        revision=source.revision,
        spec=next(spec for spec in plan.specs if spec.kind == "liger"),
        windows=_by_layer(plan, "window"),
        kept=_by_layer(plan, "kept"),
        scaled=any(spec.branch_scales for spec in plan.specs),
        added=plan.added_parameters(),
        calibration=_shown_calibration(manifest.get("calibration")),
        counts={kind: kinds.count(kind) for kind in ("liger", "softmax", "base")},
        softmax_heads=[f"{index}:{head}" for index, spec in enumerate(plan.specs) for head in spec.softmax_kv_heads],
        licence=base_licence(plan.checkpoint),
        memory=plan.memory(),
        notes=plan.notes,
        versions=manifest["versions"],
        model=f"Liger{plan.checkpoint.family.prefix}ForCausalLM",
    )


def _by_layer(plan: Plan, setting: str) -> str:
    """A setting of the Liger layers in words: one number, or each with its layers."""
    values = {index: getattr(spec, setting) for index, spec in enumerate(plan.specs) if spec.kind == "liger"}
    return by_layer(values) if len(set(values.values())) > 1 else str(next(iter(values.values())))


def _shown_calibration(report: dict | None) -> dict | None:
    """What the card says of a calibration: text, tokens, figures, layers, shares, and what was of no use."""
    if report is None:
        return None
    kept = report["recurrent_layers"]
    rows = [("the window alone", report["window_only_kl"]), ("this model as converted", report["kl"])]
    return {
        "text": report["text"],
        "tokens": f"{report['tokens']:,}",
        "held_out": f"{report['held_out_tokens']:,}",
        "rows": [(name, f"{value:.4f}") for name, value in rows],
        "layers": ", ".join(map(str, kept)) or "none",
        "rejected": "fitted_kl" in report,
        "dropped": "dropped_kl" in report,
        "shared": _share_note(report.get("kept_shares")),
    }


def _share_note(report: dict | None) -> str:
    if report is None:
        return ""
    from liger_cli.kept_shares import share_note

    sentence = share_note(report)
    return f"{sentence[0].upper()}{sentence[1:]}."


def base_licence(checkpoint: Checkpoint) -> dict[str, str]:
    """The licence fields of the base's model card; `{"license": "other"}` where it has none."""
    found = {}
    with suppress(ModelError):
        with open(inside(checkpoint.folder, "README.md"), "rb") as file:
            text = file.read(FRONT_BYTES).decode("utf-8", "replace")
        front = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        for line in front[1].splitlines() if front else ():
            if match := re.fullmatch(r"(license|license_name|license_link):\s*['\"]?([^'\"\s#]+)['\"]?\s*", line):
                found[match[1]] = match[2]
    return {"license": "other"} | found


def _manifest(source: Source, plan: Plan, how: str) -> dict:
    checkpoint = plan.checkpoint
    return new_manifest(
        "converted",
        base={
            "name": source.name,
            "path": str(checkpoint.folder),
            "revision": source.revision,
            "model_type": checkpoint.family.model_type,
        },
        fingerprint=fingerprint(checkpoint.shards),
        code=code_hashes(checkpoint.family),
        settings={"link": how, "layers": [spec.to_dict() for spec in plan.specs]},
    )


def _check_room(size: int, folder: Path, link: str) -> None:
    if link == "copy" and shutil.disk_usage(folder).free < size:
        raise LigerError(f"the disk of {folder.parent} has too little room for a copy of the weights; use --link auto")
