"""`--push-to-hub`: upload a folder that liger made, without what is private to this machine.

What was typed and where folders lie on this machine stand in fields of their own, which are taken out of the records
first; weights and model code go up as they are.
"""

import json
import re
import tempfile
from pathlib import Path

from liger_cli.checkpoint.tokenizer import VOCABULARIES
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.system.manifest import MANIFEST
from liger_cli.system.wording import size

REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# The fields of these that hold a path, and what was typed, which stands in liger.json.
RECORDS = (MANIFEST, "config.json", "tokenizer_config.json")
PATHS = ("path", "_name_or_path", "name_or_path")
TYPED = "command"
TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".csv", ".txt")
WORDS = (*VOCABULARIES, "merges.txt", "added_tokens.json")  # of a tokenizer, which are no paths


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
    say(f"would upload {len(files)} files, {size(known)}, to {repo} on the hub:")
    for name, nbytes in sorted(files.items()):
        say(f"  {name}" + (f" ({nbytes:,} bytes)" if nbytes is not None else ""))
    return {"repo": repo, "uploaded": False, "files": files}


def push(folder: Path, repo: str) -> dict:
    """Upload a folder in one commit; a repository that is not there yet is made, and is private.

    Returns:
        repo, uploaded, files (name -> bytes) and the url.
    Raises:
        SetupError: the hub does not answer or refuses. LigerError: as of `stage`.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="liger-push-") as temporary:
        files = stage(folder, Path(temporary))
        _asked(repo, api.create_repo, repo, private=True, exist_ok=True)
        url = _asked(repo, api.upload_folder, repo_id=repo, folder_path=temporary, commit_message="Upload by liger")
    say(f"uploaded {len(files)} files to {repo}")
    return {"repo": repo, "uploaded": True, "files": files, "url": str(url)}


def stage(folder: Path, target: Path) -> dict[str, int]:
    """Lay out what is uploaded: links to the files, and records without what was typed and where folders are here.

    Hidden files and Python's caches are left out.

    Returns:
        Name -> bytes.
    Raises:
        LigerError: a record holds a folder of this machine elsewhere.
    """
    files, secrets = {}, _private_strings(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith((".", "__")) for part in name.parts):
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if str(name) in RECORDS:
            record = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_paths)
            place.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            place.symlink_to(path.resolve())
        if path.suffix in TEXTS and path.name not in WORDS:
            text = place.read_text(encoding="utf-8", errors="replace")
            if left := next((secret for secret in secrets if secret in text), None):
                raise LigerError(
                    f"{path} holds {left!r}, which is private to this machine, so nothing was uploaded; take it out "
                    "and run `hf upload`"
                )
        files[str(name)] = place.stat().st_size
    return files


def _without_paths(fields: dict) -> dict:
    """A JSON object whose paths are cut to their last part; names on the hub stay."""
    local = lambda value: isinstance(value, str) and value.startswith(("/", "~", "."))  # noqa: E731
    return {
        name: Path(value).name if name in PATHS and local(value) else value
        for name, value in fields.items()
        if name != TYPED
    }


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
