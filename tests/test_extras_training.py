"""Parameters that liger adds to a model: trained whole beside LoRA, saved where PEFT finds them, merged exactly."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
import yaml
from test_extras import LOLCATS, SUPRA

from liger_cli.checkpoint import adapters
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import EXTRAS
from liger_cli.commands import convert, finetune, merge
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.training.recipes import Recipe, Stage, load_recipe

SMALL = {"seq_len": 48, "batch_size": 4, "micro_batch_size": 2, "held_out": 8, "max_steps": 6, "quiet": True}
X = torch.arange(4, 64)[None]


@pytest.fixture
def setup(tiny_base, tmp_path):
    """setup(recipe, settings, **flags) -> (converted folder, adapter folder, report)."""
    rng = Random(0)
    corpus = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(f"w{rng.randrange(4, 128)}" for _ in range(rng.randint(3, 40)))} for _ in range(120)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(recipe, settings, name="out", **flags):
        folder = tmp_path / "tiny-liger"
        if not folder.exists():
            convert.convert(str(tiny_base()), str(folder), settings={"window": 8, **settings})
        if recipe in ("lolcats", "supra"):  # for models of a window of 64, which these texts seldom leave
            recipe = replace(load_recipe(recipe), model={})
        if isinstance(recipe, Recipe):
            path = tmp_path / f"{recipe.name}.yaml"
            path.write_text(yaml.safe_dump(recipe.to_dict()))
            recipe = str(path)
        output = tmp_path / name
        report = finetune.run(folder, data=str(corpus), recipe=recipe, output=output, **{**SMALL, **flags})
        return folder, output, report

    return make


def changed(folder, merged):
    """Last parts of the names of tensors that differ."""
    before, after = (load_model(place, dtype=torch.float32).state_dict() for place in (folder, merged))
    assert set(before) == set(after)
    return {name.split(".")[-2 if name.endswith("weight") else -1] for name in before
            if not torch.equal(before[name], after[name])}  # fmt: skip


@pytest.mark.parametrize(
    "recipe, settings", [("lolcats", LOLCATS), ("supra", SUPRA), ("paper", {"gate_params": "learned"})]
)
def test_trained_saved_loaded_by_peft_and_merged(setup, tmp_path, recipe, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, adapter, report = setup(recipe, settings)
    assert report["trainable_extra_parameters"] > 0
    merge.run(adapter, output=tmp_path / "merged", quiet=True)
    wanted = {"q_proj", "k_proj", "v_proj"}
    wanted |= {
        "paper": {"gate_down", "gate_up", "gate_bias"},
        "lolcats": {"o_proj", "feature_q", "feature_k", "window_factor"},
        "supra": {"o_proj", "feature_q", "feature_k", "feature_q_bias", "feature_k_bias"},
    }[recipe]
    assert changed(folder, tmp_path / "merged") == wanted
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        found = load_model(tmp_path / "merged", dtype=torch.float32)(X).logits
        torch.testing.assert_close(tuned(X).logits, found, rtol=1e-4, atol=1e-4)
    trained = {name: one for name, one in tuned.get_base_model().named_parameters() if adapters.is_extra(name)}
    merged = load_model(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert trained and all(torch.equal(merged[name], one) for name, one in trained.items())


def test_texts_that_lie_within_the_window(setup, tmp_path):
    """Feature maps that are trained alone have no part in them: the first stage goes by and leaves them as they are."""
    folder, adapter, report = setup("lolcats", {**LOLCATS, "window": 64})
    assert report["steps_done"] == SMALL["max_steps"]
    merge.run(adapter, output=tmp_path / "merged", quiet=True)
    assert changed(folder, tmp_path / "merged") == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_stages_train_what_they_say(setup, tmp_path):
    """The feature maps alone, then LoRA alone: each keeps what the other trained."""
    first = Stage("transfer", 0.5, 1e-2, train="extra")
    recipe = Recipe(name="both", schedule="constant", stages=(first, Stage("ce", 0.5, 1e-3, train="lora")))
    folder, both, _ = setup(recipe, LOLCATS, "both")
    only = replace(recipe, name="only", stages=(first,))
    _, alone, report = setup(only, LOLCATS, "alone", max_steps=3)
    assert report["trainable_parameters"] == report["trainable_extra_parameters"]
    assert (
        json.loads((both / "liger.json").read_text())["result"]["trainable_parameters"] > report["trainable_parameters"]
    )
    for name in ("both", "alone"):
        merge.run(tmp_path / name, output=tmp_path / f"{name}-merged", quiet=True)
    one, other = ((tmp_path / f"{name}-merged" / EXTRAS).read_bytes() for name in ("both", "alone"))
    assert one == other != (folder / EXTRAS).read_bytes()
    assert changed(folder, tmp_path / "alone-merged") == {"feature_q", "feature_k", "window_factor"}
    assert {"q_proj", "k_proj", "v_proj"} < changed(folder, tmp_path / "both-merged")
    frozen = replace(recipe, name="frozen", stages=(Stage("ce", train="lora"),))
    _, _, report = setup(frozen, LOLCATS, "frozen", max_steps=2)
    assert report["trainable_extra_parameters"] == 0
    merge.run(tmp_path / "frozen", output=tmp_path / "frozen-merged", quiet=True)
    assert (tmp_path / "frozen-merged" / EXTRAS).read_bytes() == (folder / EXTRAS).read_bytes()


def test_resumed_in_either_stage_to_the_same_bytes(setup, tmp_path, monkeypatch):
    from transformers import Trainer

    _, whole, _ = setup("lolcats", LOLCATS, "whole", save_steps=1)
    real = Trainer._save_checkpoint

    def save(self, *args):
        if self.state.global_step in stops:
            stops.remove(self.state.global_step)
            raise KeyboardInterrupt
        real(self, *args)

    stops = [3, 5]
    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            setup("lolcats", LOLCATS, "killed", save_steps=1, resume=resume)
    _, killed, report = setup("lolcats", LOLCATS, "killed", save_steps=1, resume=True)
    assert report["resumed_from_step"] == 4
    for name in ("adapter_model.safetensors", "log.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_refusals(setup, tmp_path, tiny_base):
    plain = tmp_path / "plain"
    convert.convert(str(tiny_base()), str(plain), settings={"window": 8})
    with pytest.raises(UsageError, match="liger convert BASE --recipe lolcats"):
        finetune.run(plain, data=str(tmp_path / "text.jsonl"), recipe="lolcats", output=tmp_path / "none", **SMALL)
    _, adapter, _ = setup("lolcats", LOLCATS, max_steps=2)
    _, second, _ = setup("lolcats", LOLCATS, "second", max_steps=2, seed=1)
    with pytest.raises(UsageError, match="cannot be added"):
        merge.run([adapter, second], output=tmp_path / "merged", quiet=True)
    with pytest.raises(ModelError, match="does not have"):
        adapters.check_shapes(adapters.read_adapter(adapter), plain, finetune.read_base(plain).shards)
    assert load_recipe("lolcats").differs and load_recipe("supra").differs
    assert not (tmp_path / "merged").exists()
