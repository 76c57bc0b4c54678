"""What the guide to the gates says can be done: one of one's own in ten lines, the paper's ablations by flags alone."""

import json
import re
import shlex
from pathlib import Path
from random import Random

import pytest
import torch
from recurrence_examples import relative_rms
from typer.testing import CliRunner

from liger_cli.main import app
from liger_cli.system.manifest import read_manifest
from liger_cli.templates import liger_gates
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_recurrence import chunk_decay, naive_decay
from liger_cli.training.recipes import load_recipe

GUIDE = (Path(__file__).parents[1] / "liger_cli" / "guides" / "gates.md").read_text(encoding="utf-8")
ABLATIONS = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in GUIDE.partition("## The paper's ablations")[2].partition("\n## ")[0].splitlines()
    if line.startswith("|")
][2:]


def test_a_gate_in_ten_lines(monkeypatch):
    """The guide's own lines, put into the gates' module, give a gate that the recurrence takes."""
    code = GUIDE.partition("To add one:")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    function, row = code.split("# in GATES:\n")
    namespace = dict(vars(liger_gates))
    exec(function, namespace)
    (gate,) = eval(row.strip(), namespace)
    monkeypatch.setitem(liger_gates.GATES, gate.name, gate)
    spec = LayerSpec(gate="mine")
    assert gate.state_shapes(spec, 16) == [(16, 16)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 90, 16, generator=generator) for _ in range(3))
    inputs = gate.inputs(q, k, v, gate.pool(k, spec), spec)
    assert inputs.log_decay.max() <= 0
    chunked, naive = (run(inputs.q, inputs.k, inputs.v, inputs.log_decay)[0] for run in (chunk_decay, naive_decay))
    assert relative_rms(chunked, naive) < 1e-4


def test_the_ablations_are_the_papers():
    assert [row[0] for row in ABLATIONS] == [
        "full", "random gate projection", "learned feature map", "no gate", "no LoRA", "no SWA", "window only",
    ]  # fmt: skip


def test_the_printed_averages_are_those_of_the_scores_but_for_no_swa():
    for name, _, _, figures in ABLATIONS:
        _, average, without, mmlu = map(float, figures.split(","))
        fits = abs((6 * average - mmlu) / 5 - without) < 0.12  # each is rounded to a tenth
        assert fits == (name != "no SWA"), name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rng = Random(0)
    lines = [" ".join(f"w{rng.randrange(4, 60)}" for _ in range(30)) for _ in range(40)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.mark.parametrize("row", ABLATIONS, ids=lambda row: row[0].replace(" ", "-"))
def test_an_ablation_by_flags_alone(tiny_base, corpus, tmp_path, monkeypatch, row):
    """Convert, train a step and merge with the flags of the table."""
    monkeypatch.chdir(tmp_path)
    name, converting, training, _ = row
    run = CliRunner().invoke(app, ["convert", str(tiny_base()), "model", *shlex.split(converting)])
    assert run.exit_code == 0, run.output
    config = json.loads(Path("model/config.json").read_text())
    options = ["--data", str(corpus), "--max-steps", "1", "--seq-len", "32", "--batch-size", "1"]
    training = re.sub(r"(--lora-\w+) 4096", rf"\1 {config['hidden_size']}", training)
    options += ["--micro-batch-size", "1", "--recipe", *shlex.split(training)]
    run = CliRunner().invoke(app, ["finetune", "model", "--output", "adapter", *options])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(app, ["merge", "adapter", "--output", "merged"])
    assert run.exit_code == 0, run.output
    layer = json.loads(Path("merged/config.json").read_text())["liger"]["layers"][0]
    rank = json.loads(Path("adapter/adapter_config.json").read_text())["r"]
    assert rank == (config["hidden_size"] if name == "no LoRA" else load_recipe("paper").lora_rank)
    assert read_manifest(Path("merged"))["kind"] == "merged"
    wanted = {
        "random gate projection": {"gate_init": "random", "gate_params": "learned"},
        "learned feature map": {"feature_params": "learned"},
        "no gate": {"gate": "none"},
        "no SWA": {"window": 0, "mix": 1.0},
        "window only": {"mix": 0.0},
    }.get(name, {})
    unchanged = {"gate": "gla", "window": 64, "mix": 0.5, "gate_params": "pooled", "feature_params": "fixed"}
    expected = unchanged | wanted
    assert {key: layer[key] for key in expected} == expected
