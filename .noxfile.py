"""nox -f .noxfile.py: the tests on every supported Python, and the linters."""

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


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", ".constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
