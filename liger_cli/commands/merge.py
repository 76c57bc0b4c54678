"""`liger merge`: add LoRA adapters into the weights, tensor by tensor, without ever loading the model.

Shards without a trained tensor are linked; the others are written anew (`merged_shards`).
"""

import json
import os
from pathlib import Path

from liger_cli.checkpoint import publish
from liger_cli.checkpoint.adapters import (
    Adapter,
    base_of_adapter,
    check_fits,
    read_adapter,
    recipe_of,
    untied,
    window_only,
)
from liger_cli.checkpoint.converted import read_converted
from liger_cli.checkpoint.folders import next_step, resolve_model
from liger_cli.checkpoint.merged_shards import is_rewritten, write_shard
from liger_cli.checkpoint.model_code import code_hashes, model_files
from liger_cli.checkpoint.reader import (
    INDEX,
    PICKLES,
    Shard,
    check_dtype,
    file_sha256,
    fingerprint,
    inside,
    read_config,
    read_shard,
    read_weights,
)
from liger_cli.commands.merge_options import MergeOptions
from liger_cli.conversion.card import UNTRAINED
from liger_cli.system.console import say
from liger_cli.system.errors import UsageError
from liger_cli.system.escape import code_span, markdown
from liger_cli.system.manifest import MANIFEST, new_manifest, read_manifest, write_manifest
from liger_cli.system.outputs import LINKS, atomic_folder, check_output, copy_file, place, unchanged
from liger_cli.system.untrusted import read_bytes
from liger_cli.system.wording import counted, without_folders

REPLACED = ("README.md", MANIFEST, "config.json")


def run(
    adapters: list[str | Path] | str | Path | None = None, *, as_json: bool = False, quiet: bool = False, **options
) -> dict:
    """Merge and print what was written.

    Args:
        adapters: as in `MergeOptions`; one may stand without a list.
        quiet: print nothing. options: the other fields of `MergeOptions`.
    Returns:
        The report (what `--json` prints).
    Raises:
        UsageError, ModelError (another base, an adapter that is no plain LoRA), OSError.
    """
    asked = MergeOptions(adapters=[adapters] if isinstance(adapters, (str, Path)) else adapters, **options)
    base, output, dtype, link = asked.base, asked.output, asked.dtype, asked.link
    force, dry_run, push_to_hub = asked.force, asked.dry_run, asked.push_to_hub
    if link not in LINKS:
        raise UsageError(f"--link is {link!r}, but has to be one of {', '.join(LINKS)}")
    if dtype is not None:
        check_dtype(dtype)
    if push_to_hub:
        publish.check(push_to_hub, dry_run)
    folders = [resolve_model(one, "merge") for one in asked.adapters or [None]]
    read = [read_adapter(folder) for folder in folders]
    model = base_of_adapter(read[0], base)
    target = Path(output) if output else Path(f"{model.name}-merged")
    check_output(target, force, base=model)
    shards = read_weights(model)
    found = fingerprint(shards)
    for adapter in read:
        check_fits(adapter, model, shards, found)
    if dry_run:
        trained = _trained(read)
        report = {
            "output": str(target),
            "model": str(model),
            "adapters": [str(adapter.folder) for adapter in read],
            "dtype": dtype,
            "merged_tensors": len(trained),
            "shards": len(shards),
            "linked_shards": sum(not is_rewritten(shard, trained, dtype, untied(read, shards)) for shard in shards),
        }
    else:
        report = merge(read, model, shards, found, target, dtype=dtype, link=link, force=force)
    report["dry_run"] = dry_run
    if push_to_hub and dry_run:
        sizes = {shard.name: shard.size for shard in shards}
        others = {path.name: path.stat().st_size for path in model.iterdir() if path.is_file()}
        report["push"] = publish.preview(push_to_hub, others | sizes | dict.fromkeys(REPLACED))
    elif push_to_hub:
        report["push"] = publish.push(target, push_to_hub)
    if as_json:
        print(json.dumps(report, indent=2))
    elif not quiet:
        done = "would write" if dry_run else "wrote"
        say(
            f"{done} {target}: {counted(report['merged_tensors'], 'weight')} merged, "
            f"{report['linked_shards']} of {counted(report['shards'], 'shard')} linked"
        )
        say(next_step("dry run" if dry_run else "merged", target))
    return report


