"""Writing a folder that appears whole or not at all, and placing big files in it without copying them."""

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from liger_cli.errors import LigerError, UsageError
from liger_cli.manifest import MANIFEST, read_manifest

LINKS = ("auto", "hard", "copy")
FICLONE = 0x40049409  # Linux ioctl: share the extents of another file
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def check_output(output: Path, force: bool, base: Path | None = None) -> None:
    """Refuse an output that is in the way.

    Args:
        output: the folder to be written.
        force: replace it, if it is a folder that liger made.
        base: a folder that must not be touched, so that neither may lie in the other.
    Raises:
        UsageError: it exists without `force`, is not liger's, or overlaps the base.
    """
    if base is not None:
        real, base = output.resolve(), base.resolve()
        if real == base or real.is_relative_to(base) or base.is_relative_to(real):
            raise UsageError(f"the output {output} and the base {base} lie in one another; name an output elsewhere")
    if not os.path.lexists(output):
        return
    if not force:
        raise UsageError(f"{output} exists already; name another output, or replace it with --force")
    if output.is_symlink() or read_manifest(output) is None:
        raise UsageError(f"{output} was not made by liger (it has no {MANIFEST}), so --force does not replace it")


@contextmanager
def atomic_folder(output: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well and is removed otherwise.

    With `force` the folder that was there stays until the new one is complete. What a killed run left behind is removed
    by the next run with the same output. The caller has called `check_output`.

    Raises:
        OSError: the disk is full, the parent cannot be written to.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(output)
    partial, lock = _locked_folder(output)
    try:
        yield partial
        _sync_tree(partial)
        partial.chmod(0o777 & ~_umask())
        if os.path.lexists(output):
            check_output(output, force)
            _exchange(partial, output)
        else:
            os.rename(partial, output)
        _sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def place(source: Path, target: Path, link: str) -> str:
    """Put `source` at `target` and return how: `reflink`, `hard` or `copy`.

    Args:
        link: `auto` takes the first of the three that the file system can, `hard` and `copy` insist.
    Raises:
        LigerError: `hard` where the file system cannot.
        OSError: the disk is full or cannot be written to.
    """
    if link == "auto" and _reflink(source, target):
        return "reflink"
    if link in ("auto", "hard"):
        try:
            os.link(source, target)
            return "hard"
        except OSError as error:
            if link == "hard":
                raise LigerError(
                    f"{source} cannot be hard-linked to {target.parent.parent} ({error.strerror}); "
                    "choose an output on the same file system, or --link auto"
                ) from None
    shutil.copyfile(source, target)
    return "copy"


def _reflink(source: Path, target: Path) -> bool:
    with open(source, "rb") as reader, open(target, "xb") as writer, suppress(OSError):
        fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        return True
    target.unlink()
    return False


def _locked_folder(output: Path) -> tuple[Path, int]:
    """A fresh `.NAME.partial-PID` and the lock on it that says that its writer is alive."""
    for attempt in range(100):
        partial = output.parent / f".{output.name}.partial-{os.getpid()}-{attempt}"
        try:
            partial.mkdir(mode=0o700)
            lock = os.open(partial, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError):
            continue
        with suppress(OSError):  # some network file systems have no locks; then nothing is ever taken for stale
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.stat(partial).st_ino == os.fstat(lock).st_ino:
                return partial, lock
        os.close(lock)
    raise LigerError(f"no temporary folder could be made beside {output}; remove the .{output.name}.partial-* there")


def _remove_stale(output: Path) -> None:
    pattern = re.compile(re.escape(f".{output.name}.partial-") + r"\d+-\d+")
    for entry in output.parent.iterdir():
        if not pattern.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
            continue
        with suppress(OSError):
            lock = os.open(entry, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(lock)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the kernel can, else in two with a way back."""
    with suppress(AttributeError):
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        if renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
            return
    aside = old.with_name(f".{old.name}.replaced-{os.getpid()}")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _sync_tree(folder: Path) -> None:
    """Flush what was written here; a file with other links was not written here."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.stat().st_nlink == 1:
                _sync(path)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
