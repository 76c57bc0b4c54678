"""The estimates of memory against what runs hold at once, counted by their tensors; and an 8B base on 24 GB."""

import gc
from dataclasses import replace

import pytest
import torch
from conftest import QWEN3_8B
from live_bytes import LiveBytes

from liger_cli.calibration.base import load_base
from liger_cli.calibration.calibrate import fit_layers, head_costs
from liger_cli.calibration.sizes import calibration_bytes
from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.commands.convert import convert
from liger_cli.commands.needs import command_needs
from liger_cli.conversion.plan import make_plan, read_layer_bytes, with_defaults
from liger_cli.evaluation.position import modes, score_positions
from liger_cli.training import plan as train_plan
from liger_cli.training.adapter import adapted_model
from liger_cli.training.recipes import Stage, load_recipe

SHAPES = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 600},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
}
KEPT = {"kept": 64, "rest": True, "gate": "none", "mix": 0.0, "sinks": 4}
TOKENS = 512
LEAST, MOST = 1.0, 2.8  # of the estimate to what is counted: it is to be on the safe side, but no excuse


def held_by_training(base, recipe, dtype: str) -> tuple[int, int]:
    """Bytes that two steps hold at most beside the frozen weights, and what is estimated for them."""
    model = adapted_model(base, recipe, train_plan.lora_modules(base, recipe), dtype).train()
    model.stage = recipe.stages[0]
    trained = [one for one in model.parameters() if one.requires_grad]
    count = sum(one.numel() for one in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(4, 600, (1, TOKENS))
    gc.collect()
    with LiveBytes(model) as live:
        for _ in range(2):
            (model(input_ids=ids, labels=ids, lengths=torch.tensor([TOKENS]))["loss"] / TOKENS).backward()
            optimizer.step()
            optimizer.zero_grad()
    frozen = train_plan.weight_bytes(base, recipe, 4 if dtype == "float32" else 2)
    return live.most + 4 * count, train_plan.estimate_memory(base, recipe, count, dtype) - frozen


def within(estimate: float, counted: float) -> None:
    assert LEAST <= estimate / counted <= MOST, f"{estimate / 2**20:.1f} MiB estimated, {counted / 2**20:.1f} counted"


@pytest.mark.parametrize("objective", ["ce", "distill", "transfer"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, KEPT])
def test_training(tiny_base, tmp_path, settings, dtype, checkpointing, objective):
    convert(str(tiny_base("llama", **SHAPES)), str(tmp_path / "liger"), settings=settings)
    objectives = {"ce": (Stage("ce"),), "distill": (Stage("distill"),), "transfer": (Stage("transfer"),)}
    recipe = replace(load_recipe("paper"), stages=objectives[objective], seq_len=TOKENS)
    recipe = replace(recipe, gradient_checkpointing=checkpointing)
    counted, estimate = held_by_training(train_plan.read_base(tmp_path / "liger"), recipe, dtype)
    within(estimate, counted)


def test_transfer_of_many_layers_is_computed_again(tiny_base, tmp_path):
    """With gradient checkpointing a layer's attention, which runs by itself, holds its inputs alone."""
    convert(str(tiny_base("llama", **SHAPES | {"num_hidden_layers": 10})), str(tmp_path / "liger"), settings=KEPT)
    base = train_plan.read_base(tmp_path / "liger")
    recipe = replace(load_recipe("paper"), stages=(Stage("transfer"),), seq_len=TOKENS)
    whole, _ = held_by_training(base, recipe, "float32")
    counted, estimate = held_by_training(base, replace(recipe, gradient_checkpointing=True), "float32")
    within(estimate, counted)
    assert counted < whole / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_and_evaluation(tiny_base, dtype):
    """The two passes of a calibration together, and the columns of an evaluation."""
    plan = make_plan(read_checkpoint(tiny_base("llama", **SHAPES)), with_defaults({}, calibrate=True))
    model, width = load_base(plan).to(dtype), dtype.itemsize
    attentions, sizes = model.get_decoder().liger_attentions(), [0, 16, 64, 256]
    rows = torch.randint(4, 600, (4, TOKENS))
    gc.collect()
    with LiveBytes(model) as live:
        states = fit_layers(model, attentions, rows, sizes)
        head_costs(model, attentions, rows[:2], sizes, states, "it")
    within(calibration_bytes(plan, TOKENS, width), live.most)
    gc.collect()
    with LiveBytes(model) as live:
        score_positions(dict(modes(model)), torch.randint(4, 600, (2, TOKENS + 1)), batch_size=2)
    logits = 4 * 4 * 2 * TOKENS * 600
    within(2 * TOKENS * read_layer_bytes(plan.checkpoint.config, plan.checkpoint.geometry, width) + logits, live.most)


def test_8b_on_24_gb(sparse_base):
    """Every command fits beside a 24 GB card's own needs, training with gradient checkpointing; without it does not."""
    folder = sparse_base("qwen3-8b", config=QWEN3_8B)
    needs = {row["command"]: row["bytes"] for row in command_needs(folder, "cuda")}
    assert needs.pop("liger finetune") > 24e9
    assert set(needs) == {
        "liger convert --calibrate", "liger eval", "liger bench",
        "liger finetune --gradient-checkpointing", "liger finetune --gradient-checkpointing --load-in-4bit",
    }  # fmt: skip
    assert all(nbytes < 0.95 * 24e9 for nbytes in needs.values()), needs
    assert all(nbytes > 16.3e9 for command, nbytes in needs.items() if "4bit" not in command)
    on_cpu = {row["command"]: row["bytes"] for row in command_needs(folder, "cpu")}
    assert on_cpu["liger eval"] > 32e9 and not any("4bit" in command for command in on_cpu)
