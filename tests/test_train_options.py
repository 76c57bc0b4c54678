"""What a run can be told beside its recipe's numbers: window dropout, early stop, streaming, trackers, devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from random import Random

import pytest
import yaml

from liger_cli.commands import convert, finetune
from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.training import plan as train_plan
from liger_cli.training.recipes import Recipe, Stage, load_recipe, recipe_from

SMALL = {"seq_len": 48, "batch_size": 4, "micro_batch_size": 2, "held_out": 8, "max_steps": 8, "quiet": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    rng = Random(0)
    rows = [{"text": " ".join(f"w{rng.randrange(4, 128)}" for _ in range(rng.randint(3, 40)))} for _ in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(converted, corpus, tmp_path):
    """train(name, **flags) -> (report, records of the log) of a run into the folder `name`."""

    def run(name, **flags):
        recipe = flags.pop("recipe", "paper")
        if isinstance(recipe, Recipe):
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(recipe.to_dict()))
            recipe = str(path)
        report = finetune.run(converted, data=str(corpus), output=tmp_path / name, recipe=recipe, **{**SMALL, **flags})
        return report, [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    return run


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(records):
    return [record["loss"] for record in records if "loss" in record]


def interrupted(monkeypatch, after: int):
    """The next run is stopped, as by Ctrl-C, right after the checkpoint of step `after`."""
    from transformers import Trainer

    real = Trainer._save_checkpoint

    def save(self, *args):
        if self.state.global_step > after:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)


def test_window_dropout_passes_through_its_values():
    stage = Stage(window_dropout=[0.9, 0.5, 0])
    assert [stage.window_dropout_at(done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [0.9, 0.7, 0.5, 0.25, 0]
    )
    assert Stage(window_dropout=0.3).window_dropout_at(0.7) == 0.3
    assert recipe_from({"stages": [{"window_dropout": [0.9, 0]}]}).stages[0].window_dropout == (0.9, 0)
    for bad in (1, -0.1, [], [0.5, 1], "high", [0.5, "x"]):
        with pytest.raises(UsageError, match="window-dropout"):
            Stage(window_dropout=bad)
    with pytest.raises(UsageError, match="window"):
        Recipe(attention="window", stages=(Stage(window_dropout=0.5),))


def test_scheduled_window_dropout_with_checkpointing_and_resuming(train, tmp_path, monkeypatch):
    """The draws depend on the place in the run alone: recomputing layers and resuming give the same curve."""
    stages = (Stage("distill", 0.5, 1e-3, window_dropout=(0.9, 0.2)), Stage("ce", 0.5, 1e-3))
    recipe = Recipe(name="dropout", schedule="cosine", save_steps=2, stages=stages)
    _, whole = train("whole", recipe=recipe)
    plain = tuple(Stage(stage.objective, stage.share, stage.lr) for stage in stages)
    _, without = train("without", recipe=Recipe(name="plain", schedule="cosine", save_steps=2, stages=plain))
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses(whole)[:3], losses(without)[:3], strict=True))
    _, checkpointed = train("checkpointed", recipe=recipe, gradient_checkpointing=True)
    assert losses(checkpointed) == pytest.approx(losses(whole), rel=1e-4)
    interrupted(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train("resumed", recipe=recipe)
    monkeypatch.undo()
    report, resumed = train("resumed", recipe=recipe, resume=True)
    assert report["resumed_from_step"] == 2 and resumed == whole
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")


def test_early_stop_keeps_the_best(train, tmp_path, monkeypatch):
    """A rate far too high only makes it worse: the run ends and the adapter is the best evaluation's."""
    flags = {"lr": 0.05, "max_steps": 60, "eval_steps": 2, "save_steps": 2}
    report, records = train("stopped", early_stop=3, **flags)
    evaluations = {one["step"]: one["eval_loss"] for one in records if "eval_loss" in one and one["step"]}
    best = min(evaluations, key=evaluations.get)
    assert report["stopped_early"] and report["steps_done"] == best + 3 * 2 < 60
    assert report["adapter_step"] == best
    assert report["held_out_perplexity"] == pytest.approx(min(one["eval_perplexity"] for one in records
                                                              if "eval_loss" in one and one["step"]))  # fmt: skip
    train("to-the-best", **{**flags, "max_steps": best})
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "to-the-best")
    interrupted(monkeypatch, best + 2)
    with pytest.raises(KeyboardInterrupt):
        train("resumed", early_stop=3, **flags)
    monkeypatch.undo()
    again, resumed = train("resumed", early_stop=3, resume=True, **flags)
    assert resumed == records and again["steps_done"] == report["steps_done"]
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "stopped")


