"""Writing folders and files that appear whole or not at all, and placing big files without copying them."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.manifest import MANIFEST, read_manifest

LINKS = ("auto", "hard", "copy")
FICLONE = 0x40049409  # Linux ioctl: share the extents of another file


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
    by the next run with the same output, which waits for one that is alive. The caller has called `check_output`.

    Raises:
        UsageError: the name was taken meanwhile.
        OSError: the disk is full, the parent cannot be written to.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    with _locked(output, lambda: say(f"waiting for another run, which is writing {output}")):
        _settle(output)
        if os.path.lexists(output):
            check_output(output, force)
        try:
            partial.mkdir()
            yield partial
            _sync_tree(partial)
            if os.path.lexists(output):
                check_output(output, force)
                os.rename(output, _aside(output))  # a folder cannot be renamed over one that holds files
            os.rename(partial, output)
            _sync(output.parent)
        finally:
            _settle(output)


@contextmanager
def claimed_folder(folder: Path, fresh: bool) -> Iterator[None]:
    """A working folder that one process at a time has; what lies in it outlives the process.

    Args:
        fresh: empty it first.
    Raises:
        UsageError: another process has it.
        OSError: it cannot be made.
    """

    def refuse() -> None:
        raise UsageError(f"another run is writing to {folder}; wait for it, or name another output")

    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, refuse):
        if fresh:
            for entry in list(folder.iterdir()):
                _remove(entry)
        yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, and never through a hard link.

    What a killed writer of the same file left behind is removed.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.partial")
    with _locked(path):
        partial.unlink(missing_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
                if path.exists():
                    os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Files that must not be written to by others within the block, since they are read in it.

    Raises:
        LigerError: one of them was.
    """
    before = file_versions(paths)
    yield
    check_unchanged(before)


def file_versions(paths: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """What tells that a file was written to or replaced: inode, size, time of the last change."""
    return {path: _version(path) for path in paths}


def check_unchanged(versions: dict[Path, tuple[int, int, int]]) -> None:
    """Raises LigerError where one of the files has changed since `file_versions` looked."""
    for path, version in versions.items():
        if not path.exists() or _version(path) != version:
            raise LigerError(f"{path} was changed while it was read; run the command again")


def copy_file(source: Path, target: Path) -> None:
    """A copy that shares its blocks with the source where the file system can.

    For files that users and tokenizers edit in place: through a hard link that would edit the base.
    """
    if not _reflink(source, target):
        shutil.copyfile(source, target)


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
    with unchanged(source):
        shutil.copyfile(source, target)
    return "copy"


def place_tree(source: Path, target: Path) -> None:
    """Every file of a folder, at any depth, put into another one as `place` does with `auto`. Raises OSError."""
    put = lambda one, to: place(Path(one), Path(to), "auto")  # noqa: E731
    shutil.copytree(source, target, copy_function=put, dirs_exist_ok=True)


def _reflink(source: Path, target: Path) -> bool:
    with open(source, "rb") as reader, open(target, "xb") as writer, suppress(OSError):
        fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        return True
    target.unlink()
    return False


@contextmanager
def _locked(path: Path, taken: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time, and one thread of it, works on `path`; the others wait.

    Args:
        taken: called where another one has the lock.
    """
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            taken()
            lock.acquire()
        yield
    finally:
        if not lock.is_locked:  # a signal on the way to it may have left the file
            with suppress(Timeout, OSError):
                lock.acquire(timeout=0)
        if lock.is_locked:
            file.unlink(missing_ok=True)  # still held: who waits for it finds that it is gone, and makes another
            lock.release()


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _settle(output: Path) -> None:
    """Give a folder its name back that was set aside and not replaced, and remove all else that a run leaves."""
    aside = _aside(output)
    if aside.exists() and not os.path.lexists(output):
        os.rename(aside, output)
    for path in (aside, output.with_name(f".{output.name}.partial")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


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
