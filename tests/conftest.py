"""Bases for the tests: tiny real models made by transformers, and folders with true headers and sparse weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported anywhere: workers side by side that all use every core take many times as long.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """tiny_base(model_type, **config) -> folder of a random model with a tokenizer, made once per session."""
    made = {}

    def make(model_type: str = "qwen3", **overrides) -> Path:
        key = json.dumps([model_type, overrides], sort_keys=True)
        if key not in made:
            made[key] = _save_tiny(tmp_path_factory.mktemp(f"{model_type}-base") / "tiny", model_type, overrides)
        return made[key]

    return make


def _save_tiny(folder: Path, model_type: str, overrides: dict) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    settings = {**TINY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, settings["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return folder


@pytest.fixture(scope="module")
def converted(tiny_base, tmp_path_factory):
    """A plain conversion with a window of 8 tokens, whose last layer stays softmax."""
    from liger_cli.commands import convert

    folder = tmp_path_factory.mktemp("converted") / "tiny-liger-gla"
    convert.convert(str(tiny_base()), str(folder), settings={"window": 8}, softmax_layers="3")
    return folder


@pytest.fixture
def sparse_base(tmp_path):
    """sparse_base(name, model_type, shards, config) -> folder with true headers and zeros that take no disk."""

    def make(name="base", model_type="qwen3", shards=1, config=None) -> Path:
        return write_sparse_base(tmp_path / name, model_type, shards, config or TINY)

    return make


def write_sparse_base(folder: Path, model_type: str, shards: int, sizes: dict) -> Path:
    from liger_cli.checkpoint.families import FAMILIES
    from liger_cli.checkpoint.reader import Geometry

    folder.mkdir(parents=True)
    family = FAMILIES[model_type]
    config = {
        "architectures": [f"{family.prefix}ForCausalLM"],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(family.expected_tensors(config, Geometry.of(config)).items())
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    per_shard = -(-len(tensors) // shards)
    weight_map = {}
    for index, name in enumerate(names):
        part = tensors[index * per_shard : (index + 1) * per_shard]
        write_shard(folder / name, part)
        weight_map |= {tensor: name for tensor, _ in part}
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_shard(path: Path, tensors, dtype: str = "BF16", width: int = 2) -> None:
    """A safetensors file of zeros: a true header, and a hole for the data."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors:
        nbytes = width
        for number in shape:
            nbytes *= number
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)


@pytest.fixture
def liger(tmp_path):
    """liger(*arguments, **popen) runs the command line in a process of its own, in an empty folder."""

    def call(*arguments, cwd=None, env=None, **options) -> subprocess.CompletedProcess:
        here = cwd or tmp_path / "cwd"
        here.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "liger_cli", *map(str, arguments)],
            cwd=here,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **(env or {})},
            capture_output=True,
            text=True,
            timeout=600,  # against hanging alone: a busy machine takes minutes to import torch
            **options,
        )

    return call
