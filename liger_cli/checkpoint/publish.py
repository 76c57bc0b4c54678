"""`--push-to-hub`: upload a folder that liger made, without what is private to this machine.

Paths of this machine and what was typed are taken out of the records first; weights and model code go up as they are.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.system.manifest import MANIFEST
from liger_cli.system.wording import size

REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
RECORDS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".csv", ".txt")  # text that liger writes and people read
RECORD_BYTES = 4 << 20  # tokenizers are larger and hold no paths
# An absolute, home or dotted path, or a relative one of three parts or more; not a hub id, a URL or a fraction.
PART = r"[^\s/,:;'\"`()\[\]<>|]+"
PATH = re.compile(rf"(?<![\w.:/~-])(?:(?:~[\w.-]*|\.{{1,2}})?/{PART}|[\w.-]+/{PART}(?=/))(?:/{PART})*/?")


def check(repo: str, dry_run: bool = False) -> None:
    """Refuse before any work is done what could not be uploaded at its end.

    Raises:
        UsageError: not the name of a repository. SetupError: no token, or the hub does not answer or accept it.
    """
    if not REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise UsageError(f"--push-to-hub is {repo!r:.100}, but has to be NAME or OWNER/NAME of a repository on the hub")
    if dry_run:
        return
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise SetupError("--push-to-hub needs a token of the hub; run `hf auth login`, or set HF_TOKEN")
    _asked(repo, huggingface_hub.HfApi().whoami)


def preview(repo: str, files: dict[str, int | None]) -> dict:
    """What an upload would hold, printed on stderr and returned.

    Args:
        files: name -> bytes, None where they are written only then.
    """
    known = sum(nbytes or 0 for nbytes in files.values())
    print(f"liger: would upload {len(files)} files, {size(known)}, to {repo} on the hub:", file=sys.stderr)
    for name, nbytes in sorted(files.items()):
        print(f"liger:   {name}" + (f" ({nbytes:,} bytes)" if nbytes is not None else ""), file=sys.stderr)
    return {"repo": repo, "uploaded": False, "files": files}


def push(folder: Path, repo: str) -> dict:
    """Upload a folder in one commit; a repository that is not there yet is made, and is private.

    Returns:
        repo, uploaded, files (name -> bytes) and the url.
    Raises:
        SetupError: the hub does not answer or refuses. LigerError: a record holds a path that could not be taken out.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="liger-push-") as temporary:
        files = stage(folder, Path(temporary))
        _asked(repo, api.create_repo, repo, private=True, exist_ok=True)
        url = _asked(repo, api.upload_folder, repo_id=repo, folder_path=temporary, commit_message="Upload by liger")
    print(f"liger: uploaded {len(files)} files to {repo}", file=sys.stderr)
    return {"repo": repo, "uploaded": True, "files": files, "url": str(url)}


def stage(folder: Path, target: Path) -> dict[str, int]:
    """Lay out what is uploaded: links to the files, and cleaned copies of the records. Name -> bytes.

    Hidden files and Python's caches are left out.
    """
    files = {}
    secrets = _private_strings(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith((".", "__")) for part in name.parts):
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in RECORDS and path.stat().st_size <= RECORD_BYTES:
            text = _cleaned(path, secrets)
            if left := next((secret for secret in secrets if secret in text), None):
                raise LigerError(f"{path} holds {left!r}, which is private to this machine; it was not uploaded")
            place.write_text(text, encoding="utf-8")
        else:
            place.symlink_to(path.resolve())
        files[str(name)] = place.stat().st_size
    return files


def _cleaned(path: Path, secrets: list[str]) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name == MANIFEST:
        manifest = json.loads(text)
        manifest.pop("command", None)
        return json.dumps(_without_paths(manifest, secrets), indent=2) + "\n"
    if not any(secret in text for secret in secrets):
        return text
    if path.suffix == ".json":
        return json.dumps(_without_paths(json.loads(text), secrets), indent=2) + "\n"
    return _shortened(text, secrets)


def _without_paths(value, secrets: list[str]):
    """Plain data with every path in its strings cut to its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(one, secrets) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one, secrets) for one in value]
    return _shortened(value, secrets) if isinstance(value, str) else value


def _shortened(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(f"{secret}/", "").replace(secret, Path(secret).name)
    return PATH.sub(_last_part, text)


def _last_part(match: re.Match) -> str:
    return match[0].rstrip("/").rpartition("/")[2]


def _private_strings(folder: Path) -> list[str]:
    """What no record may hold: the home folder, and the folders in which this one and its base lie."""
    found = {str(Path.home()), str(folder.resolve().parent), str(Path.cwd())}
    try:
        base = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("base", {}).get("path")
    except (OSError, ValueError, AttributeError):
        base = None
    if isinstance(base, str):
        found |= {base, str(Path(base).parent)}
    return sorted((one for one in found if one.count("/") > 1 or one == str(Path.home())), key=len, reverse=True)


def _asked(repo: str, call, *args, **kwargs):
    """A call to the hub, whose failures are one sentence."""
    try:
        return call(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise SetupError(
            f"{repo} could not be written on the hub ({reason}); check the network, your token and its rights"
        ) from None