def test_the_best_is_kept_without_an_early_end(train, tmp_path):
    """A rate far too high only makes it worse; the run goes on to its end and keeps the best evaluation's adapter."""
    recipe = Recipe(name="kept", keep_best=True, loss_mean="rows", max_grad_norm=0.0)
    flags = {"lr": 0.05, "max_steps": 14, "eval_steps": 2}
    report, records = train("kept", recipe=recipe, **flags)
    evaluations = {one["step"]: one["eval_loss"] for one in records if "eval_loss" in one and one["step"]}
    assert not report["stopped_early"] and report["steps_done"] == max(evaluations) == 14 > report["adapter_step"]
    train("to-the-best", recipe=recipe, **{**flags, "max_steps": report["adapter_step"]})
    assert adapter_bytes(tmp_path / "kept") == adapter_bytes(tmp_path / "to-the-best")


def test_a_plateau_in_each_stage(train, tmp_path, monkeypatch):
    """Each stage begins with its own rate, whatever the one before fell to, by its own objective; resumed alike."""
    stages = (Stage("transfer-heads", 0.5, 1.0), Stage("ce", 0.5, 1e-4))
    recipe = Recipe(name="plateaus", stages=stages, plateau_patience=0, eval_steps=1, save_steps=2, min_lr=0.0)
    _, whole = train("whole", recipe=recipe)
    rates = [record["lr"] for record in whole if "loss" in record]
    assert rates[0] == 1.0 and 0 < min(rates[:4]) < 1.0 and rates[4] == 1e-4 and max(rates[4:]) == 1e-4
    interrupted(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train("resumed", recipe=recipe)
    monkeypatch.undo()
    report, resumed = train("resumed", recipe=recipe, resume=True)
    assert report["resumed_from_step"] == 4 and resumed == whole
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")


def test_what_the_publications_say():
    """Rates, ranks, means and clipping of LoLCATs' and SUPRA's papers and code, and of the code of Liger."""
    lolcats, supra, code = (load_recipe(name) for name in ("lolcats", "supra", "paper-code"))
    assert lolcats.stages == (
        Stage("transfer-heads", 0.5, 1e-2, train="extra"), Stage("ce", 0.5, 1e-4, train="lora"),
    )  # fmt: skip
    assert (lolcats.lora_rank, lolcats.lora_alpha, lolcats.weight_decay, lolcats.max_grad_norm) == (8, 16, 0, 0)
    assert (lolcats.schedule, lolcats.plateau_factor, lolcats.plateau_patience, lolcats.eval_steps) == (
        "plateau", 0.1, 10, 100,
    )  # fmt: skip
    assert (lolcats.epochs, lolcats.seq_len, lolcats.batch_size, lolcats.loss_mean) == (4, 1024, 8, "rows")
    assert (supra.stages, supra.min_lr, supra.adam_beta2) == ((Stage("ce", 1.0, 3e-4),), 1e-5, 0.95)
    assert (supra.schedule, supra.seq_len, supra.weight_decay) == ("cosine", 2048, 0)
    assert (code.model["window"], code.loss_mean, code.keep_best, code.max_grad_norm) == (65, "rows", True, 0)
    paper = load_recipe("paper")
    own = ("name", "description", "differs", "model", "loss_mean", "keep_best", "max_grad_norm")
    assert replace(code, **{name: getattr(paper, name) for name in own}) == paper


def test_a_recipe_that_is_for_other_models(converted, corpus, tmp_path):
    flags = {**SMALL, "data": str(corpus), "output": tmp_path / "none"}
    with pytest.raises(UsageError, match="has window 8, but the recipe paper-code is for 65; make its models by"):
        finetune.run(converted, recipe="paper-code", **flags)
    with pytest.raises(UsageError, match="recipe's model: gate is 'x'"):
        Recipe(model={"gate": "x"})
    with pytest.raises(UsageError, match="recipe's model"):
        Recipe(model={"gates": "gla"})
    assert not (tmp_path / "none").exists()


def test_streamed_runs_resume_bit_for_bit(train, tmp_path, monkeypatch):
    flags = {"streaming": True, "save_steps": 3, "recipe": "distill"}
    report, whole = train("whole", **flags)
    assert report["streaming"] and report["tokens"] is None and len(losses(whole)) == 8
    assert all(0 < record["tokens"] <= 4 * 48 for record in whole if "loss" in record)
    interrupted(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train("resumed", **flags)
    monkeypatch.undo()
    assert train("resumed", resume=True, **flags)[1] == whole
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(tmp_path / "whole")
    with pytest.raises(UsageError, match="--max-steps"):
        train("endless", streaming=True, max_steps=None)


def test_trackers(converted, corpus, tmp_path, train, monkeypatch):
    """A tracker that is not installed is one sentence; one that is gets the losses, into the output's own folder."""
    with pytest.raises(UsageError, match="tensorboard or wandb"):
        train("out", report_to="mlflow")
    monkeypatch.setattr(train_plan, "find_spec", lambda name: None)
    for name in train_plan.TRACKERS:
        with pytest.raises(SetupError, match=f"pip install {name}") as error:
            train("out", report_to=name)
        assert error.value.exit_code == 4
    assert not (tmp_path / "out.partial").exists()
    # A stand-in for the package, since it is optional: what transformers calls of it is written down.
    package = tmp_path / "site" / "tensorboardX"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import json, pathlib\n"
        "__version__ = '2.6'\n"
        "class SummaryWriter:\n"
        "    def __init__(self, log_dir):\n"
        "        self.path = pathlib.Path(log_dir, 'scalars.jsonl')\n"
        "        self.path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    def add_scalar(self, name, value, step):\n"
        "        with open(self.path, 'a') as file: file.write(json.dumps([name, value, step]) + '\\n')\n"
        "    def __getattr__(self, name):\n"
        "        return lambda *args, **kwargs: None\n"
    )
    words = [sys.executable, "-m", "liger_cli", "finetune", converted, "--data", corpus, "--output", "tracked"]
    words += [
        "--max-steps",
        3,
        "--seq-len",
        48,
        "--batch-size",
        2,
        "--held-out",
        0,
        "--report-to",
        "tensorboard",
        "--recipe",
        "paper",
    ]
    paths = os.pathsep.join([str(package.parent), *sys.path])
    done = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "tracked" / "runs" / "scalars.jsonl").read_text().splitlines()]
    assert sorted(step for name, _, step in written if name == "train/loss") == [1, 2, 3]


