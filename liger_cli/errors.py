"""What may go wrong, as exceptions that carry their exit code, and the boundary that turns them into one sentence.

Exit codes: 1 failed (disk, data), 2 usage, 3 unsupported or broken model, 4 environment or network, 130 Ctrl-C.
"""

import errno
import os
import sys
from collections.abc import Callable


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
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("liger_cli"):
            return _unexpected(error)
        return _report(f"the package {error.name!r} is missing; install it with pip", SetupError.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        return _report(_os_sentence(error), 1)
    except Exception as error:
        return _unexpected(error)
    return 0


def _unexpected(error: Exception) -> int:
    return _report(f"unexpected {type(error).__name__}: {error}; set LIGER_DEBUG=1 to see where", 1)


def _report(sentence: str, exit_code: int) -> int:
    if os.environ.get("LIGER_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exc()
    print(f"liger: {' '.join(sentence.split())}", file=sys.stderr)
    return exit_code


def _os_sentence(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "; free some space or choose an output on another disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "; check the permissions or choose another output"
    else:
        advice = ""
    where = f"{os.fspath(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror or error}{advice}"
