"""Weights are read straight onto the device they run on, by every command that opens a model."""

import pytest
import torch

from liger_cli.calibration import base as calibration_base
from liger_cli.checkpoint import model_code
from liger_cli.checkpoint.model_code import read_onto
from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.commands.convert import convert
from liger_cli.conversion.plan import make_plan
from liger_cli.evaluation.subject import open_subject
from liger_cli.system.errors import LigerError, guarded
from liger_cli.training import plan as train_plan
from liger_cli.training.adapter import adapted_model
from liger_cli.training.recipes import load_recipe


class Recorded:
    """Stands in for a model class: what it is loaded with, and where its layers come to lie."""

    spread = {"": "cuda"}

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        cls.given = kwargs
        found = cls()
        found.hf_device_map = cls.spread
        return found


def test_on_which_devices(monkeypatch):
    """One device as it is named; all of several, with nothing left on the CPU; a sentence where they are too small."""
    read_onto("cpu", Recorded, "folder")
    assert "device_map" not in Recorded.given
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    read_onto("cuda", Recorded, "folder", dtype=torch.bfloat16)
    assert Recorded.given == {"use_safetensors": True, "dtype": torch.bfloat16, "device_map": {"": "cuda"}}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 24 << 30))
    read_onto("cuda", Recorded, "folder")
    assert Recorded.given["device_map"] == "auto" and Recorded.given["max_memory"] == {0: 9 << 30, 1: 9 << 30}
    read_onto("cuda:1", Recorded, "folder")
    assert Recorded.given["device_map"] == {"": "cuda:1"}
    monkeypatch.setattr(Recorded, "spread", {"model.layers.0": 0, "model.layers.1": 1, "lm_head": "disk"})
    with pytest.raises(LigerError, match="folder does not fit into the 20.0 GiB that the CUDA devices have left"):
        read_onto("cuda", Recorded, "folder")


def test_one_device_a_process(monkeypatch):
    monkeypatch.setattr(train_plan, "device", lambda: "cuda")
    assert train_plan.own_device() == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert train_plan.own_device() == "cuda:3"


@pytest.mark.parametrize("command", ["eval and bench", "calibrate", "finetune", "finetune, sharded"])
def test_every_command(tiny_base, tmp_path, monkeypatch, command):
    convert(str(tiny_base()), str(tmp_path / "liger"))
    seen = []

    def recorded(device, *_args, **_kwargs):
        seen.append(device)
        raise LigerError("stopped")

    monkeypatch.setattr(model_code, "read_onto", recorded)
    with pytest.raises(LigerError, match="stopped"):
        if command == "eval and bench":
            open_subject(tmp_path / "liger", device="meta")
        elif command == "calibrate":
            monkeypatch.setattr(calibration_base, "pick_device", lambda device: "meta")
            calibration_base.load_base(make_plan(read_checkpoint(tiny_base()), {}))
        else:
            monkeypatch.setattr("liger_cli.training.adapter.own_device", lambda: "meta")
            base, recipe = train_plan.read_base(tmp_path / "liger"), load_recipe("paper")
            modules = train_plan.lora_modules(base, recipe)
            adapted_model(base, recipe, modules, "bfloat16", sharded=command.endswith("sharded"))
    assert seen == ["cpu" if command.endswith("sharded") else "meta"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_too_little_memory_is_a_sentence(error, capsys):
    def failing():
        raise error

    assert guarded(failing) == 1
    assert capsys.readouterr().err.startswith("liger: there is not enough memory left; `liger doctor MODEL` tells")
