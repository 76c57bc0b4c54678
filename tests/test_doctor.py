"""`liger doctor` and `liger gates`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from liger_cli.commands import doctor
from liger_cli.main import app
from liger_cli.templates.liger_gates import GATES

runner = CliRunner()


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")
def test_healthy():
    result = runner.invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["problems"] == []
    assert set(report["gates"]) == set(GATES)
    assert report["packages"]["torch"]["version"] and report["devices"][0]["device"] == "cpu"
    assert all(row["backend"] == "torch" and "not on a CUDA" in row["why"] for row in report["gates"].values())
    assert report["window"]["backend"] == "torch" and report["backend"] == "auto"
    table = runner.invoke(app, ["doctor"]).stdout
    assert "torch" in table and "the tensors are not on a CUDA device" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")
def test_backend_asked_for(monkeypatch):
    """LIGER_BACKEND is shown; where it cannot be had, nothing can run, and one sentence says so."""
    monkeypatch.setenv("LIGER_BACKEND", "torch")
    report = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert report["backend"] == "torch" and report["gates"]["gla"]["why"] == "asked for"
    for name, wrong in (("fla", "fla was asked for, but the tensors are not on"), ("gpu", "LIGER_BACKEND is 'gpu'")):
        monkeypatch.setenv("LIGER_BACKEND", name)
        result = runner.invoke(app, ["doctor"])
        assert result.exit_code == 4 and wrong in result.stderr


def test_missing_and_old_packages(monkeypatch):
    versions = {"peft": None, "transformers": "4.40.0"}
    monkeypatch.setattr(doctor, "installed", lambda name, real=doctor.installed: versions.get(name, real(name)))
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 4
    assert "peft is missing" in result.stderr and "transformers is 4.40.0" in result.stderr


def test_broken_recurrence(monkeypatch):
    def broken(_torch):
        raise ArithmeticError("wrong sums")

    monkeypatch.setattr(doctor, "_smoke_test", broken)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 4 and "wrong sums" in result.stderr


def test_gates():
    rows = json.loads(runner.invoke(app, ["gates", "--head-dim", "64", "--json"]).stdout)["gates"]
    assert [row["gate"] for row in rows] == list(GATES)
    assert next(row for row in rows if row["gate"] == "gla")["state_bytes"] == 64 * 64 * 4
    table = runner.invoke(app, ["gates"]).stdout
    assert all(name in table for name in GATES)


def test_which_commands_fit(tiny_base, tmp_path, monkeypatch):
    """Of a base and of a converted model, against what is free; a sentence for what is neither."""
    monkeypatch.setattr(doctor, "available", lambda device: 64 << 20)
    found = json.loads(runner.invoke(app, ["doctor", str(tiny_base()), "--json"]).stdout)["memory"]
    fits = {row["command"]: row["fits"] for row in found["commands"]}
    assert found["free_bytes"] == 64 << 20 and fits["liger convert --calibrate"] and not fits["liger eval"]
    table = runner.invoke(app, ["doctor", str(tiny_base())]).stdout
    assert "liger finetune --gradient-checkpointing" in table and "64.0 MiB free" in table
    monkeypatch.setattr(doctor, "available", lambda device: None)
    assert "unknown" in runner.invoke(app, ["doctor", str(tiny_base())]).stdout
    for place, code, needle in ((tmp_path / "no", 2, "is not a folder"), (tmp_path, 3, "config.json")):
        result = runner.invoke(app, ["doctor", str(place)])
        assert result.exit_code == code and needle in result.stderr, result.stderr
