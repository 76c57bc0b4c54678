"""Reading bases: what is refused, with which sentence, and what identifies the weights."""

import json
import os
import struct

import pytest
from conftest import QWEN3_8B, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liger_cli.checkpoint.reader import DTYPE_BITS, read_checkpoint, read_shard
from liger_cli.system.errors import ModelError, UsageError


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(folder, *words):
    with pytest.raises(ModelError) as caught:
        read_checkpoint(folder)
    assert caught.value.exit_code == 3
    sentence = str(caught.value)
    for word in words:
        assert word in sentence, sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_reads_what_transformers_wrote(tiny_base, model_type):
    checkpoint = read_checkpoint(tiny_base(model_type))
    assert checkpoint.family.model_type == model_type
    assert checkpoint.geometry.num_hidden_layers == 4
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE"} <= set(checkpoint.support_files)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads(tiny_base, tied):
    checkpoint = read_checkpoint(tiny_base("qwen2", tie_word_embeddings=tied))
    assert ("lm_head.weight" in checkpoint.tensors) != tied


def test_numbers_agree_with_the_library(tiny_base):
    from safetensors import safe_open

    folder = tiny_base("llama")
    checkpoint = read_checkpoint(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name, tensor in checkpoint.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == tensor.shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "quen3"}, ["quen3", "nearest is qwen3", "liger families"]),
        ({"model_type": None}, ["None", "not supported"]),
        ({"model_type": ["qwen3"]}, ["not supported"]),
        ({"liger": {"format": 1}}, ["linearized already"]),
        ({"model_type": "liger_qwen3"}, ["linearized already"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized"]),
        ({"text_config": {"model_type": "qwen3"}, "model_type": "qwen3_vl"}, ["multimodal", "text_config"]),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ["Qwen3ForSequenceClassification"]),
        ({"architectures": ["Qwen3Model"]}, ["Qwen3Model"]),
        ({"num_hidden_layers": 5}, ["4 layers", "num_hidden_layers is 5"]),
        ({"num_hidden_layers": 3}, ["4 layers", "num_hidden_layers is 3"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ({"num_hidden_layers": "4"}, ["num_hidden_layers"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers"]),
        ({"hidden_size": ...}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"num_key_value_heads": 4}, ["k_proj"]),
        ({"head_dim": 32}, ["q_proj"]),
        ({"vocab_size": 99}, ["embed_tokens"]),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, ["q_proj.bias"]),
    ],
)
def test_refused_configs(sparse_base, changes, words):
    folder = sparse_base()
    edit_config(folder, **changes)
    refused(folder, *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ' + "[" * 100_000, "\udcff"])
def test_broken_json(sparse_base, text):
    folder = sparse_base()
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


def test_missing_things(sparse_base, tmp_path):
    with pytest.raises(UsageError):
        read_checkpoint(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "config.json")
    (empty / "adapter_config.json").write_text("{}")
    refused(empty, "adapter")
    folder = sparse_base("sharded", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors", "missing")
    folder = sparse_base("bare")
    (folder / "model.safetensors").unlink()
    refused(folder, "neither")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(folder, "pickles", "save_pretrained")


@pytest.mark.parametrize("cut", [1, 1000, 10_000])
def test_truncated_shard(sparse_base, cut):
    folder = sparse_base(shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - cut)
    refused(folder, "model-00002-of-00002.safetensors", "whole")


def test_shard_that_is_a_stub(sparse_base):
    folder = sparse_base()
    for content in (b"", b"abc", b"<!DOCTYPE html>\n<title>Not found</title>"):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, "model.safetensors", "whole")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../other.safetensors", "sub/x.safetensors", "x.bin", "", 3, None, "..safetensors"]
)
def test_index_that_leads_outside(sparse_base, name):
    folder = sparse_base(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    refused(folder, "index.json")


def test_index_that_is_wrong(sparse_base):
    folder = sparse_base(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(folder, "model.extra")
    path.write_text('{"weight_map": []}')
    refused(folder, "weight_map")


def test_links_may_not_escape(sparse_base, tmp_path):
    folder, other = sparse_base(), tmp_path / "secret"
    os.rename(folder / "model.safetensors", other)
    (folder / "model.safetensors").symlink_to(other)
    refused(folder, "outside")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")
    refused(folder, "model.safetensors")


def test_support_files_may_not_escape(sparse_base, tmp_path):
    (tmp_path / "secret").write_text("mine")
    folder = sparse_base()
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(folder, "outside")


def test_pipes_are_not_opened(sparse_base):
    folder = sparse_base()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "plain file")


def hub_cache(folder, root):
    """The layout of the hub's cache: links from a snapshot to blobs."""
    repo = root / "models--Qwen--Qwen3-8B"
    snapshot = repo / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        os.rename(path, repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_links_of_the_hub_cache_are_followed(sparse_base, tmp_path):
    snapshot = hub_cache(sparse_base(shards=2), tmp_path / "hub")
    checkpoint = read_checkpoint(snapshot)
    assert all(shard.path.parent.name == "blobs" for shard in checkpoint.shards)


def test_single_file_wins_over_an_index(sparse_base):
    folder = sparse_base()
    (folder / "model.safetensors.index.json").write_text("broken")
    checkpoint = read_checkpoint(folder)
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert not checkpoint.indexed


def test_wrong_dtype(tmp_path, sparse_base):
    folder = sparse_base()
    checkpoint = read_checkpoint(folder)
    shapes = [(name, tensor.shape) for name, tensor in checkpoint.tensors.items()]
    write_shard(folder / "model.safetensors", shapes, dtype="I8", width=1)
    refused(folder, "I8")


def header(tmp_path, raw: bytes, data: bytes = b""):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return read_shard(tmp_path.resolve(), "x.safetensors")


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": [1, 2]},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        [],
        "text",
        None,
    ],
)
def test_broken_headers(tmp_path, entries):
    with pytest.raises(ModelError, match="header"):
        header(tmp_path, json.dumps(entries).encode(), bytes(8))


def test_header_longer_than_the_file(tmp_path):
    for length in (100, 2**63, 2**64 - 1):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ModelError, match="does not fit"):
            read_shard(tmp_path.resolve(), "x.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_refused_cleanly(tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("fuzz").resolve()
    (folder / "x.safetensors").write_bytes(raw)
    try:
        read_shard(folder, "x.safetensors")
    except ModelError:
        return
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length]) is not None


