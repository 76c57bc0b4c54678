"""`liger inspect`: what a folder is, and every way in which it is not as recorded."""

import json
import os
import shutil

import pytest
from conftest import write_shard

from liger_cli import __version__
from liger_cli.commands.convert import convert
from liger_cli.commands.inspect import inspect_folder, run
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.system.manifest import new_manifest, write_manifest


@pytest.fixture
def converted(sparse_base, tmp_path):
    base = sparse_base("base", shards=2)
    convert(str(base), str(tmp_path / "model"), softmax_layers="1", link="hard")
    return tmp_path / "model"


def test_a_converted_folder(converted, capsys):
    report = inspect_folder(converted)
    assert report["kind"] == "converted" and not report["differences"]
    assert report["made"]["by"] == __version__ and report["made"]["command"].startswith("liger")
    assert report["base"]["state"] == "there and the same"
    assert [(layer["first"], layer["last"], layer["kind"]) for layer in report["layers"]] == [
        (0, 0, "liger"),
        (1, 1, "softmax"),
        (2, 3, "liger"),
    ]
    assert {shard["state"] for shard in report["shards"]} == {"as recorded"}
    assert {shard["is"] for shard in report["shards"]} == {"the base's own file (hard link)"}
    assert {code["state"] for code in report["code"].values()} == {"as recorded"}
    assert all(code["liger"].startswith(__version__) for code in report["code"].values())
    assert run(str(converted)) == 0
    out = capsys.readouterr().out
    assert "layers 2-3: liger gla" in out and out.endswith("all as recorded\n")
    assert run(str(converted), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))


@pytest.mark.parametrize("revision", [None, 5, "main", ["x"]])
def test_a_revision_of_any_kind(converted, capsys, revision):
    """A manifest is a file that others write, too."""
    manifest = json.loads((converted / "liger.json").read_text())
    manifest["base"]["revision"] = revision
    (converted / "liger.json").write_text(json.dumps(manifest))
    assert run(str(converted)) == 0
    out = capsys.readouterr().out
    assert (f" at {revision} in " in out) == bool(revision) and "None" not in out


def test_code(converted):
    (converted / "liger_gates.py").write_text("x = 1\n")
    (converted / "extra.py").write_text("x = 1\n")
    (converted / "liger_window.py").unlink()
    found = inspect_folder(converted)
    assert len(found["differences"]) == 3
    for name in ("liger_gates.py", "extra.py", "liger_window.py"):
        assert any(name in sentence for sentence in found["differences"])
    assert found["code"]["liger_gates.py"] == {"state": "differs", "liger": None}
    # A stranger can record whatever he wrote: liger knows what it never wrote.
    manifest = json.loads((converted / "liger.json").read_text())
    import hashlib

    manifest["code"]["liger_gates.py"] = hashlib.sha256(b"x = 1\n").hexdigest()
    (converted / "liger.json").write_text(json.dumps(manifest))
    again = inspect_folder(converted)
    assert again["code"]["liger_gates.py"] == {"state": "as recorded", "liger": None}
    assert any("liger_gates.py" in sentence and "no liger" in sentence for sentence in again["differences"])


