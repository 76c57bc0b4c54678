"""`liger.json`: what liger made, from what, with which settings and versions. Every folder of liger's has one."""

import json
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from liger_cli import __version__
from liger_cli.system.errors import LigerError
from liger_cli.system.untrusted import read_json

MANIFEST = "liger.json"
FORMAT = 1
KINDS = ("converted", "adapter", "merged")
SECTIONS = (
    "base",
    "calibration",
    "code",
    "extras",
    "fingerprint",
    "model",
    "result",
    "selection",
    "settings",
    "source",
    "versions",
    "written",
)
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers")


def new_manifest(kind: str, **sections) -> dict:
    """The common fields, then the caller's own.

    Args:
        kind: `converted`, `adapter` or `merged`.
        sections: for instance base, fingerprint, settings.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "created": utc_now(),
        "command": ["liger", *sys.argv[1:]],
        "versions": package_versions(),
        **sections,
    }


def utc_now() -> str:
    """The time as liger.json writes it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat()


def pip_install(extra: str) -> str:
    """The command that gets the packages of an extra of liger's own, however liger itself was installed."""
    from importlib.metadata import requires

    wanted = [line.partition(";")[0].strip() for line in requires("liger-cli") or [] if f'extra == "{extra}"' in line]
    return "pip install " + " ".join(f"'{one}'" for one in wanted)


def package_versions() -> dict[str, str | None]:
    """Installed versions, read without importing the packages; None where one is missing."""
    found = {"liger": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `liger.json`. Raises OSError."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict | None:
    """The folder's `liger.json`, or None where there is none that liger could have written."""
    try:
        manifest = read_json(folder / MANIFEST)
    except LigerError:
        return None
    if manifest.get("kind") not in KINDS or not _sections_fit(manifest) or not _is_strict(manifest):
        return None
    return {name: value for name, value in manifest.items() if value is not None}


def _sections_fit(manifest: dict) -> bool:
    """Whether every section is of the kind that liger writes; None stands for one that is left out."""
    adapters = manifest.get("adapters") or []
    recipe = (_object(manifest.get("settings")) or {}).get("recipe")
    inner = [manifest.get(name) for name in SECTIONS] + [recipe]
    base = _object(manifest.get("base")) or {}
    paths = [base.get("path"), base.get("name"), (_object(manifest.get("model")) or {}).get("path")]
    return (
        all(_object(one) is not None for one in inner)
        and isinstance(adapters, list)
        and all(isinstance(one, dict) for one in adapters)
        and all(path is None or (isinstance(path, str) and "\0" not in path) for path in paths)
    )


def _is_strict(manifest: dict) -> bool:
    """Whether every number is finite, as in all that liger writes: sections are copied into other folders' files."""
    try:
        json.dumps(manifest, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _object(value) -> dict | None:
    """A JSON object, `{}` for null, None for anything else."""
    return {} if value is None else value if isinstance(value, dict) else None
