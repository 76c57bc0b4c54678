"""GGUF files as bases: whole weights made once, exactly what the file holds, and sentences for what cannot be read."""

import json

import pytest
import torch

from liger_cli.checkpoint import gguf as gguf_module
from liger_cli.commands.convert import convert
from liger_cli.system.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.system.manifest import read_manifest

gguf = pytest.importorskip("gguf")
X = torch.arange(4, 40)[None]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path, base, architecture="qwen2", extra=(), **fields):
    """The tiny base as a GGUF file, its projections in 8 bits (Q8_0); returns the weights that the file holds."""
    from safetensors.torch import load_file

    config = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    for name, value in fields.items():
        writer.add_string(f"{architecture}.{name.replace('__', '.')}", value)
    tokens = [*(chr(code) for code in range(33, 127)), "\u0120", "ww", "\u0120ww"]
    tokens += [f"{index:03}" for index in range(config["vocab_size"] - 2 - len(tokens))] + ["<|endoftext|>", "<|pad|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["w w", "\u0120 ww"])
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_pad_token_id(len(tokens) - 1)
    held = {}
    for name, weight in load_file(base / "model.safetensors").items():
        theirs = name.replace("model.layers.", "blk.")
        for ours, short in NAMES.items():
            theirs = theirs.replace(ours, short)
        value = weight.float().numpy()
        if "_proj.weight" in name:
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(theirs, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            value = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(theirs, value)
        held[name] = torch.from_numpy(value.copy())
    for name in extra:
        writer.add_tensor(name, torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(tiny_base):
    return tiny_base("qwen2")


def test_whole_weights_are_made_once_and_linked(base, here, capsys):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held = write_gguf(here / "tiny-Q8_0.gguf", base)
    (here / "adapter_config.json").write_text("{}")  # a neighbour that is not the file's
    report, _ = convert("tiny-Q8_0.gguf", settings={"mix": 0.0, "window": 64})
    said = capsys.readouterr().err
    assert "making whole weights (bfloat16" in said and "once" in said and "memory" in said
    assert any("whole weights (bfloat16) were made of tiny-Q8_0.gguf" in note for note in report["notes"])
    whole, out = here / "tiny-Q8_0-bfloat16", here / "tiny-Q8_0-liger-gla"
    made = load_file(whole / "model.safetensors")
    assert made.keys() == held.keys()
    for name, weight in made.items():
        assert torch.equal(weight, held[name].bfloat16()), name
    assert (whole / "model.safetensors").samefile(out / "model.safetensors") or report["link"] != "hard"
    assert read_manifest(out)["base"]["path"] == str(whole)
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(whole)
    assert torch.equal(ours(X).logits, plain(X).logits)
    same = [AutoTokenizer.from_pretrained(place, trust_remote_code=True)("ww ww").input_ids for place in (whole, out)]
    assert same[0] == same[1] == [95, 96]  # "ww", " ww"
    # A second conversion takes them as they are; other weights are not overwritten.
    before = (whole / "model.safetensors").stat().st_mtime_ns
    convert("tiny-Q8_0.gguf", "second", settings={"gate": "gdn"})
    assert (whole / "model.safetensors").stat().st_mtime_ns == before and "making" not in capsys.readouterr().err
    write_gguf(here / "tiny-Q8_0.gguf", base, extra=["rope_freqs.weight"])
    with pytest.raises(UsageError, match="of something else"):
        convert("tiny-Q8_0.gguf", "third")


def test_another_dtype(base, here):
    held = write_gguf(here / "tiny.gguf", base)
    report, _ = convert("tiny.gguf", "out", dtype="float32")
    assert report["bytes"] == 4 * sum(weight.numel() for weight in held.values())
    for wrong in ("int8", "auto"):
        with pytest.raises(UsageError, match="--dtype"):
            convert("tiny.gguf", "other", dtype=wrong)
    with pytest.raises(UsageError, match="--dtype is for GGUF files"):
        convert(str(base), "other", dtype="float32")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "weights.bin", "folder/model.GGUF"])
def test_a_missing_file_is_not_taken_for_a_hub_id(here, name):
    with pytest.raises(UsageError, match=f"{name} does not exist"):
        convert(name, "out")


def test_what_cannot_be_read_is_named(base, here, monkeypatch):
    def refused(kind, words, name="tiny.gguf", **options):
        with pytest.raises(kind, match=words) as caught:
            convert(name, "out", **options)
        assert "\n" not in str(caught.value)
        assert not [path for path in here.iterdir() if path.suffix != ".gguf"]

    (here / "tiny.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(ModelError, "git lfs pull")
    (here / "tiny.gguf").write_bytes(b"<!DOCTYPE html>")
    refused(ModelError, "not a GGUF file")
    (here / "tiny.gguf").write_bytes(b"GGUF" + bytes(40))
    refused(ModelError, "is broken")
    (here / "tiny-00001-of-00002.gguf").write_bytes(b"GGUF")
    refused(ModelError, "part of a model", "tiny-00001-of-00002.gguf")
    write_gguf(here / "tiny.gguf", base, "rwkv6")
    refused(ModelError, "cannot read the family of .*rwkv6")
    write_gguf(here / "tiny.gguf", base, "falcon")
    refused(ModelError, "'falcon', which liger does not convert")
    write_gguf(here / "tiny.gguf", base, extra=["rope_freqs.weight"])
    refused(ModelError, "scaled rotary frequencies")
    write_gguf(here / "tiny.gguf", base, rope__scaling__type="yarn")
    refused(ModelError, "scaled rotary frequencies")
    write_gguf(here / "tiny.gguf", base)
    refused(UsageError, "--dry-run does not make", dry_run=True)
    monkeypatch.setattr(gguf_module, "available", lambda device: 1000)
    refused(LigerError, "KiB of memory .* 1000 B are free")
    monkeypatch.setattr(gguf_module, "find_spec", lambda name: None)
    refused(SetupError, "need the package gguf")


def test_an_output_in_the_way_is_seen_first(base, here):
    write_gguf(here / "tiny.gguf", base)
    (here / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert("tiny.gguf", "out")
    assert not (here / "tiny-bfloat16").exists()
