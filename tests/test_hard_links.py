"""Saving into or over a converted folder never writes through a hard link into the base: told by the base's hashes."""

import json
import os
import shutil

import pytest
import torch
from test_convert import digest, entries

from liger_cli.commands import convert, finetune, merge
from liger_cli.system.errors import UsageError
from liger_cli.system.manifest import read_manifest

X = torch.arange(4, 44)[None]
SMALL = {"recipe": "paper", "max_steps": 2, "seq_len": 48, "batch_size": 4, "micro_batch_size": 2, "held_out": 4,
         "quiet": True}  # fmt: skip


@pytest.fixture
def linked(tiny_base, tmp_path):
    """(base, converted): the converted folder's shards are the base's own files."""
    base, made = tmp_path / "base", tmp_path / "made"
    shutil.copytree(tiny_base(), base)
    add_words(base / "tokenizer.json")
    convert.convert(str(base), str(made), settings={"window": 8}, link="hard")
    assert os.path.samefile(base / "model.safetensors", made / "model.safetensors")
    return base, made


def add_words(path):
    """As large as the tokenizers of real models, which are of megabytes."""
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words |= {f"unused{index}": index for index in range(len(words), len(words) + 20_000)}
    path.write_text(json.dumps(content))
    assert path.stat().st_size > 256 << 10


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(["w5", "w6", "w7"] * 10)}) + "\n" for _ in range(40)))
    return path


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_only_weights_are_linked(linked):
    """Everything that people edit in place, or that a tokenizer writes, is a file of the folder's own."""
    base, made = linked
    before = digest(base)
    assert {path.name for path in made.rglob("*") if path.stat().st_nlink > 1} == {"model.safetensors"}
    for path in made.iterdir():
        if path.name != "model.safetensors":
            with open(path, "r+b") as file:
                file.write(b"#")
    assert digest(base) == before


def test_saved_over_itself(linked):
    base, made = linked
    before = digest(base)
    model = load(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # of memory that may be mapped from the very file
    assert digest(base) == before
    logits = model(X).logits
    model.save_pretrained(made)
    assert digest(base) == before
    assert torch.equal(load(made)(X).logits, logits)
    model.half().save_pretrained(made, max_shard_size="50KB")
    assert digest(base) == before
    assert len(list(made.glob("*.safetensors"))) > 1


def test_a_tokenizer_saved_into_it(linked):
    from transformers import AutoTokenizer

    base, made = linked
    before = digest(base)
    tokenizer = AutoTokenizer.from_pretrained(made, trust_remote_code=True)
    tokenizer.add_tokens(["<brand-new>"])
    tokenizer.save_pretrained(made)
    assert "<brand-new>" in (made / "tokenizer.json").read_text()
    assert digest(base) == before


def test_peft_saves_and_merges_into_it(linked):
    from peft import LoraConfig, get_peft_model

    base, made = linked
    before = digest(base)
    adapted = get_peft_model(load(made), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(made)
    assert (made / "adapter_model.safetensors").exists()
    assert digest(base) == before
    merged = adapted.merge_and_unload()
    merged.save_pretrained(made)
    assert digest(base) == before
    assert (made / "model.safetensors").stat().st_nlink == 1


def test_safetensors_replaces_files(linked):
    """What strangers' scripts call. Before 0.8 it wrote in place; transformers 5.17 asks for 0.8."""
    from safetensors.torch import load_file, save_file

    base, made = linked
    before = digest(base)
    tensors = load_file(made / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, made / "model.safetensors")
    assert digest(base) == before


def test_our_own_commands_over_it(linked, corpus, tmp_path):
    base, made = linked
    before = digest(base)
    other = tmp_path / "other"
    convert.convert(str(base), str(other), settings={"window": 8}, link="hard")
    convert.convert(str(base), str(made), settings={"window": 8, "gate": "gdn"}, link="hard", force=True)
    convert.refresh(str(made))
    assert digest(base) == before
    finetune.run(other, data=str(corpus), output=tmp_path / "lora", **SMALL)
    merge.run(tmp_path / "lora", output=made, force=True, quiet=True)
    assert read_manifest(made)["kind"] == "merged"
    assert {path.name for path in made.rglob("*") if path.stat().st_nlink > 1} <= {"model.safetensors"}
    assert digest(base) == before
    convert.convert(str(base), str(made), settings={"window": 8}, link="hard", force=True)
    finetune.run(other, data=str(corpus), output=made, force=True, **SMALL)
    assert read_manifest(made)["kind"] == "adapter"
    assert digest(base) == before
    for call in (
        lambda: merge.run(tmp_path / "lora", output=other, force=True, quiet=True),
        lambda: finetune.run(other, data=str(corpus), output=other, force=True, **SMALL),
    ):
        with pytest.raises(UsageError, match="lie in one another"):
            call()
    assert digest(base) == before
    assert entries(tmp_path) == {"base", "made", "other", "lora", "text.jsonl"}
