"""Which folder a command takes when none is named: the newest fitting one in the current folder."""

import shlex
from datetime import datetime
from pathlib import Path

from liger_cli.system.console import say
from liger_cli.system.errors import UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.system.processes import is_main_process

FITTING = {
    "finetune": ("converted",),
    "merge": ("adapter",),
    "eval": ("merged", "adapter", "converted"),
    "bench": ("merged", "adapter", "converted"),
}
MAKERS = {"converted": "liger convert", "adapter": "liger finetune", "merged": "liger merge"}


def resolve_model(given: str | Path | None, command: str, here: Path | None = None) -> Path:
    """The folder named by the user, or the newest fitting one, which is then named on stderr.

    Args:
        given: what the user typed, or None.
        command: a key of `FITTING`: `finetune` takes a converted folder, `merge` an adapter, `eval` and `bench` a
            merged folder, else an adapter, else a converted one.
        here: where to look; the current folder by default.
    Raises:
        UsageError: the named folder is not there, none fits, or the two newest were made at the same moment.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise UsageError(f"{given} is not a folder; name one that liger made")
        return Path(given)
    found = newest(FITTING[command], here or Path())
    kind = read_manifest(found)["kind"]
    if is_main_process():
        say(f"taking {found}, the newest {kind} model here")
    return found


def state_of(report: dict) -> str:
    """What a converted folder is to `next_step`: `calibrated`, `window-only`, or `plain` or `unfitted`, to be trained.

    Args:
        report: of `convert` or `inspect`; its `layers` have the fields of `LayerSpec` that their kind has.
    """
    if report.get("calibration"):
        return "calibrated"
    if not any(layer["kind"] == "liger" and layer["mix"] > 0 for layer in report["layers"]):
        return "window-only"
    # With parameters beside the base's, or a recipe of its own, `liger finetune` does not calibrate it.
    return "unfitted" if report["added_parameters"] or report.get("recipe") else "plain"


def next_step(kind: str, folder: Path | str = "") -> str:
    """What a user does next with a folder: of `state_of`, `adapter`, `merged`, `evaluated`, `timed`, ..."""
    name = shlex.quote(str(folder))
    return {
        "plain": (
            "this folder is the start of a model and none to use yet: nothing in its recurrent branch is fitted; next: "
            f"liger finetune {name} (which calibrates it first), or convert again with --calibrate (trains nothing)"
        ),
        "unfitted": (
            "this folder is the start of a model and none to use yet: nothing in its recurrent branch is fitted; next: "
            f"liger finetune {name} (which trains it as it is), or convert again with --calibrate (trains nothing)"
        ),
        "calibrated": f"next: liger finetune {name}, or liger eval {name} to see what it is worth untrained",
        "window-only": f"next: liger eval {name}",
        "adapter": f"next: liger merge {name}",
        "merged": f"next: liger eval {name}",
        "evaluated": f"next: liger bench {name}",
        "timed": f"next: use it: AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)",
        "base": f"next: liger convert {name}",
        "checkpoint": "next: the command that began this run, with --resume",
        "dry run": "next: the same command without --dry-run",
    }[kind]


def newest(kinds: tuple[str, ...], here: Path) -> Path:
    """The newest folder of the first kind that has any, by the creation time in its `liger.json`.

    Raises:
        UsageError: there is none, or two share the newest time.
    """
    made = {kind: [] for kind in kinds}
    for folder in sorted(here.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        manifest = read_manifest(folder)
        if manifest is not None and manifest["kind"] in made and (created := _created(manifest)):
            made[manifest["kind"]].append((created, folder))
    for kind in kinds:
        ranked = sorted(made[kind], key=lambda pair: pair[0], reverse=True)
        if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
            raise UsageError(f"{ranked[0][1]} and {ranked[1][1]} were made at the same moment; name the one you mean")
        if ranked:
            return ranked[0][1]
    wanted = " or ".join(f"{kind} folder (made by `{MAKERS[kind]}`)" for kind in kinds)
    raise UsageError(f"no {wanted} here; name a folder")


def _created(manifest: dict) -> datetime | None:
    try:
        created = datetime.fromisoformat(manifest["created"])
    except (KeyError, TypeError, ValueError):
        return None
    return created if created.tzinfo else None
