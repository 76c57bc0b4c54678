"""Writing a converted folder: a base's weights linked, and beside them what makes it a Liger model."""

import json
import shutil
from pathlib import Path

from liger_cli.checkpoint.extras import extra_shapes, initial_values, shard_names, write_extras
from liger_cli.checkpoint.hub import Source
from liger_cli.checkpoint.model_code import code_hashes, model_files
from liger_cli.checkpoint.reader import EXTRAS, INDEX, fingerprint, read_shard
from liger_cli.checkpoint.tokenizer import CONFIG as TOKENIZER_CONFIG
from liger_cli.checkpoint.tokenizer import converted_tokenizer_config
from liger_cli.conversion.card import model_card
from liger_cli.conversion.head_plots import head_plots
from liger_cli.conversion.plan import Plan
from liger_cli.system.errors import LigerError
from liger_cli.system.manifest import MANIFEST, new_manifest, write_manifest
from liger_cli.system.outputs import atomic_folder, copy_file, place
from liger_cli.templates.liger_config import liger_block

MADE_BY_LIGER = ("config.json", "README.md", MANIFEST)


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
            replace_text(folder / TOKENIZER_CONFIG, own)
        how = "+".join(sorted(ways))
        config = converted_config(plan)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, text in model_files(checkpoint.family).items():
            (folder / name).write_text(text, encoding="utf-8")
        manifest = _manifest(source, plan, how)
        if extras:
            manifest["extras"] = fingerprint((read_shard(folder.resolve(), EXTRAS),))
        for name, report in measured.items():
            manifest[name] = report if "heads" not in report else {**report, "plots": head_plots(report, folder)}
        (folder / "README.md").write_text(model_card(source, plan, manifest), encoding="utf-8")
        write_manifest(folder, manifest)
    return how


AUTO_CLASSES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
}


def converted_config(plan: Plan) -> dict:
    """The base's config.json, every field kept, with the names of the Liger classes and the `liger` block."""
    family = plan.checkpoint.family
    module, model = f"modeling_liger_{family.model_type}", f"Liger{family.prefix}"
    return {
        **plan.checkpoint.config,
        "architectures": [f"{model}ForCausalLM"],
        "model_type": f"liger_{family.model_type}",
        "auto_map": {auto: f"{module}.{model}{suffix}" for auto, suffix in AUTO_CLASSES.items()},
        "liger": liger_block(list(plan.specs)),
    }


def planned_files(plan: Plan) -> dict[str, int | None]:
    """What the folder would hold: name -> bytes, None for what is made only then."""
    checkpoint = plan.checkpoint
    extras = extra_shapes(plan.specs, checkpoint.geometry)
    names = shard_names(checkpoint, bool(extras))
    files = dict.fromkeys((*MADE_BY_LIGER, *([EXTRAS] if extras else ())))
    files |= {name: path.stat().st_size for name, path in checkpoint.support_files.items() if name not in files}
    files |= {name: len(text.encode()) for name, text in model_files(checkpoint.family).items()}
    return files | {names[shard.name]: shard.size for shard in checkpoint.shards}


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


def replace_text(path: Path, text: str) -> None:
    """Write a file that may be a link to one that has to stay."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
