"""`liger.json`: what liger made, from what, with which settings and versions. Every folder of liger's has one."""

import json
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from liger_cli import __version__

MANIFEST = "liger.json"
FORMAT = 1
KINDS = ("converted", "adapter", "merged")
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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("kind") in KINDS else None