def test_what_needs_cuda_is_refused_before_anything_loads(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_plan, "device", lambda: "cpu")
    monkeypatch.setattr(finetune, "load_tokenizer", lambda *_: pytest.fail("something was loaded"))
    for flags, needle in (({"load_in_4bit": True}, "CUDA"), ({"fsdp": True}, "DDP"), ({"recipe": "24gb"}, "CUDA")):
        with pytest.raises(SetupError, match=needle) as error:
            train("out", **flags)
        assert error.value.exit_code == 4
    monkeypatch.setattr(train_plan, "device", lambda: "cuda")
    monkeypatch.setattr(train_plan, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install bitsandbytes"):
        train("out", load_in_4bit=True)
    with pytest.raises(UsageError, match="--processes"):
        train("out", fsdp=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--load-in-4bit"):
        train("out", fsdp=True, load_in_4bit=True)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_accelerates_silent_fall_back_is_caught(train, monkeypatch):
    """On a CPU accelerate runs DDP where FSDP was asked for; the check on the parameters says so."""
    import torch

    from liger_cli.training.trainer import assert_sharded

    with pytest.raises(SetupError, match="fsdp_version 2"):
        assert_sharded(torch.nn.Linear(2, 2))


def test_the_24gb_recipe_fits_8b_on_24_gb(sparse_base, tmp_path, monkeypatch):
    from dataclasses import replace

    from conftest import QWEN3_8B

    base = sparse_base("qwen3-8b", config=QWEN3_8B)
    convert.convert(str(base), str(tmp_path / "liger"))
    read = train_plan.read_base(tmp_path / "liger")
    recipe = load_recipe("24gb")
    estimate = lambda recipe: train_plan.estimate_memory(read, recipe, 7_000_000, "bfloat16")  # noqa: E731
    assert recipe.load_in_4bit and recipe.gradient_checkpointing
    assert 6 << 30 < estimate(recipe) < 0.8 * 24e9
    assert estimate(replace(recipe, load_in_4bit=False)) > 16 << 30
    assert estimate(replace(recipe, gradient_checkpointing=False)) > 1.3 * estimate(recipe)
    monkeypatch.setattr(train_plan, "available", lambda device: 8 << 30)
    plan = {"memory_estimate_bytes": 9 << 30, "device": "cuda", "dtype": "bfloat16", "load_in_4bit": False}
    with pytest.raises(LigerError, match="estimated 9.0 GiB.*--load-in-4bit"):
        train_plan.check_memory(plan)
