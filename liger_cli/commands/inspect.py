"""`liger inspect`: what a folder is, what made it, and whether its code and weights are as recorded.

Nothing is loaded and no torch is imported: headers, samples of the weights and hashes of the code are read.
"""

import hashlib
import json
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from liger_cli import __version__
from liger_cli.calibration.text import calibration_note
from liger_cli.checkpoint.converted import Converted, read_converted
from liger_cli.checkpoint.extras import base_shards
from liger_cli.checkpoint.folders import next_step, state_of
from liger_cli.checkpoint.model_code import code_hashes, model_files
from liger_cli.checkpoint.reader import (
    ADAPTER_CONFIG,
    Shard,
    file_sha256,
    fingerprint,
    inside,
    read_checkpoint,
    read_shard,
    read_weights,
)
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, ModelError, UsageError
from liger_cli.system.escape import printable
from liger_cli.system.manifest import read_manifest
from liger_cli.system.untrusted import read_bytes, read_json
from liger_cli.system.wording import size
from liger_cli.templates.liger_extras import NAMES

MAX_CODE = 4 << 20  # bytes of a Python file
MADE = ("converted", "adapter")
RUN, TRAINER = "run.json", "trainer_state.json"


def run(folder: str, *, full: bool = False, as_json: bool = False) -> int:
    """Print what `inspect_folder` finds, and return the exit code: 0 all as recorded, 1 something differs."""
    report = inspect_folder(Path(folder).expanduser(), full)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(printable(line) for line in _lines(report)))
        if not report["differences"]:
            say(next_step(_state(report), report["folder"]))
    return 1 if report["differences"] else 0


