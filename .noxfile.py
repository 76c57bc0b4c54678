"""nox -f .noxfile.py: the tests on every supported Python, and the linters."""

from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Python 3.10 resolves to older releases, so the pins hold from 3.11 on."""
    pins = [] if session.python == "3.10" else ["-c", ".constraints.txt"]
    session.install(*pins, "-e", ".[dev]")
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The families and the model on the oldest transformers that is supported."""
    session.install("-e", ".[dev]", "torch==2.13.0", "transformers==5.17.0")
    session.run("pytest", *(session.posargs or ["-n", "2", "tests/test_families.py", "tests/test_model.py"]))


@nox.session(python="3.11")
def fuzz(session: nox.Session) -> None:
    """Many random shapes, lengths, magnitudes, states and paddings through both branches; kept in .fuzz/recurrence.txt.

    nox -f .noxfile.py -s fuzz -- 20000    gives the number of examples for each test.
    """
    session.install("-c", ".constraints.txt", "-e", ".[dev]")
    examples = session.posargs[0] if session.posargs else "20000"
    kept = Path(".fuzz")
    kept.mkdir(exist_ok=True)
    with open(kept / "recurrence.txt", "w", encoding="utf-8") as output:
        session.run(
            *("pytest", "-q", "-k", "fuzz", "--hypothesis-show-statistics"),
            *("tests/test_recurrence.py", "tests/test_window.py"),
            env={"LIGER_FUZZ_EXAMPLES": examples},
            stdout=output,
        )
    session.log((kept / "recurrence.txt").read_text(encoding="utf-8"))


@nox.session(python="3.11")
def hostile(session: nox.Session) -> None:
    """Folders, recipes, data and results that no honest program wrote; kept in .fuzz/hostile.txt.

    nox -f .noxfile.py -s hostile -- 100000    gives the number of inputs; see tests/fuzz/RECORD.md.
    """
    session.install("-c", ".constraints.txt", "-e", ".[dev]")
    inputs = session.posargs or ["100000"]
    session.run("python", "tests/fuzz/run.py", *inputs, "--out", ".fuzz/hostile.txt")


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", ".constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
