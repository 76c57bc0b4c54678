"""Writing folders and files that appear whole or not at all, and placing big files without copying them."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    by the next run with the same output. The caller has called `check_output`.

    Raises:
        OSError: the disk is full, the parent cannot be written to.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    _restore_replaced(output)
    _remove_stale(output)
    partial, lock = _locked_temporary(output, folder=True)
    try:
        yield partial
        _sync_tree(partial)
        partial.chmod(0o777 & ~_umask())
        if os.path.lexists(output) or not _rename_new(partial, output):
            check_output(output, force)  # a run beside this one may have made it meanwhile
            _exchange(partial, output)
        _sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextmanager
def claimed_folder(folder: Path, fresh: bool) -> Iterator[None]:
    """A working folder that one process at a time has; what lies in it outlives the process.

    Args:
        fresh: empty it first.
    Raises:
        UsageError: another process has it.
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(lock):
            raise UsageError(f"another run is writing to {folder}; wait for it, or name another output")
        if fresh:
            for entry in list(folder.iterdir()):
                _remove(entry)
        yield
    finally:
        os.close(lock)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears whole or not at all, and never through a hard link.

    What a killed writer of the same file left behind is removed.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = Path(os.path.abspath(path))
    _remove_stale(path)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    temporary, descriptor = _locked_temporary(path, folder=False)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def _locked_temporary(output: Path, folder: bool) -> tuple[Path, int]:
    """A fresh `.NAME.partial-PID-N`, opened, and locked, which says that its writer is alive."""
    for attempt in range(100):
        partial = output.parent / f".{output.name}.partial-{os.getpid()}-{attempt}"
        try:
            if folder:
                partial.mkdir(mode=0o700)
            lock = os.open(partial, os.O_RDONLY if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except (FileExistsError, FileNotFoundError):
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.stat(partial).st_ino == os.fstat(lock).st_ino:
                return partial, lock
        os.close(lock)
    raise LigerError(f"nothing temporary could be made beside {output}; remove the .{output.name}.partial-* there")


def _remove_stale(output: Path) -> None:
    """Remove temporary folders and files of `output` whose writers are gone."""
    pattern = re.compile(re.escape(f".{output.name}.partial-") + r"\d+-\d+")
    for entry in output.parent.iterdir():
        if not pattern.fullmatch(entry.name) or entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            continue
        with suppress(OSError):
            lock = os.open(entry, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its writer may have renamed it meanwhile, and another one taken the name.
                if os.stat(entry).st_ino == os.fstat(lock).st_ino:
                    _remove(entry)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file or folder; False where another process has it.

    Some network file systems have no locks: there nothing is ever taken for stale, and nobody is kept out.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _rename_new(new: Path, name: Path) -> bool:
    """Give a folder a name that is free; False where it is taken after all."""
    try:
        os.rename(new, name)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _restore_replaced(output: Path) -> None:
    """Give a folder its name back that a killed run had set aside."""
    pattern = re.compile(re.escape(f".{output.name}.replaced-") + r"\d+")
    for aside in output.parent.iterdir():
        if not pattern.fullmatch(aside.name):
            continue
        if os.path.lexists(output):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, output)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, with a way back."""
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
