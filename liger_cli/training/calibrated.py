"""Recipes that begin with a calibration, on a model that has none: a calibrated copy of its folder is made first.

The folder's own weights are linked once more; the base that it was made of need not be there.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from liger_cli.calibration.text import Text, calibration_note, data_name
from liger_cli.checkpoint.converted import read_converted
from liger_cli.checkpoint.extras import extra_shapes
from liger_cli.checkpoint.hub import Source
from liger_cli.checkpoint.reader import Checkpoint
from liger_cli.conversion.plan import Plan, with_defaults
from liger_cli.conversion.requests import Request
from liger_cli.system.console import say
from liger_cli.system.errors import UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.system.outputs import check_output, check_unchanged, file_versions
from liger_cli.system.processes import is_launched, is_main_process
from liger_cli.system.wording import without_folders
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.training.data import Data
from liger_cli.training.plan import Base, read_base
from liger_cli.training.streaming import Stream

LEAST_SHARE = 4  # a calibration wants tokens, and takes as few as one in so many


def is_calibrated(base: Base) -> bool:
    return bool(base.manifest.get("calibration"))


def can_be_calibrated(base: Base) -> bool:
    """Whether the folder is a plain conversion: nothing in it was trained, and some layer has its recurrent branch."""
    return (
        base.manifest.get("kind") == "converted"
        and not extra_shapes(tuple(base.specs), base.geometry)
        and any(spec.kind == "liger" and spec.mix > 0 for spec in base.specs)
    )


def copy_path(base: Base, output: str | Path | None) -> Path:
    """Where the copy of a folder is: beside the adapter, which is in the current folder by default."""
    return Path(output or "").parent / f"{base.folder.name}-calibrated"


def training_text(loaded: Data | Stream, data: str, seed: int) -> Text | None:
    """The examples of a run as they are trained on, one behind another: what a calibration reads beside shipped prose.

    Args:
        data: the value of `--data`. seed: decides which examples, where there are more than a calibration reads.
    Returns:
        None where they are too few, which is said on stderr.
    """
    import numpy as np

    from liger_cli.calibration.calibrate import wanted_tokens

    wanted = wanted_tokens()
    if isinstance(loaded, Stream):
        examples = loaded.examples(seed)
    else:
        least = wanted // LEAST_SHARE
        if loaded.tokens < least:
            say(f"{data} has {loaded.tokens:,} tokens to train on, too few to calibrate on ({least:,})")
            return None
        examples = iter(Random(seed).sample(loaded.train, len(loaded.train)))
    taken, tokens = [], 0
    for example in examples:
        taken.append(example.input_ids)
        tokens += len(example)
        if tokens >= wanted:
            break
    return Text(f"the training data ({without_folders(data)})", np.concatenate(taken), beside_prose=True)


def calibrated_base(
    base: Base,
    target: Path,
    force: bool = False,
    text: str | Callable[[], Text | None] | None = None,
    make: bool = True,
) -> Base:
    """The calibrated copy of a plain conversion; made where it is not there, which is said on stderr.

    Args:
        target: of `copy_path`.
        force: replace a folder of liger's that is there and is no such copy.
        text: what to calibrate on: a file, which a copy that is there has to be calibrated on, or what gives token ids
            once they are needed.
        make: False for a run that goes on with its copy.
    Raises:
        UsageError: there is no copy to go on with, something else is in the way, or several processes would make it.
        LigerError: as of `calibrate.calibrate`.
    """
    specs = calibrated_specs(base.specs)
    name = base.folder.name
    named = text if isinstance(text, str) else None
    if target.exists() and (found := _same_copy(target, base, specs, named)):
        if is_main_process():
            on = found.manifest["calibration"].get("text")
            say(f"taking {target}, the calibrated {name} (calibrated on {on})")
        return found
    if not make:
        raise UsageError(f"{target}, the calibrated {name} that the unfinished run was begun with, is gone")
    if target.exists() and not force:
        raise UsageError(
            f"{target} is in the way of a calibrated copy of {base.folder.name} and is none; replace it with --force, "
            "or move it"
        )
    if is_launched():
        raise UsageError(
            f"{name} is not calibrated, and of several processes none can do it alone; run `liger convert BASE OUTPUT "
            "--calibrate` first and name that output"
        )
    say(f"{name} is not calibrated: calibrating it into {target} (--recipe paper trains it as it is)")
    check_output(target, force, base=base.folder)
    from liger_cli.calibration.calibrate import calibrate
    from liger_cli.conversion.folder import write_converted

    checkpoint = _without_liger(base)
    versions = file_versions(shard.path for shard in checkpoint.shards)
    read = text if named else text and text()
    window = max(spec.window for spec in base.specs if spec.kind == "liger")
    request = Request(kept=2 * window) if _is_open(base.specs) else Request()
    plan, values, report = calibrate(Plan(checkpoint, specs, ()), read, request)
    check_unchanged(versions)
    say(calibration_note(report))
    about = {name: base.manifest[name] for name in ("base", "selection") if name in base.manifest}
    origin = about.get("base", {})
    source = Source(checkpoint.folder, origin.get("name") or base.folder.name, origin.get("revision"))
    write_converted(source, plan, target, "auto", force, {**about, "calibration": report}, values)
    return read_base(target)


def calibrated_specs(specs: list[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers as `liger convert --calibrate` makes them where neither kept tokens nor a normaliser is asked for."""
    return tuple(_calibrated_spec(spec) if spec.kind == "liger" else spec for spec in specs)


def _is_open(specs: list[LayerSpec]) -> bool:
    """Whether nothing was asked for that the kept tokens of a layer depend on, so that they are shared out."""
    return all(spec.kept == 0 for spec in specs if spec.kind == "liger")


def _calibrated_spec(spec: LayerSpec) -> LayerSpec:
    """What is as a plain conversion has it was not asked for, the gate too."""
    asked = {name: value for name, value in spec.to_dict().items() if value != getattr(LayerSpec, name)}
    return LayerSpec(**with_defaults(asked, calibrate=True), backend=spec.backend)


def _without_liger(base: Base) -> Checkpoint:
    """The folder read as its base's: the same weights under the same names, and the base's own config."""
    found = read_converted(base.folder)
    config = {name: value for name, value in found.config.items() if name not in ("liger", "auto_map")}
    config |= {"model_type": found.family.model_type, "architectures": [f"{found.family.prefix}ForCausalLM"]}
    return replace(found.checkpoint, config=config)


def _same_copy(target: Path, base: Base, specs: tuple[LayerSpec, ...], text: str | None) -> Base | None:
    """What lies there, if it is what would be made, but for the kept tokens, which a calibration shares out.

    text: that it has to be calibrated on, if any.
    """
    manifest = read_manifest(target) or {}
    if not manifest.get("calibration") or manifest.get("fingerprint", {}).get("digest") != base.fingerprint["digest"]:
        return None
    if text is not None and manifest["calibration"].get("text") != data_name(text):
        return None
    found = read_base(target)
    return found if _unchosen(found.specs) == _unchosen(specs) else None


def _unchosen(specs) -> list[LayerSpec]:
    return [replace(spec, kept=0, rest=False) for spec in specs]
