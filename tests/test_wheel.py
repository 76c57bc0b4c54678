"""The wheel, installed somewhere else, is whole: it runs and converts without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("liger_cli", "templates"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    return {**os.environ, "PYTHONPATH": str(target)}, target


def test_wheel_holds_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "liger_cli").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "liger_cli" / "guides").iterdir()}
    for path in (ROOT / "templates").rglob("*"):
        if path.suffix in (".py", ".jinja", ".yaml", ".md"):
            expected.add(f"liger_cli/templates/{path.relative_to(ROOT / 'templates')}")
    expected |= {f"liger_cli/shipped/prose/{path.name}" for path in (ROOT / "liger_cli/shipped/prose").iterdir()}
    assert expected <= held, expected - held
    assert not any(name.startswith(("tests/", "templates/")) for name in held)
    assert not any("study" in name for name in held), "the study stays in the checkout"


def test_runs_and_converts_elsewhere(installed, sparse_base, tmp_path):
    environment, target = installed
    here = tmp_path / "elsewhere"
    here.mkdir()
    options = {"cwd": here, "env": environment}
    where = run(sys.executable, "-c", "import liger_cli.templates as t; print(t.__file__)", **options)
    assert Path(where.strip()).is_relative_to(target)
    assert "convert" in run(sys.executable, "-m", "liger_cli", "--help", **options)
    report = json.loads(run(sys.executable, "-m", "liger_cli", "convert", sparse_base(), "out", "--json", **options))
    assert report["parameters"] > 0
    assert {"config.json", "liger.json", "README.md", "model.safetensors"} <= {
        path.name for path in (here / "out").iterdir()
    }
    assert (target / "bin" / "liger").exists()


def test_editable_install_finds_the_templates(tmp_path):
    """The checkout's own installation, which this test runs in, resolves `liger_cli.templates` from any folder."""
    where = run(sys.executable, "-c", "import liger_cli.templates as t; print(t.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_file()
