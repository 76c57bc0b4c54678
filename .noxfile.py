"""nox -f .noxfile.py: the tests on every supported Python, and the linters."""

import re
import tarfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Python 3.10 resolves to older releases, so the pins hold from 3.11 on."""
    pins = [] if session.python == "3.10" else ["-c", ".constraints.txt"]
    session.install(*pins, "-e", ".[dev]")
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session(python="3.10")
def compat_oldest(session: nox.Session) -> None:
    """The tests on the oldest Python with every lower bound of pyproject.toml as it stands there.

    On Linux PyPI's torch is the CUDA build, of some 6 GB in all; PIP_INDEX_URL or PIP_FIND_LINKS can name another.
    """
    bounds = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    oldest = [re.sub(r">=(\d+\.\d+)$", r"~=\1.0", bound).replace(">=", "==") for bound in bounds]
    session.install(*oldest, "-e", ".[dev]")
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session(python="3.13")
def compat_newest(session: nox.Session) -> None:
    """The tests on the newest Python with the newest release of everything, without pins; of the same size."""
    session.install("--upgrade", "-e", ".[dev]")
    session.run("pytest", *(session.posargs or ["-n", "2"]))


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


@nox.session(python="3.11")
def peers(session: nox.Session) -> None:
    """Other projects' tests over converted models: transformers' modelling tests, from the source distribution of the
    pinned release, and what transformers and fla ask of generation, written anew.

    No distribution has transformers' generation tests: nox -f .noxfile.py -s peers -- CHECKOUT    names a checkout that
    has; they were never run.
    """
    session.install("-c", ".constraints.txt", "-e", ".[dev]", "parameterized")
    folder = Path(session.posargs[0]) if session.posargs else _transformers_source(session)
    environment = {"LIGER_PEERS": str(folder.resolve()), "HF_HUB_OFFLINE": "1"}
    # Without our options: transformers' tests have markers of their own.
    for tests in ("transformers_mixins.py", "generation.py"):
        session.run("pytest", "-o", "addopts=", "-q", "-rfx", f"tests/peers/{tests}", env=environment)


def _transformers_source(session: nox.Session) -> Path:
    version = re.search(r"transformers==(\S+)", Path(".constraints.txt").read_text(encoding="utf-8"))[1]
    folder = Path(session.create_tmp())
    session.run(
        *("python", "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)),
        f"transformers=={version}",
    )
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformers-{version}"


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-c", ".constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
