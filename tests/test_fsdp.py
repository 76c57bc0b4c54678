"""FSDP2 by torch's own `fully_shard` over gloo: two processes on a CPU compute what one does."""

import json
import os
import subprocess
import sys

import pytest

from liger_cli.commands import convert

# Runs in each of two processes; rank 0 writes what it found.
WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from liger_cli.training.adapter import adapted_model
from liger_cli.training.packing import Collator
from liger_cli.training.data import Example
from liger_cli.training.recipes import Recipe, Stage
from liger_cli.training.plan import lora_modules, read_base
from liger_cli.training.trainer import assert_sharded
from pathlib import Path
import numpy as np

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
folder, target = sys.argv[1:]
base = read_base(Path(folder))

def documents(seed):
    generator = np.random.default_rng(seed)
    made = [generator.integers(4, 128, size=length, dtype=np.int32) for length in (20, 11, 15)]
    return [Example(one, one) for one in made]

def losses(objective, sharded):
    recipe = Recipe(stages=(Stage(objective),))
    model = adapted_model(base, recipe, lora_modules(base, recipe), "float32")
    model.stage = recipe.stages[0]
    if sharded:
        for layer in model.logits_model().get_decoder().layers:
            fully_shard(layer.self_attn) if objective == "transfer" else None
            fully_shard(layer)
        fully_shard(model)
        assert_sharded(model)
        assert all(isinstance(one, DTensor) for one in model.parameters())
        whole = sum(one.numel() for one in model.parameters())
        here = sum(one.to_local().numel() for one in model.parameters())
        assert here < 0.6 * whole, (here, whole)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    found = []
    for step in range(4):
        # Each process one micro-batch when sharded, whose gradients are averaged; else both here.
        mine = [rank] if sharded else range(world)
        total = 0.0
        for part in mine:
            batch = Collator(0)([[documents(10 * step + part)]])
            loss = model(**batch)["loss"] * (1.0 if sharded else 1 / world)
            loss.backward()
            total += loss.item()
        if sharded:
            both = torch.tensor(total)
            dist.all_reduce(both)
            total = both.item() / world
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found

found = {one: [losses(one, False), losses(one, True)] for one in ("ce", "distill", "transfer")}
if rank == 0:
    Path(target).write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_sharded_processes_follow_the_curve_of_one(tiny_base, tmp_path):
    folder = tmp_path / "tiny-liger"
    convert.convert(str(tiny_base()), str(folder), settings={"window": 8}, softmax_layers="3")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(folder), str(tmp_path / "losses.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    assert list(found) == ["ce", "distill", "transfer"]
    for one, sharded in found.values():
        assert one[-1] != one[0]
        # Gradients are summed in another order, and AdamW's first steps magnify it where they are near zero.
        assert sharded == pytest.approx(one, rel=1e-4)
