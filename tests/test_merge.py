"""`liger merge`: exact, streamed, self-contained, and only into the base the adapter was trained on."""

import json
import os
import subprocess
import sys

import pytest
import torch

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import fingerprint, read_weights
from liger_cli.commands import convert, merge
from liger_cli.system.errors import ModelError, UsageError
from liger_cli.system.manifest import new_manifest, read_manifest, write_manifest

FAMILIES_TESTED = [name for name in ("llama", "mistral", "qwen2", "qwen3") if name in FAMILIES]
X = torch.arange(4, 44)[None]


@pytest.fixture
def setup(tiny_base, tmp_path):
    """setup(model_type, dtype, shards, layers, **lora) -> (converted folder, adapter folder)."""

    def make(model_type="qwen3", dtype=torch.float32, shards=1, layers=None, name="one", **lora):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = tmp_path / "base"
        if not base.exists():
            model = AutoModelForCausalLM.from_pretrained(tiny_base(model_type), dtype=dtype)
            model.save_pretrained(base, max_shard_size="10GB" if shards == 1 else "100KB")
            AutoTokenizer.from_pretrained(tiny_base(model_type)).save_pretrained(base)
        folder = tmp_path / "tiny-liger"
        if not folder.exists():
            convert.convert(str(base), str(folder), settings={"window": 8})
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj"], **lora}
        tuned = get_peft_model(load_model(folder, dtype=dtype), LoraConfig(layers_to_transform=layers, **settings))
        torch.manual_seed(len(name))
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.1)
        adapter = tmp_path / f"{name}-lora"
        tuned.save_pretrained(adapter)
        found = fingerprint(read_weights(folder))
        write_manifest(adapter, new_manifest("adapter", base={"path": str(folder)}, fingerprint=found))
        return folder, adapter

    return make


def peft_merged(folder, adapter, dtype=torch.float32):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(folder, dtype=dtype), adapter).merge_and_unload()


@pytest.mark.parametrize("model_type", FAMILIES_TESTED)
@pytest.mark.parametrize("shards", [1, 4])
def test_equals_pefts_own_merge(setup, tmp_path, model_type, shards):
    folder, adapter = setup(model_type, shards=shards)
    report = merge.run(adapter, output=tmp_path / "out", quiet=True)
    assert report["merged_tensors"] == 12
    with torch.no_grad():
        found = load_model(tmp_path / "out", dtype=torch.float32)(X).logits
        wanted = peft_merged(folder, adapter)(X).logits
        untouched = load_model(folder, dtype=torch.float32)(X).logits
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (found - untouched).abs().max() > 1e-2


def test_bfloat16_is_rounded_once_from_the_float32_sum(setup, tmp_path):
    folder, adapter = setup(dtype=torch.bfloat16)
    merge.run(adapter, output=tmp_path / "out", quiet=True)
    before, after = (load_model(place, dtype="auto").state_dict() for place in (folder, tmp_path / "out"))
    exact = peft_merged(folder, adapter, torch.float32).state_dict()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16()), name
        trained = any(key in name for key in ("q_proj", "k_proj", "v_proj"))
        assert torch.equal(tensor, before[name]) != trained, name


@pytest.mark.parametrize(
    "lora", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}]
)
def test_scales_of_peft(setup, tmp_path, lora):
    folder, adapter = setup(**lora)
    merge.run(adapter, output=tmp_path / "out", quiet=True)
    wanted = peft_merged(folder, adapter).state_dict()
    for name, tensor in load_model(tmp_path / "out", dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)


def test_untouched_shards_are_linked_and_the_base_is_left_alone(setup, tmp_path):
    folder, adapter = setup(shards=4, layers=[1])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report = merge.run(adapter, output=tmp_path / "out", link="hard", quiet=True)
    assert 0 < report["linked_shards"] < report["shards"]
    same = [path.name for path in (tmp_path / "out").glob("*.safetensors") if path.samefile(folder / path.name)]
    assert len(same) == report["linked_shards"]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_result_stands_alone(setup, tmp_path):
    """It loads in a process without liger after everything it came from is gone."""
    import shutil

    folder, adapter = setup(dtype=torch.bfloat16)
    merge.run(adapter, output=tmp_path / "out", quiet=True)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "merged"
    assert manifest["base"]["path"] == str(tmp_path / "base")
    assert manifest["base"]["fingerprint"] == fingerprint(read_weights(tmp_path / "base"))
    assert "Fine-tuned" in (tmp_path / "out" / "README.md").read_text()
    for gone in (folder, adapter, tmp_path / "base"):
        shutil.rmtree(gone)
    code = (
        "import sys; sys.modules['liger_cli'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__, model.generate(**tokenizer('w5 w6', return_tensors='pt'), max_new_tokens=4).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )
    assert "LigerQwen3ForCausalLM" in done.stdout, done.stderr


def test_two_adapters_and_another_dtype(setup, tmp_path):
    folder, first = setup()
    _, second = setup(name="second")
    merge.run([first, second], output=tmp_path / "out", dtype="bfloat16", quiet=True)
    plain = load_model(folder, dtype=torch.float32).state_dict()
    one, two = (peft_merged(folder, adapter).state_dict() for adapter in (first, second))
    found = load_model(tmp_path / "out", dtype="auto")
    assert found.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in found.state_dict().items():
        wanted = plain[name] + (one[name] - plain[name]) + (two[name] - plain[name])
        torch.testing.assert_close(tensor.float(), wanted, rtol=1e-2, atol=1e-3)


def test_refusals(setup, tmp_path, monkeypatch):
    folder, adapter = setup()
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other-liger"
    convert.convert(str(tmp_path / "base"), str(other), link="copy")
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match="other weights"):
        merge.run(adapter, base=other, quiet=True)
    with pytest.raises(UsageError, match="adapter_config"):
        merge.run(folder, quiet=True)
    with pytest.raises(UsageError, match="--base"):
        merge.run(adapter, base=tmp_path / "nowhere", quiet=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for field, value in {"use_dora": True, "bias": "all", "peft_type": "IA3"}.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ModelError):
            merge.run(adapter, quiet=True)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert not (tmp_path / "tiny-liger-merged").exists()
    merge.run(quiet=True)
    assert (tmp_path / "tiny-liger-merged").is_dir()
    with pytest.raises(UsageError, match="exists already"):
        merge.run(quiet=True)


def test_memory_stays_at_a_tensor(tmp_path):
    """Peak resident memory does not grow with the shard: 60 MB of weights more, one tensor's worth of memory."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from liger_cli.checkpoint.reader import read_weights\n"
        "from liger_cli.checkpoint.merged_shards import write_shard\n"
        "shard = read_weights(Path(sys.argv[1]))[0]\n"
        "import safetensors\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "write_shard(shard, Path(sys.argv[1], 'out'), [], dtype='bfloat16')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    from safetensors.torch import save_file

    tensors = {f"t{index}": torch.ones(1 << 20) for index in range(64)}  # 256 MiB, 4 MiB each
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert int(done.stdout) < 120 << 10, done.stdout + done.stderr  # KiB; mapped pages of the file count, too
    assert (tmp_path / "out").stat().st_size > 64 << 21
