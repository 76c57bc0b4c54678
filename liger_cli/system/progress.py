"""Progress on stderr: a line that leaves nothing behind, or, where stderr is no terminal, a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from liger_cli.system.console import say

EVERY = 20.0  # seconds between two lines off a terminal


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, done, told = bar.add_task(title, total=total), 0, time.monotonic()

        def step() -> None:
            nonlocal done, told
            bar.advance(task)
            done += 1
            if not console.is_terminal and time.monotonic() - told > EVERY:
                told = time.monotonic()
                say(f"{title}: {done} of {total}")

        yield step
