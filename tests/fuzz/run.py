"""Fuzzing of everything that liger reads from strangers.

    python tests/fuzz/run.py 100000 [target ...] [--seed N] [--out FILE]

Each input starts from something valid, is changed by `mutate`, and goes to the functions behind the commands. Allowed
is a result, or one of liger's own errors. Anything else is a finding: another exception, more than `SECONDS`, more than
`MEMORY`, or a file opened outside. A finding is printed with the seed that makes it again.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from targets import TARGETS, World  # noqa: E402

SECONDS = 20  # of processor time for one input; honest ones take milliseconds
WAITED = 10  # times as long may pass by the clock, on a machine that is busy
MEMORY = 1 << 30  # bytes that all inputs of a run may add to the process
OURS = ("liger_cli", "templates")  # folders of liger's code
FORBIDDEN = ("/etc/passwd", "/dev/zero", "/dev/stdin")


class TooSlow(BaseException):
    """An input took longer than `SECONDS`."""


class Watch:
    """Notes every file that is opened outside while it is on."""

    def __init__(self, outside: Path):
        self.outside, self.on, self.seen = str(outside), False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on or event not in ("open", "os.listdir", "os.scandir", "import", "exec"):
            return
        name = getattr(arguments[0], "co_filename", "") if event == "exec" else arguments[0]
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if isinstance(name, str) and (name in FORBIDDEN or os.path.abspath(name).startswith(self.outside)):
            self.seen.append(f"{event} {name}")


@contextlib.contextmanager
def deadline(seconds: float):
    def late(*_):
        raise TooSlow

    clocks = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, WAITED * seconds)}
    before = {number: signal.signal(number, late) for number, _ in clocks.values()}
    for clock, (_, limit) in clocks.items():
        signal.setitimer(clock, limit)
    try:
        yield
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def fuzz(names, count: int, seed: int, root: Path, say=print) -> tuple[dict[str, Counter], list[str]]:
    """Give each target its share of `count` inputs.

    Returns:
        Target -> how many inputs were taken and how many refused; and the findings, each place once.
    """
    from liger_cli.system.errors import LigerError

    world, counts, findings, known = World(root), {}, [], set()
    world.warm()
    watch = Watch(world.outside)
    for name in names:
        counts[name] = Counter()
    per_target = -(-count // len(names))
    before = None
    for name in names:
        began = time.monotonic()
        for number in range(per_target):
            rng = random.Random(f"{seed}-{name}-{number}")
            problem = None
            watch.seen.clear()
            try:
                with deadline(SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    watch.on = True
                    TARGETS[name](world, rng)
                counts[name]["taken"] += 1
            except LigerError as error:
                counts[name]["refused"] += 1
                if not str(error).strip():
                    problem = "an error without a sentence"
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                problem = _described(error)
            finally:
                watch.on = False
            if watch.seen:
                problem = f"opened outside: {watch.seen[0]}"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            before = grown if before is None or number == 20 else before
            if grown - before > MEMORY:
                problem, before = f"memory grew by {(grown - before) >> 20} MiB", grown
            if problem:
                counts[name]["findings"] += 1
                if (name, problem) not in known:
                    known.add((name, problem))
                    findings.append(f"{name} (seed {seed}, input {number}): {problem}")
                    say(findings[-1])
        say(f"{name}: {dict(counts[name])} in {time.monotonic() - began:.0f} s")
    return counts, findings


def _described(error: BaseException) -> str:
    """The class, the sentence's start, and the last place in liger and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if "liger_cli" in frame.filename or f"{os.sep}templates{os.sep}" in frame.filename
    ]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], frames[-1])]
    return f"{type(error).__name__} at {' < '.join(places)}: {' '.join(str(error).split())[:120]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    root = Path(tempfile.mkdtemp(prefix="liger-fuzz-"))
    try:
        counts, findings = fuzz(options.targets or list(TARGETS), options.count, options.seed, root, say)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    total = sum((Counter(one) for one in counts.values()), Counter())
    say(f"{total['taken'] + total['refused'] + total['findings']:,} inputs: {dict(total)}; {len(findings)} findings")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