def test_dtype_sizes_match_the_library():
    import torch
    from safetensors.torch import _SIZE, _TYPES

    for name, dtype in _TYPES.items():
        if isinstance(dtype, torch.dtype) and name in DTYPE_BITS and DTYPE_BITS[name] >= 8:
            assert DTYPE_BITS[name] == 8 * _SIZE[dtype], name


def test_fingerprint_sees_weights_and_ignores_names(tmp_path):
    shapes = [("a", (4 << 20,))]
    write_shard(tmp_path / "a.safetensors", shapes)
    write_shard(tmp_path / "b.safetensors", shapes)
    read = lambda name: read_shard(tmp_path.resolve(), name).fingerprint()  # noqa: E731
    first, second = read("a.safetensors"), read("b.safetensors")
    assert {**first, "file": ""} == {**second, "file": ""}
    with open(tmp_path / "b.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    changed = read("b.safetensors")
    assert changed["header_sha256"] == first["header_sha256"]
    assert changed["samples_sha256"] != first["samples_sha256"]


def test_small_shard_is_hashed_whole(tmp_path):
    write_shard(tmp_path / "a.safetensors", [("a", (1 << 20,))])
    before = read_shard(tmp_path.resolve(), "a.safetensors").fingerprint()
    with open(tmp_path / "a.safetensors", "r+b") as file:
        file.seek(1_234_567)
        file.write(b"\x01")
    assert read_shard(tmp_path.resolve(), "a.safetensors").fingerprint() != before


def test_qwen3_8b_has_its_published_number_of_parameters(sparse_base):
    checkpoint = read_checkpoint(sparse_base(shards=5, config=QWEN3_8B))
    assert sum(tensor.numel for tensor in checkpoint.tensors.values()) == 8_190_735_360


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6b" * 32 + b"\nsize 17209920\n"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model"],
)
def test_pointers_of_git_are_named(sparse_base, name):
    folder = sparse_base()
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(POINTER)
    refused(folder, str(folder / name), "pointer", f"`git lfs pull` in {folder}")
    (folder / name).write_bytes(b"/annex/objects/SHA256E-s17209920--6b6b.safetensors\n")
    refused(folder, "pointer", "git annex get")


