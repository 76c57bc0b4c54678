"""`liger finetune`: the recipe, the run, resuming bit for bit, refusals; and recipes."""

import json
import os
import signal
import subprocess
import sys
import time
from random import Random

import pytest

from liger_cli.commands import finetune
from liger_cli.system.errors import LigerError, ModelError, UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.training import plan as train_plan
from liger_cli.training.recipes import Recipe, Stage, load_recipe, override, recipe_names

SMALL = {"seq_len": 48, "batch_size": 4, "micro_batch_size": 2, "held_out": 8}
PAPER = {**SMALL, "recipe": "paper", "quiet": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Learnable text: cycles of words that differ from line to line."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rng = Random(0)
    with open(path, "w") as file:
        for _ in range(300):
            first, step = rng.randrange(4, 60), rng.choice((1, 2))
            words = [f"w{4 + (first + step * i) % 60}" for i in range(rng.randint(10, 46))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["paper", "distill"])
def test_training_helps_and_the_adapter_loads_anywhere(converted, corpus, tmp_path, recipe):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    report = finetune.run(
        converted, data=str(corpus), recipe=recipe, output=tmp_path / "out", max_steps=40, lr=1e-2, quiet=True, **SMALL
    )
    assert report["steps_done"] == 40
    assert report["last_loss"] < report["first_loss"]
    losses = [record["loss"] for record in log_of(tmp_path / "out") if "loss" in record]
    assert len(losses) == 40
    if recipe == "paper":
        assert report["held_out_perplexity"] < 0.9 * report["held_out_perplexity_before"]
    out = tmp_path / "out"
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    manifest = read_manifest(out)
    assert manifest["kind"] == "adapter" and manifest["seed"] == 0
    assert manifest["base"]["path"] == str(converted)
    assert manifest["fingerprint"]["digest"] == finetune.read_base(converted).fingerprint["digest"]
    assert manifest["settings"]["recipe"]["stages"][0]["lr"] == 1e-2
    base = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, out)
    trained = {name.split(".lora_")[0] for name, _ in tuned.named_parameters() if "lora_" in name}
    assert len(trained) == 9 and not any(".3." in name for name in trained)  # layer 3 is a softmax layer
    x = torch.arange(4, 40)[None]
    with torch.no_grad():
        after = tuned(x).logits
        with tuned.disable_adapter():
            before = tuned(x).logits
        assert (after - before).abs().max() > 1e-3
        merged = tuned.merge_and_unload()
        merged.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        torch.testing.assert_close(again(x).logits, after, rtol=1e-4, atol=1e-4)


def test_paper_recipe_is_the_papers():
    recipe = load_recipe("paper")
    assert recipe == Recipe(name="paper", description=recipe.description, differs=recipe.differs)
    values = (recipe.lora_rank, recipe.lora_alpha, recipe.target_modules, recipe.stages)
    assert values == (8, 8, ("q_proj", "k_proj", "v_proj"), (Stage("ce", 1.0, 1e-3),))
    values = (recipe.seq_len, recipe.batch_size, recipe.micro_batch_size, recipe.epochs, recipe.held_out, recipe.seed)
    assert values == (1024, 8, 1, 2, 200, 0)
    values = (recipe.max_grad_norm, recipe.schedule, recipe.plateau_factor, recipe.plateau_patience, recipe.min_lr)
    assert values == (1.0, "plateau", 0.1, 10, 1e-5)