def test_weights_and_base(converted, tmp_path):
    name = "model-00001-of-00002.safetensors"
    shutil.copy(converted / name, tmp_path / "copy")
    os.replace(tmp_path / "copy", converted / name)
    report = inspect_folder(converted)
    assert not report["differences"] and report["shards"][0]["is"] == "a file of its own"
    with open(converted / name, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1")
    assert any(name in sentence for sentence in inspect_folder(converted)["differences"])
    os.rename(tmp_path / "base", tmp_path / "moved")
    gone = inspect_folder(converted)
    assert gone["base"]["state"] == "gone" and len(gone["differences"]) == 1
    os.rename(tmp_path / "moved", tmp_path / "base")
    with open(tmp_path / "base" / name, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\2")
    assert inspect_folder(converted)["base"]["state"] == "there, with other weights"


def test_full_finds_what_samples_cannot(sparse_base, tmp_path):
    sizes = {
        "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 1024,
    }  # fmt: skip
    base = sparse_base(config=sizes)
    convert(str(base), str(tmp_path / "model"), link="copy")
    path = tmp_path / "model" / "model.safetensors"
    size = path.stat().st_size
    assert size > 8 << 20
    with open(path, "r+b") as file:
        file.seek((size - (64 << 10)) // 63 + (64 << 10) + 100)  # behind the second sample
        file.write(b"\1")
    assert not inspect_folder(tmp_path / "model")["differences"]
    report = inspect_folder(tmp_path / "model", full=True)
    assert len(report["differences"]) == 1 and "between the samples" in report["differences"][0]
    assert len(report["shards"][0]["sha256"]) == 64


def test_a_base(sparse_base, capsys):
    report = inspect_folder(sparse_base(shards=2))
    assert report["kind"] == "base" and report["model_type"] == "qwen3" and report["made"] is None
    assert not report["differences"]


def test_an_adapter(converted, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(converted)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = [(f"{module}.lora_A.weight", (2, 64)), (f"{module}.lora_B.weight", (64, 2))]
    write_shard(adapter / "adapter_model.safetensors", pair, "F32", 4)
    from liger_cli.checkpoint.reader import fingerprint, read_weights

    write_manifest(
        adapter,
        new_manifest(
            "adapter",
            base={"path": str(converted), "name": "model"},
            fingerprint=fingerprint(read_weights(converted)),
            settings={"recipe": {"name": "paper"}},
        ),
    )
    report = inspect_folder(adapter)
    assert (report["kind"], report["ranks"], report["recipe"]) == ("adapter", [2], "paper")
    assert report["base"]["state"] == "there and the same" and not report["differences"]


def test_checkpoints(tmp_path, capsys):
    checkpoint = tmp_path / "run.partial" / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run.partial" / "run.json").write_text("{}")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    assert inspect_folder(checkpoint)["differences"]
    (checkpoint / "complete").touch()
    assert inspect_folder(checkpoint)["step"] == 3 and run(str(checkpoint)) == 0
    (tmp_path / "run.partial" / "run.json").write_text('{"recipe": {"name": "paper"}, "data": "demo"}')
    report = inspect_folder(tmp_path / "run.partial")
    assert (report["kind"], report["steps"], report["recipe"]) == ("checkpoint", [3], "paper")


def test_what_is_no_model(tmp_path, converted):
    with pytest.raises(ModelError, match="not a model"):
        inspect_folder(tmp_path)
    with pytest.raises(UsageError):
        inspect_folder(tmp_path / "nowhere")
    os.truncate(converted / "model-00002-of-00002.safetensors", 100)
    with pytest.raises(ModelError, match="whole"):
        inspect_folder(converted)


def test_command_line(converted, liger):
    assert liger("inspect", converted).returncode == 0
    (converted / "liger_gates.py").write_text("x")
    done = liger("inspect", converted)
    assert done.returncode == 1 and "differs: the code file liger_gates.py" in done.stdout
    assert liger("inspect", converted.parent).returncode == 3


def test_no_torch(converted, liger):
    import subprocess
    import sys

    code = (
        "import sys; from liger_cli.commands.inspect import run; code = run(sys.argv[1]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(converted)], capture_output=True).returncode == 0


@pytest.mark.parametrize("settings", [{}, {"branch_scales": True}])
def test_what_transformers_saved(tiny_base, tmp_path, settings, capsys):
    """`save_pretrained`, a Trainer's folder and checkpoint, with and without PEFT: whole, exit code 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    convert(str(tiny_base("qwen3")), str(tmp_path / "model"), settings=settings)
    row = torch.arange(4, 40)

    def tuned(model, name):
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 8)
        trainer.train()
        return trainer

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)

    load().save_pretrained(tmp_path / "saved")
    tuned(load(), "whole").save_model()
    tuned(get_peft_model(load(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")), "lora")
    wanted = {"saved": ("converted", None), "whole": ("converted", None), "whole/checkpoint-1": ("converted", 1)}
    wanted |= {"lora/checkpoint-1": ("adapter", 1)}
    for name, (kind, step) in wanted.items():
        report = inspect_folder(tmp_path / name)
        assert (report["kind"], report.get("step"), report["differences"]) == (kind, step, []), name
        assert run(str(tmp_path / name)) == 0
        out = capsys.readouterr().out
        assert "no liger.json" in out and "None" not in out and out.endswith("whole\n")
    with pytest.raises(ModelError, match="lora/checkpoint-1"):
        inspect_folder(tmp_path / "lora")
    (tmp_path / "saved" / "liger_gates.py").write_text("x = 1\n")
    assert run(str(tmp_path / "saved")) == 1  # code that no liger wrote is a difference there, too
