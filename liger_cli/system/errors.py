"""What may go wrong, as exceptions that carry their exit code, and the boundary that turns them into one sentence.

Exit codes: 1 failed (disk, data), 2 usage, 3 unsupported or broken model, 4 environment or network, 130 Ctrl-C, 143
termination.
"""

import errno
import os
import re
import sys
from collections.abc import Callable

from liger_cli.system import interrupts
from liger_cli.system.escape import printable

SENTENCE = 2000  # characters; a longer one quotes a value that somebody made long
TORCH_WRITER = re.compile(r"inline_container\.cc|PytorchStreamWriter failed writing")


class LigerError(Exception):
    """A failure that one sentence explains: what is wrong, with the file or value, and what to do. Exit code 1."""

    exit_code = 1


class UsageError(LigerError):
    """The command line asks for something that cannot be done: a wrong value, an existing output, no model."""

    exit_code = 2


class ModelError(LigerError):
    """The model given is not supported or is broken."""

    exit_code = 3


class SetupError(LigerError):
    """Something around liger is missing: a package, the network, a device."""

    exit_code = 4


def guarded(call: Callable[[], object], passing: tuple[type[BaseException], ...] = ()) -> int:
    """Run `call`; print a failure as one sentence on stderr and return the exit code (0 where it went well).

    `LIGER_DEBUG=1` prints the traceback as well. A closed pipe, SystemExit and the exceptions in `passing` go through.
    """
    try:
        call()
    except passing:
        raise
    except LigerError as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _interrupted(error)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("liger_cli"):
            return _unexpected(error)
        return _report(f"the package {error.name!r} is missing; install it with pip", SetupError.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        if signalled := interrupts.received():
            return _interrupted(signalled)
        return _report(_os_sentence(error), 1)
    except Exception as error:
        if signalled := interrupts.received():
            return _interrupted(signalled)
        # The model code, which does not know these classes, names an exit code where its sentence says it all.
        if exit_code := getattr(error, "liger_exit_code", None):
            return _report(str(error), exit_code)
        if number := write_errno(error):
            return _report(_os_sentence(OSError(number, os.strerror(number))), 1)
        if is_out_of_memory(error):
            return _report("there is not enough memory left; `liger doctor MODEL` tells which commands will fit", 1)
        return _unexpected(error)
    except BaseException as error:
        if not is_panic(error):
            raise
        return _unexpected(error)
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch on a CPU or torch on a device could not get memory; torch is not imported for it."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust panicked, which is no Exception to Python."""
    return type(error).__name__ == "PanicException"


def flush_stdout() -> None:
    """Raises OSError where the output cannot be written; it is dropped then, or Python would try again at its exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def write_errno(error: BaseException) -> int | None:
    """The errno behind a failed write, also where safetensors or torch report it in classes of their own, or None.

    torch does not say why it could not write; a full disk is by far the likeliest reason.
    """
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return errno.ENOSPC if TORCH_WRITER.search(str(error)) else None


def _interrupted(error: KeyboardInterrupt) -> int:
    return _report("interrupted", getattr(error, "exit_code", 130))


def _unexpected(error: BaseException) -> int:
    return _report(f"unexpected {type(error).__name__}: {error}; set LIGER_DEBUG=1 to see where", 1)


def _report(sentence: str, exit_code: int) -> int:
    if os.environ.get("LIGER_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exc()
    sentence = printable(" ".join(sentence.split()))
    print(f"liger: {sentence if len(sentence) <= SENTENCE else sentence[:SENTENCE] + '...'}", file=sys.stderr)
    return exit_code


def _os_sentence(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "; free some space or choose an output on another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "; check the permissions or choose another output"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = "; a file is in the way where a folder has to be"
    else:
        advice = ""
    where = f"{os.fspath(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror or error}{advice}"