def inspect_folder(folder: Path, full: bool = False) -> dict:
    """What a folder is.

    Args:
        full: read the weights whole: their hashes, and whether they are the base's byte by byte.
    Returns:
        What `--json` prints. `differences` are sentences, none where all is as recorded.
    Raises:
        UsageError: no such folder. ModelError: no model, or one that is broken.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    manifest = read_manifest(folder)
    kind = _kind(folder, manifest)
    report = {"folder": str(folder), "kind": kind, "made": _made(manifest), "differences": []}
    looks: dict[str, Callable] = {"base": _base, "adapter": _adapter, "checkpoint": _checkpoint}
    looks.get(kind, _converted)(report, folder, manifest or {}, full)
    if manifest is None and os.path.lexists(folder / TRAINER):
        report["step"] = read_json(inside(folder.resolve(), TRAINER)).get("global_step")
    return report


def _state(report: dict) -> str:
    """What the folder is to `next_step`."""
    if report["kind"] != "converted":
        return report["kind"]
    return state_of(report) if report["made"] else "merged"


def _kind(folder: Path, manifest: dict | None) -> str:
    if manifest is not None:
        return manifest["kind"]
    if os.path.lexists(folder / RUN) or os.path.lexists(folder.resolve().parent.parent / RUN):
        return "checkpoint"
    if os.path.lexists(folder / "config.json"):
        config = read_json(inside(folder.resolve(), "config.json"))
        return "converted" if "liger" in config else "base"
    if os.path.lexists(folder / ADAPTER_CONFIG):
        return "adapter"
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    hint = f"; name one of its checkpoints, such as {folder / checkpoints[-1]}" if checkpoints else ""
    raise ModelError(f"{folder} is not a model: it has no config.json and no {ADAPTER_CONFIG}{hint}")


def _made(manifest: dict | None) -> dict | None:
    if manifest is None:
        return None
    command, versions = manifest.get("command"), manifest.get("versions", {})
    return {
        "by": versions.get("liger"),
        "created": manifest.get("created"),
        "refreshed": manifest.get("refreshed"),
        "command": " ".join(map(str, command)) if isinstance(command, list) else None,
        "format": manifest.get("format"),
        "versions": versions,
    }


def _base(report: dict, folder: Path, manifest: dict, full: bool) -> None:
    checkpoint = read_checkpoint(folder)
    report["model_type"] = checkpoint.family.model_type
    report["paper_gate"] = checkpoint.paper_gate
    _weights(report, checkpoint.shards, None, None, full)


def _converted(report: dict, folder: Path, manifest: dict, full: bool) -> None:
    found = read_converted(folder)
    report["model_type"] = found.family.model_type
    report["format"] = found.config["liger"]["format"]
    report["layers"] = _layers(found)
    base = manifest.get("base", {})
    merged = report["kind"] == "merged"
    wanted = base.get("fingerprint") if merged else manifest.get("fingerprint")
    original = _origin(report, base, wanted)
    recorded = manifest.get("written") if merged else manifest.get("fingerprint")
    _weights(report, found.checkpoint.shards, recorded, original, full, None if merged else manifest.get("extras", {}))
    added = [tensor.numel for name, tensor in found.checkpoint.tensors.items() if name.rpartition(".")[2] in NAMES]
    report["added_parameters"] = sum(added)
    report["calibration"] = manifest.get("calibration")
    from liger_cli.training.recipes import made_for

    report["recipe"] = made_for(manifest)
    _code(report, found, manifest.get("code"))


def _adapter(report: dict, folder: Path, manifest: dict, full: bool) -> None:
    from liger_cli.checkpoint.adapters import ADAPTER_WEIGHTS, read_adapter

    adapter = read_adapter(folder)
    report["ranks"] = sorted({update.rank for update in adapter.updates.values()})
    report["trained_weights"] = len(adapter.updates)
    recipe = manifest.get("settings", {}).get("recipe") or {}
    report["recipe"] = recipe.get("name")
    base = manifest.get("base") or {"path": adapter.config.get("base_model_name_or_path")}
    _origin(report, base, manifest.get("fingerprint"))
    _weights(report, (read_shard(folder.resolve(), ADAPTER_WEIGHTS),), manifest.get("written"), None, full)


def _checkpoint(report: dict, folder: Path, manifest: dict, full: bool) -> None:
    """A run of `liger finetune` that is not finished, or one of its checkpoints."""
    if os.path.lexists(folder / RUN):
        recorded = read_json(inside(folder.resolve(), RUN))
        recipe = recorded.get("recipe")
        report["recipe"] = recipe.get("name") if isinstance(recipe, dict) else None
        report["data"] = recorded.get("data")
        report["steps"] = sorted(
            int(path.parent.name.rpartition("-")[2])
            for path in folder.glob("checkpoints/checkpoint-*/complete")
            if path.parent.name.rpartition("-")[2].isdecimal()
        )
    else:
        report["complete"] = os.path.lexists(folder / "complete")
        if not report["complete"]:
            report["differences"].append("it is not marked complete, so --resume takes an earlier one")


def _layers(found: Converted) -> list[dict]:
    """Runs of equal layers: first, last and their settings."""
    layers, start = [], 0
    for spec, group in groupby(found.specs):
        count = len(list(group))
        layers.append({"first": start, "last": start + count - 1, **spec.to_dict()})
        start += count
    return layers


def _origin(report: dict, base: dict, wanted) -> dict[str, Shard] | None:
    """What the folder was made from, and whether that is still there and the same; its shards where they are."""
    path = base.get("path")
    state, shards = "not recorded", None
    if isinstance(path, str):
        state = "gone"
        if os.path.isdir(path):
            try:
                shards = read_weights(Path(path))
            except (LigerError, OSError):
                state = "no longer a whole model"
            else:
                digest = wanted.get("digest") if isinstance(wanted, dict) else None
                same = fingerprint(shards)["digest"] == digest
                state = "there and the same" if same else "there, with other weights" if digest else "there"
    report["base"] = {name: base.get(name) for name in ("name", "path", "revision")} | {"state": state}
    if state in ("no longer a whole model", "there, with other weights"):
        report["differences"].append(f"its base {path} is {state}")
    return {shard.path.name: shard for shard in shards} if shards else None


def _weights(report: dict, shards, recorded, original, full: bool, extras: dict | None = None) -> None:
    """Parameters, bytes, and for each shard whether it is as recorded and whose file it is.

    Args:
        extras: the record of the shard that a conversion added, which `recorded` then leaves out; `{}` where there is
            none, None where all shards are in `recorded`.
    """
    report["parameters"] = sum(tensor.numel for shard in shards for tensor in shard.tensors.values())
    report["bytes"] = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    expected = _expected(recorded)
    expected_own = _expected(extras)
    files_of_base = {_file_id(shard.path): shard for shard in (original or {}).values()}
    held = []
    own = set() if extras is None else {x.name for x in shards} - {x.name for x in base_shards(tuple(shards))}
    for shard in shards:
        found = shard.fingerprint()
        wanted = expected_own if shard.name in own else expected
        state = "not recorded"
        if wanted is not None:
            state = "as recorded" if _marks(found) in wanted else "differs"
            if state == "differs":
                report["differences"].append(f"{shard.name} is not as recorded")
        if shard.name in own:
            state = f"liger's own tensors, {state}"
        links = os.stat(shard.path).st_nlink
        linked = files_of_base.get(_file_id(shard.path))
        file = "the base's own file (hard link)" if linked else "hard link" if links > 1 else "a file of its own"
        held.append({**found, "state": state, "is": file})
        if full:
            held[-1]["sha256"] = file_sha256(shard.path)
            twin = next((one for one in (original or {}).values() if _marks(one.fingerprint()) == _marks(found)), None)
            if twin is not None and not linked and file_sha256(twin.path) != held[-1]["sha256"]:
                report["differences"].append(f"{shard.name} differs from the base's {twin.name} between the samples")
    report["shards"] = held
    for wanted, count, whose in ((expected, len(shards) - len(own), ""), (expected_own, len(own), " of added tensors")):
        if wanted is not None and len(wanted) != count:
            report["differences"].append(f"{len(wanted)} shards{whose} are recorded and {count} are there")


def _code(report: dict, found: Converted, recorded: dict | None) -> None:
    """For each Python file: as recorded or not, and which liger wrote it."""
    written = code_hashes(found.family)
    recorded = recorded or {}
    here = {path.name for path in found.folder.iterdir() if path.suffix == ".py"}
    states = {}
    for name in sorted(here | set(recorded) | (set(model_files(found.family)) if not recorded else set())):
        if name not in here:
            states[name] = {"state": "missing", "liger": None}
            report["differences"].append(f"the code file {name} is missing")
            continue
        digest = hashlib.sha256(read_bytes(inside(found.folder, name), MAX_CODE)).hexdigest()
        version = f"{__version__} (this installation)" if written.get(name) == digest else None
        state = "not recorded" if name not in recorded else "as recorded" if recorded[name] == digest else "differs"
        states[name] = {"state": state, "liger": version}
        if state == "differs" or version is None:
            whose = f"liger {version} wrote it" if version else "no liger known here wrote it"
            report["differences"].append(
                f"the code file {name} is {'another' if state == 'differs' else state}: {whose}"
            )
    report["code"] = states


def _expected(recorded) -> list[tuple] | None:
    """The marks of every recorded shard; None where nothing is recorded."""
    entries = recorded.get("shards") if isinstance(recorded, dict) else None
    return [_marks(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else None


def _marks(entry: dict) -> tuple:
    return tuple(str(entry.get(name)) for name in ("size", "header_sha256", "samples_sha256"))


def _file_id(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _lines(report: dict) -> list[str]:
    from liger_cli.conversion.plan_table import describe

    titles = {
        "base": "a base model", "converted": "a converted model", "adapter": "an adapter", "merged": "a merged model",
        "checkpoint": "an unfinished fine-tuning run, or a checkpoint of one",
    }  # fmt: skip
    kind = report["kind"]
    saved = ", saved by another program (it has no liger.json)" if kind in MADE and not report["made"] else ""
    lines = [f"{report['folder']}: {titles[kind]}{saved}"]
    if made := report["made"]:
        lines.append(f"made by liger {made['by']} at {made['created']}, format {made['format']}: {made['command']}")
        if made["refreshed"]:
            lines.append(f"code refreshed at {made['refreshed']}")
    if (base := report.get("base")) and base["path"]:
        revision = f" at {base['revision']}" if base["revision"] else ""
        name = f"{base['name']}{revision} in " if base["name"] else ""
        lines.append(f"from {name}{base['path']}: {base['state']}")
    for name in ("model_type", "recipe", "data", "steps", "step", "ranks", "trained_weights"):
        if report.get(name) is not None:
            lines.append(f"{name.replace('_', ' ')}: {report[name]}")
    for layer in report.get("layers", []):
        span = str(layer["first"]) if layer["first"] == layer["last"] else f"{layer['first']}-{layer['last']}"
        lines.append(f"layers {span}: {', '.join(part for part in describe(layer) if part)}")
    if "parameters" in report:
        added = report.get("added_parameters")
        whose = f", {added:,} of them added to the base's" if added else ""
        lines.append(f"{report['parameters']:,} parameters, {size(report['bytes'])} of weights{whose}")
    if calibration := report.get("calibration"):
        merged = report["kind"] == "merged"
        lines.append(calibration_note(calibration) + ", as it was before the merge" * merged)
    for shard in report.get("shards", []):
        whole = f", SHA-256 {shard['sha256']}" if "sha256" in shard else ""
        lines.append(f"  {shard['file']}: {size(shard['size'])}, {shard['state']}, {shard['is']}{whole}")
    for name, code in report.get("code", {}).items():
        writer = f"liger {code['liger']}" if code["liger"] else "unknown"
        lines.append(f"  {name}: {code['state']}, {writer}")
    lines += [f"differs: {sentence}" for sentence in report["differences"]]
    return lines if report["differences"] else [*lines, "all as recorded" if report["made"] else "whole"]
