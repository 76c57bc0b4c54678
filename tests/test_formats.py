"""Folders of another format than this version's are refused by a sentence that says what to do."""

import json

import pytest
from typer.testing import CliRunner

from liger_cli.checkpoint.model_code import load_model
from liger_cli.commands.convert import convert
from liger_cli.main import app
from liger_cli.system.errors import ModelError


@pytest.mark.parametrize("claimed", [0, 2, None, "1"])
def test_other_formats_are_refused(tiny_base, tmp_path, claimed):
    sample = tmp_path / "sample"
    convert(str(tiny_base()), str(sample))
    config = json.loads((sample / "config.json").read_text())
    config["liger"]["format"] = claimed
    (sample / "config.json").write_text(json.dumps(config))
    for command in (["finetune", str(sample), "--data", "demo", "--dry-run"], ["eval", str(sample)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 3, result.output
        assert "--refresh" in result.stderr and result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, ["convert", str(sample), "--refresh"])
    assert result.exit_code == 3
    assert f"format is {claimed!r}" in result.stderr and "--refresh" not in result.stderr
    with pytest.raises(ModelError, match="--refresh"):
        load_model(sample)