def test_a_pointer_in_place_of_the_index(sparse_base):
    folder = sparse_base(shards=2)
    (folder / "model.safetensors.index.json").write_bytes(POINTER)
    refused(folder, "model.safetensors.index.json", "git lfs pull")


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        (lambda name: f"language_model.{name}", ["begin with 'language_model.'"]),
        (lambda name: f"module.{name}", ["begin with 'module.'"]),
        (lambda name: f"_orig_mod.{name}", ["begin with '_orig_mod.'"]),
        (lambda name: f"base_model.model.{name}", ["begin with 'base_model.model.'"]),
        (lambda name: f"_forward_module.module.{name}", ["begin with '_forward_module.module.'"]),
        (
            lambda name: name.replace("model.", "model.language_model.", 1),
            ["begin with 'model.language_model.' in place of 'model.'"],
        ),
        (lambda name: name.removeprefix("model."), ["lack the prefix 'model.'", "AutoModelForCausalLM"]),
        (lambda name: name.replace("q_proj", "q_proj.base_layer"), ["not merged", "merge_and_unload"]),
    ],
)
def test_names_that_a_wrapper_wrote(sparse_base, renamed, words):
    folder = sparse_base()
    tensors = [(renamed(name), tensor.shape) for name, tensor in read_checkpoint(folder).tensors.items()]
    write_shard(folder / "model.safetensors", tensors)
    refused(folder, *words)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("llama", "LLaMAForCausalLM"), ("ernie4_5", "Ernie4_5_ForCausalLM"), ("ernie4_5", "Ernie4_5ForCausalLM")],
)
def test_other_spellings_of_the_architecture(sparse_base, model_type, architecture):
    folder = sparse_base(model_type=model_type)
    edit_config(folder, architectures=[architecture])
    assert read_checkpoint(folder).family.model_type == model_type


def test_an_adapter_beside_the_model(sparse_base):
    folder = sparse_base()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter", "merge_and_unload")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_attn_implementation", "flash_attention_2"),
        ("attn_implementation", "kernels-community/flash-attn"),
        ("experts_implementation", "grouped_mm"),
        ("return_dict", False),
        ("use_return_dict", False),
        ("use_cache", False),
        ("output_hidden_states", True),
        ("is_encoder_decoder", True),
        ("torch_dtype", "auto"),
        ("dtype", "fp16"),
    ],
)
def test_fields_that_say_how_to_run_it_are_left_out(sparse_base, field, value):
    folder = sparse_base()
    edit_config(folder, **{field: value})
    checkpoint = read_checkpoint(folder)
    assert field not in checkpoint.config and checkpoint.left_out == (field,)


def test_fields_that_do_no_harm_stay(sparse_base):
    folder, fields = sparse_base(), {"use_cache": True, "dtype": "bfloat16", "_attn_implementation": "eager"}
    edit_config(folder, **fields, return_dict=True)
    checkpoint = read_checkpoint(folder)
    assert fields.items() <= checkpoint.config.items() and not checkpoint.left_out


def as_float8(folder, block=32):
    """Make a folder's projections float8 in blocks with scales, as DeepSeek's and Qwen's are; returns whole weights."""
    import torch
    from safetensors.torch import load_file, save_file

    whole, held = load_file(folder / "model.safetensors"), {}
    for name, weight in whole.items():
        held[name] = weight
        if "_proj.weight" in name:
            rows, columns = (size // block for size in weight.shape)
            blocks = weight.view(rows, block, columns, block)
            scales = blocks.abs().amax((1, 3)) / 448
            held[name] = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = scales
            whole[name] = (held[name].float().view(blocks.shape) * scales[:, None, :, None]).reshape(weight.shape)
    (folder / "model.safetensors").unlink()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return whole


def test_the_recipe_for_float8_works_as_it_stands(tiny_base, tmp_path, monkeypatch):
    import shutil

    import torch
    import transformers
    from safetensors.torch import load_file

    folder = tmp_path / "float8"
    shutil.copytree(tiny_base("qwen3"), folder)
    whole = as_float8(folder)
    refused(folder, "F8_E4M3", "quantization_config", "save_original_format=False")
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "fmt": "e4m3"}
    edit_config(folder, quantization_config=settings)
    recipe = refused(folder, "is quantized", "FineGrainedFP8Config").split("`")[1]
    monkeypatch.chdir(tmp_path)
    eval(recipe, {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "FineGrainedFP8Config")})
    assert read_checkpoint(tmp_path / "whole").geometry.num_hidden_layers == 4
    made = load_file(tmp_path / "whole" / "model.safetensors")
    assert made.keys() == whole.keys()
    for name, weight in made.items():
        assert torch.equal(weight, whole[name].to(weight.dtype)), name


def test_a_folder_with_nothing_but_gguf_names_the_file(tmp_path):
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "convert the file itself", "model-Q4_0.gguf")
