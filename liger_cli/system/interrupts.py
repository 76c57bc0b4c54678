"""Ctrl-C, termination and hang-up: while a command runs they unwind it, so that half-written folders are removed;
before and after that the process ends at once.

A signal that the parent set to be ignored (`nohup`, a job in the background) stays ignored.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
AGAIN = 0.1  # seconds

_received: list[int] = []
_postponed = False


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command; like Ctrl-C for whoever catches that. `exit_code` is 128 + its number."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


def received() -> Interrupted | None:
    """The signal that arrived, if one did: what fails after it fails because of it."""
    return Interrupted(_received[0]) if _received else None


def quit_at_once() -> None:
    """Signals end the process without a word: nothing is half-written before and after a command."""
    _handle(lambda number, _: os._exit(128 + number))


def unwind() -> None:
    """Signals raise `Interrupted` in the main thread."""
    _handle(_raise)
    sys.unraisablehook = _unraisable


@contextmanager
def unwinding() -> Iterator[None]:
    """`unwind` within the block; afterwards signals do what they did before. For the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    unwind()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def postponed() -> Iterator[Callable[[], None]]:
    """Signals of `unwind` wait in the block until the function that it gives is called, which raises one that came.

    For what is made and has to be removed again: it is called where that is looked after.
    """
    global _postponed
    before = len(_received)

    def go_on() -> None:
        global _postponed
        _postponed = False
        if len(_received) > before:
            raise Interrupted(_received[-1])

    _postponed = True
    try:
        yield go_on
    finally:
        _postponed = False


def _handle(handler) -> None:
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, _frame) -> None:
    _received.append(number)
    if not _postponed:
        raise Interrupted(number)


def _unraisable(failure) -> None:
    """Python drops what is raised in a finalizer or in a callback from C; an interruption is then raised once more."""
    if isinstance(failure.exc_value, Interrupted) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: _raise(failure.exc_value.exit_code - 128, None))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
    elif not _received:
        sys.__unraisablehook__(failure)
