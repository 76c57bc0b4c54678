"""Reading files that strangers wrote: plain files only, of a bounded size, and JSON that cannot exhaust its parser."""

import json
import os
import stat
from pathlib import Path

from liger_cli.system.errors import LigerError, ModelError
from liger_cli.system.wording import size

MAX_JSON = 64 << 20  # bytes
# What git leaves in place of a large file: Git LFS (and its first name), git-annex.
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/", b"/annex/objects/")


def read_bytes(path: Path, limit: int = MAX_JSON, error: type[LigerError] = ModelError) -> bytes:
    """The content of a plain file. Pipes and devices are not opened, so that nothing waits for them.

    Args:
        limit: the largest size in bytes that is read.
        error: what to raise.
    Raises:
        `error`: missing, unreadable, not a plain file, or larger than `limit`.
    """
    try:
        plain, content = stat.S_ISREG(os.stat(path).st_mode), b""
        # Without O_NONBLOCK a pipe put there in between would wait for a writer.
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            plain = plain and stat.S_ISREG(found.st_mode)
            if plain:
                content = file.read(min(limit, found.st_size) + 1)
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read ({getattr(reason, 'strerror', None) or reason})") from None
    if not plain:
        raise error(f"{path} is not a plain file")
    if len(content) > limit:
        raise error(f"{path} is larger than {size(limit, 0)}, which liger does not read")
    refuse_pointer(content, path, error)
    return content


def refuse_pointer(head: bytes, path: Path, error: type[LigerError] = ModelError) -> None:
    """Raises `error` where a file is what git leaves in place of a large one that was not fetched.

    Args:
        head: its first bytes, 100 or more where it has so many.
    """
    if head.startswith(POINTERS):
        fetch = "git annex get ." if head.startswith(POINTERS[-1]) else "git lfs pull"
        raise error(f"{path} is a pointer that git left in the file's place; run `{fetch}` in {path.parent}")


def parse_json(content: bytes, path: Path, error: type[LigerError] = ModelError) -> dict:
    """A JSON object. Raises `error` where it is broken, nested too deeply, or something else."""
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise error(f"{path} is nested too deeply to be read as JSON") from None
    except ValueError as reason:
        raise error(f"{path} is not valid JSON ({str(reason)[:200]}); download the file again") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def read_json(path: Path, error: type[LigerError] = ModelError) -> dict:
    """A JSON object from a plain file of at most 64 MiB. Raises `error`."""
    return parse_json(read_bytes(path, error=error), path, error)


def _open_at_once(path, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