def merge(
    adapters: list[Adapter],
    model: Path,
    shards: tuple[Shard, ...],
    found: dict,
    target: Path,
    *,
    dtype: str | None = None,
    link: str = "auto",
    force: bool = False,
) -> dict:
    """Write the merged folder; parameters as for `run`, `found` is the fingerprint of `shards`."""
    trained, added = _trained(adapters), untied(adapters, shards)
    ways, linked = set(), 0
    family = read_converted(model).family
    with atomic_folder(target, force) as folder:
        for shard in shards:
            if is_rewritten(shard, trained, dtype, added):
                with unchanged(shard.path, *(adapter.weights.path for adapter in adapters)):
                    write_shard(shard, folder / shard.name, adapters, dtype, added)
            else:
                ways.add(place(shard.path, folder / shard.name, link))
                linked += 1
        for path in sorted(model.rglob("*")):
            name = path.relative_to(model)
            weights = name.suffix == ".safetensors" or name.name == INDEX
            code = name.suffix in (".py", ".pyc", *PICKLES)
            if path.is_dir() or str(name) in REPLACED or weights or code or name.parts[0].startswith((".", "__")):
                continue
            real = inside(model, str(name))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(real, folder / name)
        # Of this version's own, whatever Python lay in the model's folder.
        for name, text in model_files(family).items():
            (folder / name).write_text(text, encoding="utf-8")
        if len(shards) > 1 or (model / INDEX).is_file():
            _write_index(folder, shards)
        _write_config(model, folder, dtype, window_only(adapters), bool(added))
        manifest = _manifest(adapters, model, found, dtype, sorted(ways))
        manifest |= {"code": code_hashes(family), "written": fingerprint(read_weights(folder))}
        (folder / "README.md").write_text(_card(adapters, model, target), encoding="utf-8")
        write_manifest(folder, manifest)
    return {
        "output": str(target),
        "model": str(model),
        "adapters": [str(adapter.folder) for adapter in adapters],
        "dtype": dtype,
        "merged_tensors": len(trained),
        "shards": len(shards),
        "linked_shards": linked,
        "link": "+".join(sorted(ways)) or None,
    }


def _trained(adapters: list[Adapter]) -> set[str]:
    """Names of the tensors that change. Raises UsageError where what two adapters make of one cannot be added."""
    trained = {name for adapter in adapters for name in adapter.trained}
    for name in trained:
        owners = [adapter for adapter in adapters if name in adapter.trained]
        for owner in owners if len(owners) > 1 else ():
            update = owner.updates.get(name)
            if name in owner.replaced or (update and update.magnitude):
                what = "holds all of" if name in owner.replaced else "is DoRA on"
                raise UsageError(
                    f"{owner.folder} {what} {name}, which another adapter trains, too: they cannot be added; merge one"
                )
    return trained


def _write_index(folder: Path, shards: tuple[Shard, ...]) -> None:
    written = [read_shard(folder.resolve(), shard.name) for shard in shards]  # each has to be whole
    total = sum(tensor.nbytes for shard in written for tensor in shard.tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard.name for shard in written for name in shard.tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(model: Path, folder: Path, dtype: str | None, no_recurrence: bool, own_head: bool) -> None:
    config = read_config(model)
    if own_head:
        config["tie_word_embeddings"] = False
    if no_recurrence:
        for layer in config["liger"]["layers"]:
            if layer["kind"] == "liger":
                layer["mix"] = 0.0
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _manifest(adapters: list[Adapter], model: Path, found: dict, dtype: str | None, ways: list[str]) -> dict:
    """`base` is the original checkpoint that the model was converted from, so that it can be compared with."""
    converted = read_manifest(model) or {}
    original = converted.get("base") or {}
    return new_manifest(
        "merged",
        base={**original, "fingerprint": original.get("fingerprint") or converted.get("fingerprint")},
        model={"path": str(model), "fingerprint": found},
        adapters=[
            {
                "path": str(adapter.folder.resolve()),
                "settings": (adapter.manifest or {}).get("settings"),
                "sha256": file_sha256(adapter.weights.path),
            }
            for adapter in adapters
        ],
        settings={"dtype": dtype, "link": "+".join(ways) or None, **_layers(converted)},
        **({"calibration": converted["calibration"]} if "calibration" in converted else {}),
    )


def _layers(converted: dict) -> dict:
    layers = (converted.get("settings") or {}).get("layers")
    return {"layers": layers} if layers else {}


def _card(adapters: list[Adapter], model: Path, target: Path) -> str:
    """The converted model's card with a section on the merge."""
    card = model / "README.md"
    if os.path.lexists(card):
        text = read_bytes(inside(model, card.name)).decode("utf-8", "replace")
    else:
        text = f"# {markdown(target.name)}\n"
    text = text.replace(UNTRAINED, "Converting changed no weight; the fine-tuning below did.")
    lines = []
    for adapter in adapters:
        settings = (adapter.manifest or {}).get("settings") or {}
        recipe, data = recipe_of(adapter).get("name", "unknown"), without_folders(settings.get("data", "unknown"))
        lines.append(f"- {code_span(adapter.folder.name)}: recipe {code_span(recipe)}, data {code_span(data)}")
    return (
        f"{text.rstrip()}\n\n## Fine-tuned\n\nThese LoRA adapters are merged into the weights:\n\n"
        + "\n".join(lines)
        + "\n"
    )
