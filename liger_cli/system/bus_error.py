"""A shard that somebody shortens while torch reads it through a memory map: one sentence in place of a dead process.

Reading beyond the end of a mapped file is a bus error. Python's own handlers run too late for it, when the instruction
that failed has ended, so this one is called by the C library. Linux only; elsewhere the signal does what it did.
"""

import ctypes
import os
import signal
import sys

from liger_cli.system.escape import printable

SA_SIGINFO = 4
CODE, ADDRESS = 8, 16  # offsets of `si_code` and `si_addr` in siginfo_t where pointers have 64 bits

_kept = []  # what C calls has to stay alive


class _Action(ctypes.Structure):
    """`struct sigaction` of Linux's C libraries where pointers have 64 bits."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def explain() -> None:
    """From now on a bus error in a mapped file ends the process with a sentence that names it, and exit code 1."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32 or _kept:
        return
    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)
    _kept.extend((libc, handler))
    action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p).value, flags=SA_SIGINFO)
    libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), None)


def _on_bus_error(number: int, info: int, _context) -> None:
    """In whatever thread was reading; nothing is unwound, as after a kill."""
    try:
        by_the_kernel = ctypes.c_int.from_address(info + CODE).value > 0
        if by_the_kernel and (file := _mapped_file(ctypes.c_uint64.from_address(info + ADDRESS).value)):
            sentence = (
                f"liger: {printable(file)} could not be read to its end: it was shortened meanwhile or its disk fails; "
                "run the command again\n"
            )
            os.write(2, sentence.encode("utf-8", "replace"))
            os._exit(1)
    finally:
        _kept[0].signal(number, None)  # what happens by default: the process ends
        os.kill(os.getpid(), number)


def _mapped_file(address: int) -> str | None:
    """The file whose mapping an address of this process lies in."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            span, *_, name = [*line.rstrip("\n").split(None, 5), ""][:6]
            first, last = (int(bound, 16) for bound in span.split("-"))
            if first <= address < last:
                return name if name.startswith("/") else None
    return None