def test_recipes_load_and_can_be_overridden(tmp_path, capsys):
    from liger_cli.training import recipes

    assert {"paper", "distill"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description
        recipes.run(name)
        (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
        assert load_recipe(str(tmp_path / "r.yaml")) == recipe
    changed = override(load_recipe("distill"), objective="ce", lr=1e-4, seed=None)
    assert [(stage.objective, stage.lr) for stage in changed.stages] == [("ce", 1e-4)] and changed.seed == 0
    (tmp_path / "bad.yaml").write_text("name: x\nlearning_rate: 3\n")
    for bad in ("papier", str(tmp_path / "bad.yaml"), "missing.yaml"):
        with pytest.raises(UsageError):
            load_recipe(bad)
    with pytest.raises(UsageError, match="batch-size"):
        override(load_recipe("paper"), batch_size=6, micro_batch_size=4)


def test_numbers_as_people_write_them(tmp_path):
    """PyYAML reads 1e-4 as a text: YAML 1.1 wants 1.0e-4."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: 1e3\nmin_lr: 1E-6\nweight_decay: '0.5'\nlora_alpha: +1.6e+1\nepochs: 2\n"
        "stages: [{lr: 1e-4, window_dropout: [9e-1, 0]}]\n"
    )
    recipe = load_recipe(str(path))
    stages = (Stage(lr=1e-4, window_dropout=(0.9, 0)),)
    assert recipe == Recipe("1e3", min_lr=1e-6, weight_decay=0.5, lora_alpha=16.0, epochs=2, stages=stages)
    assert all(type(value) is float for value in (recipe.min_lr, recipe.lora_alpha, recipe.stages[0].lr))
    for bad in ("stages: [{lr: 1e-4x}]", "stages: [{lr: ''}]", "min_lr: nan", "min_lr: '1_0'", "epochs: 1e999",
                "stages: [{lr: [1e-4]}]", "max_steps: 1e3"):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(UsageError, match="has to be"):
            load_recipe(str(path))


def test_learning_rate_of_stages():
    from liger_cli.training.trainer import lr_factor

    stages = (Stage("transfer", 0.5, 1e-2), Stage("distill", 0.5, 1e-3))
    recipe = Recipe(schedule="cosine", warmup=0.1, min_lr=0.0, stages=stages)
    ends = tuple(recipe.stage_ends(40))
    assert ends == (20, 40)
    rates = [lr_factor(recipe, ends, step) * 1e-2 for step in range(40)]
    assert rates[2] == pytest.approx(1e-2) and rates[22] == pytest.approx(1e-3)
    assert rates[0] < rates[1] < rates[2] > rates[10] > rates[19] and rates[19] < 1e-3 and rates[39] < 1e-4


def test_accumulation_and_seed(converted, corpus, tmp_path):
    """The same rows in other micro-batches give the same curve; another seed gives another one."""
    curves = {}
    for name, flags in {"a": {}, "again": {}, "seed": {"seed": 1}}.items():
        out = tmp_path / name
        finetune.run(converted, data=str(corpus), output=out, max_steps=4, **PAPER, **flags)
        curves[name] = [record["loss"] for record in log_of(out) if "loss" in record]
    assert curves["a"] == curves["again"] != curves["seed"]
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "again")


def test_what_saves_memory_changes_nothing(converted, corpus, tmp_path):
    """Smaller micro-batches of one document each, with gradient checkpointing: the same curve but for rounding."""
    curves = []
    for index, flags in enumerate([{}, {"gradient_checkpointing": True}, {"micro_batch_size": 1}]):
        out = tmp_path / str(index)
        flags = {**PAPER, "packing": False, "train_softmax_layers": True, **flags}
        finetune.run(converted, data=str(corpus), output=out, max_steps=4, **flags)
        curves.append([record["loss"] for record in log_of(out) if "loss" in record])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)
    names = (tmp_path / "0" / "adapter_config.json").read_text()
    assert json.loads(names)["layers_to_transform"] == [0, 1, 2, 3]


def test_refusals_leave_nothing(converted, corpus, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = {"data": str(corpus), "max_steps": 2, **PAPER}
    with pytest.raises(UsageError, match="no converted folder"):
        finetune.run(**common)
    with pytest.raises(ModelError, match="not linearized"):
        finetune.run(tiny_base(), **common)
    with pytest.raises(UsageError, match="target-modules"):
        finetune.run(converted, target_modules=("w_proj",), **common)
    with pytest.raises(UsageError, match="no unfinished run"):
        finetune.run(converted, resume=True, **common)
    with pytest.raises(UsageError, match="--dtype"):
        finetune.run(converted, dtype="int3", **common)
    monkeypatch.setattr(train_plan, "available", lambda device: 1 << 20)
    with pytest.raises(LigerError, match="--gradient-checkpointing"):
        finetune.run(converted, **common)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert finetune.run(converted, dry_run=True, **common)["steps"] == 2
    assert list(tmp_path.iterdir()) == []
    finetune.run(converted, **common)
    before = adapter_bytes(tmp_path / "tiny-liger-gla-lora")
    with pytest.raises(UsageError, match="exists already"):
        finetune.run(converted, **common)
    assert adapter_bytes(tmp_path / "tiny-liger-gla-lora") == before
    finetune.run(converted, force=True, **{**common, "seed": 3})
    assert adapter_bytes(tmp_path / "tiny-liger-gla-lora") != before


def test_nan_stops_with_a_sentence_and_keeps_the_last_checkpoint(converted, corpus, tmp_path, monkeypatch):
    from liger_cli.training import objectives

    calls = []
    real = objectives.objective_sum

    def poisoned(model, *args):
        calls.extend([1] if model.training else [])
        return real(model, *args) * (float("nan") if len(calls) == 9 and model.training else 1.0)

    monkeypatch.setattr(objectives, "objective_sum", poisoned)
    common = {"data": str(corpus), "output": tmp_path / "out", "max_steps": 8, "save_steps": 2, **PAPER}
    with pytest.raises(LigerError, match="step 5.*checkpoint-4.*--lr"):
        finetune.run(converted, **common)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--resume"):
        finetune.run(converted, **common)
    with pytest.raises(UsageError, match="differ"):
        finetune.run(converted, **{**common, "lora_rank": 4}, resume=True)
    finetune.run(converted, **common, resume=True)
    finetune.run(converted, **{**common, "output": tmp_path / "whole"})
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_full_disk_stops_with_a_sentence(converted, corpus, tmp_path, monkeypatch):
    import errno

    from transformers import Trainer

    real = Trainer._save_checkpoint

    def full(self, *args):
        real(self, *args)
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    common = {"data": str(corpus), "output": tmp_path / "out", "max_steps": 6, "save_steps": 2, **PAPER}
    with pytest.raises(LigerError, match="No space left.*--resume"):
        finetune.run(converted, **common)
    monkeypatch.undo()
    assert finetune.run(converted, **common, resume=True)["resumed_from_step"] == 2


def test_window_only_is_trained_and_merged_without_the_recurrence(converted, corpus, tmp_path):
    import torch
    from peft import PeftModel

    from liger_cli.checkpoint.model_code import load_model
    from liger_cli.commands import merge

    common = {"data": str(corpus), "max_steps": 3, "quiet": True, **SMALL}
    finetune.run(converted, recipe="window-only", output=tmp_path / "out", **common)
    merge.run(tmp_path / "out", output=tmp_path / "merged", quiet=True)
    tuned = PeftModel.from_pretrained(load_model(converted, dtype=torch.float32), tmp_path / "out")
    x = torch.arange(4, 60)[None]
    with torch.no_grad():
        merged = load_model(tmp_path / "merged", dtype=torch.float32)(x).logits
        assert (tuned(x).logits - merged).abs().max() > 1e-3
        tuned.get_base_model().set_attention_mode("window")
        torch.testing.assert_close(tuned(x).logits, merged, rtol=1e-4, atol=1e-4)


def command(converted, corpus, output, *more):
    options = ["--max-steps", 30, "--save-steps", 3, "--eval-steps", 10, "--recipe", "distill"]
    options += ["--seq-len", 48, "--batch-size", 4, "--micro-batch-size", 2, "--held-out", 8]
    words = [sys.executable, "-m", "liger_cli", "finetune", converted, "--data", corpus, "--output", output]
    return [str(word) for word in [*words, *options, *more]]


def kill_while_running(words, cwd, after_line):
    """Start, wait for a line of the log that depends on `after_line`, kill."""
    process = subprocess.Popen(words, cwd=cwd, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    log = cwd / "killed.partial" / "log.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= after_line:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_resumes_to_the_same_weights(converted, corpus, tmp_path, kills):
    whole = subprocess.run(command(converted, corpus, "whole"), cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    rng = Random(kills)
    for kill in range(kills):
        words = command(converted, corpus, "killed", *(["--resume"] if kill else []))
        kill_while_running(words, tmp_path, rng.randint(1 + 30 * kill // kills, 30 * (kill + 1) // kills))
    if not (tmp_path / "killed").exists():
        words = command(converted, corpus, "killed", "--resume")
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_follow_the_same_curve(converted, corpus, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for output, more in {"one": (), "two": ("--processes", "2")}.items():
        done = subprocess.run(
            command(converted, corpus, output, *more), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for a, b in zip(one, two, strict=True):
        key = "loss" if "loss" in a else "eval_loss"
        assert a[key] == pytest.approx(b[key], rel=1e-3)
