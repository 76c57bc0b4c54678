"""Ctrl-C, termination and hang-up: while a command runs they unwind it, so that half-written folders are removed;
before and after that the process ends at once.

A signal that the parent set to be ignored (`nohup`, a job in the background) stays ignored.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[int] = []


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


@contextmanager
def unwinding() -> Iterator[None]:
    """Within, signals raise `Interrupted` in the main thread; afterwards they do what they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    _handle(_raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _handle(handler) -> None:
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, _frame) -> None:
    _received.append(number)
    raise Interrupted(number)
