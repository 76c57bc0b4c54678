"""Folders of earlier versions: one of format 1, frozen with its code, loads and says what it said; others are refused.

tests/data/format-1 was written by liger 0.1.0 from a random base; its layers are gla with a running normaliser,
retention with sinks, softmax, and gsa without a window. tests/data/format-1.json holds what it generated then.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_convert import BLOCKER, digest
from typer.testing import CliRunner

from liger_cli.checkpoint.model_code import load_model
from liger_cli.commands.convert import refresh
from liger_cli.main import app
from liger_cli.system.errors import ModelError
from liger_cli.templates.liger_cache import CACHE
from liger_cli.templates.liger_config import FORMAT

DATA = Path(__file__).parent / "data"
SAID = json.loads((DATA / "format-1.json").read_text())


@pytest.fixture
def sample(tmp_path):
    return Path(shutil.copytree(DATA / "format-1", tmp_path / "sample"))


def check_same(model) -> None:
    """Greedy tokens as they were (the two likeliest were never closer than 0.01), logits to their four digits."""
    x = torch.tensor([SAID["input_ids"]])
    made = model.generate(x, max_new_tokens=len(SAID["tokens"]), do_sample=False, eos_token_id=None)
    assert made[0, x.shape[1] :].tolist() == SAID["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits[0, -1], torch.tensor(SAID["last_logits"]), rtol=0, atol=2e-4)


def test_the_sample_is_frozen():
    assert sum(path.stat().st_size for path in (DATA / "format-1").iterdir()) < 100_000
    assert json.loads((DATA / "format-1" / "config.json").read_text())["liger"]["format"] == 1
    assert FORMAT == 1, "a new format needs a frozen sample of its own, and a way to upgrade this one"


def test_todays_code_runs_the_sample(sample):
    check_same(load_model(sample, dtype=torch.float32))


@pytest.mark.skipif(CACHE == "cache", reason="from 5.24 on transformers has another name for the cache: --refresh")
def test_the_samples_own_code_runs_it_without_liger(sample, tmp_path):
    script = BLOCKER + (
        "import json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "said = json.load(open(sys.argv[2]))\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "x = torch.tensor([said['input_ids']])\n"
        "made = model.generate(x, max_new_tokens=32, do_sample=False, eos_token_id=None)\n"
        "assert made[0, x.shape[1]:].tolist() == said['tokens'], made\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-I", "-c", script, sample, DATA / "format-1.json"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_refresh_upgrades_the_sample(sample, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = digest(sample)
    refresh(str(sample))
    after = digest(sample)
    kept = [name for name in before if not name.endswith(".py") and name != "liger.json"]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert (sample / "liger_model.py").read_text() != (DATA / "format-1" / "liger_model.py").read_text()
    renamed = sample.rename(tmp_path / "renewed")  # transformers keeps one copy of a folder's code by the folder's name
    check_same(AutoModelForCausalLM.from_pretrained(renamed, trust_remote_code=True, dtype=torch.float32))
    check_same(load_model(renamed, dtype=torch.float32))


@pytest.mark.parametrize("claimed", [0, 2, None, "1"])
def test_other_formats_are_refused(sample, claimed):
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
