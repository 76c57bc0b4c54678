"""Runs the units of the study one after another or side by side, each in a process of its own.

A unit's result is a file that appears whole. Whoever stops the study loses the units that were running; what is begun
again goes on with those that have no result for the same question. Several studies may share a folder.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from liger_cli.checkpoint.reader import fingerprint, read_weights
from liger_cli.system.errors import UsageError
from liger_cli.system.outputs import write_whole
from study.base_folders import StudyBase
from study.rows import Unit
from study.subjects import designation
from study.unit import MISSING

FORMAT = 2  # raised when what is measured changes
DONE, SKIPPED, LATER, BUSY, FAILED, NOT_THERE = "done", "kept", "later", "busy", "failed", "missing"


def run(
    units: list[Unit],
    bases: dict[str, StudyBase],
    home: Path,
    effort: dict,
    *,
    workers: int = 1,
    hours: float | None = None,
) -> dict[str, list[str]]:
    """Compute every unit that has no result.

    Args:
        bases: by the names that the units have.
        home: the study's folder.
        effort: of `measure.Effort`.
        workers: units at once; the processor's cores are shared out between them, unless OMP_NUM_THREADS is set.
        hours: after which no unit is begun.
    Returns:
        The units' names by what became of them.
    """
    ends = float("inf") if hours is None else time.monotonic() + 3600 * hours
    digests = {name: fingerprint(read_weights(base.folder))["digest"] for name, base in bases.items()}
    found: dict[str, list[str]] = {}

    def one(unit: Unit) -> None:
        key = unit_key(unit, digests[unit.base], effort)
        label = f"{unit.base}/{unit.name}"
        outcome, sentence = _one(unit, bases[unit.base], home, effort, key, workers, ends)
        found.setdefault(outcome, []).append(label)
        if outcome not in (SKIPPED, LATER):
            print(f"{outcome}: {label}{sentence}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(one, units))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return found


def unit_key(unit: Unit, digest: str, effort: dict) -> str:
    """What a result answers: the row and all its settings, the base's weights, how it is measured."""
    question = {"format": FORMAT, "unit": asdict(unit), "base": digest, "effort": effort}
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def result_path(home: Path, unit: Unit) -> Path:
    return home / "results" / unit.base / f"{unit.name}.json"


def take_over(earlier: Path, home: Path) -> None:
    """Copy the results of another study that this one does not have. Raises UsageError: there are none."""
    found = results_of(earlier)
    if not found:
        raise UsageError(f"{earlier} holds no results of a study; --from takes the --output of an earlier one")
    for (base, name), result in found.items():
        own = home / "results" / base / f"{name}.json"
        if not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            write_whole(own, json.dumps(result, indent=1) + "\n")


def results_of(home: Path) -> dict[tuple[str, str], dict]:
    """(base, unit's name) -> result: what is kept in the file of each base, and newer ones of the units themselves."""
    found = {}
    for path in sorted(home.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            found[path.stem, kept.pop("name")] = kept
    for path in sorted((home / "results").glob("*/*.json")):
        if (result := read_result(path)) is not None:
            found[path.parent.name, path.stem] = result
    return dict(sorted(found.items(), key=lambda item: (item[0][0], f"{item[0][1]}.json")))


def keep(home: Path) -> list[Path]:
    """Write `<base>.jsonl`: every result of a base, one a line. What the repository holds of a study."""
    by_base: dict[str, list[dict]] = {}
    for (base, name), result in results_of(home).items():
        by_base.setdefault(base, []).append({"name": name, **result})
    for base, results in by_base.items():
        write_whole(home / f"{base}.jsonl", "".join(json.dumps(result) + "\n" for result in results))
    return [home / f"{base}.jsonl" for base in by_base]


def read_result(path: Path) -> dict | None:
    """A unit's result, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _one(unit: Unit, base: StudyBase, home: Path, effort: dict, key: str, workers: int, ends: float) -> tuple[str, str]:
    path = result_path(home, unit)
    known = read_result(path)
    if known and known.get("key") == key and known.get("status") == DONE:
        return SKIPPED, ""
    if time.monotonic() > ends:
        return LATER, ""
    log = home / "logs" / unit.base / f"{unit.name}.log"
    for file in (path, log):
        file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(log.with_suffix(".lock")) as lock:
        if lock is None:
            return BUSY, ", another study computes it"
        began = time.monotonic()
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // workers))
        code = _process(unit, base, home, effort, key, log, threads, lock)
        if code == 0:
            return DONE, f" in {time.monotonic() - began:.0f} s"
        sentence = _last_sentence(log)
        if code < 0 or code == 130:
            return LATER, ""
        status = NOT_THERE if code == MISSING else FAILED
        about = {
            "key": key,
            "status": status,
            "sentence": sentence,
            "base": unit.base,
            "row": unit.row.name,
            "group": unit.row.group,
            "control": unit.row.control,
            "budget": unit.budget,
            "seed": unit.seed,
            "mixture": unit.mixture,
        }
        write_whole(path, json.dumps(about, indent=1) + "\n")
        return status, f": {sentence}"


def _process(
    unit: Unit, base: StudyBase, home: Path, effort: dict, key: str, log: Path, threads: int, lock: int
) -> int:
    """Exit code of the unit's process. It holds the lock, too: it may outlive the study that began it."""
    command = [sys.executable, "-m", "study.unit", str(home), designation(base)]
    wanted = json.dumps({"unit": asdict(unit), "effort": effort, "key": key})
    here = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NO_COLOR": "1", "PYTHONPATH": here}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            text=True,
            env=environment,
            pass_fds=(lock,),
        )
        try:
            process.communicate(wanted)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode


@contextmanager
def _locked(path: Path):
    """The descriptor of the file that is locked, None where another process has it; the lock ends with its holders."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield file.fileno()


def _last_sentence(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("liger: ") for line in lines if line.startswith("liger: ")]
    return (said or lines or ["it said nothing"])[-1][:400]
