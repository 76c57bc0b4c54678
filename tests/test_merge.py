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
from liger_cli.evaluation.subject import open_subject
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
    for field, value in {"use_dora": True, "lora_bias": True, "peft_type": "IA3"}.items():
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


WAYS = {
    "dora": {"use_dora": True},
    "dora, rank-stabilised": {"use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "head trained whole": {"modules_to_save": ["lm_head"]},
    "embeddings trained whole": {"modules_to_save": ["embed_tokens"]},
    "both trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings and a tied head": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms trained whole": {"modules_to_save": ["norm", "input_layernorm"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "all biases": {"bias": "all"},
    "biases of LoRA's layers": {"bias": "lora_only"},
    "feed-forward": {"target_modules": ["gate_proj", "down_proj", "o_proj"]},
}


@pytest.fixture
def tuned(tiny_base, tmp_path):
    """tuned(tied, **lora) -> (converted folder, adapter folder): every trained tensor of PEFT's moved a little."""

    def make(tied=False, **lora):
        from peft import LoraConfig, get_peft_model

        folder = tmp_path / "tiny-liger"
        convert.convert(str(tiny_base("qwen2", tie_word_embeddings=tied)), str(folder), settings={"window": 8})
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM", **lora}
        model = get_peft_model(load_model(folder, dtype=torch.float32), LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        model.save_pretrained(tmp_path / "lora")
        return folder, tmp_path / "lora"

    return make


def live(folder, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(folder, dtype=torch.float32), adapter).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_peft_can_train_merges_as_peft_runs_it(tuned, tmp_path, way, tied):
    folder, adapter = tuned(tied, **WAYS[way])
    merge.run(adapter, output=tmp_path / "out", quiet=True)
    with torch.no_grad():
        wanted = live(folder, adapter)(X).logits
        model = load_model(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(model(X).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (load_model(folder, dtype=torch.float32)(X).logits - wanted).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "again")  # what was untied stays so
    assert torch.equal(load_model(tmp_path / "again", dtype=torch.float32)(X).logits, model(X).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["dora", "head trained whole", "LoRA on the embeddings", "all biases"])
def test_the_same_adapters_are_evaluated_live(tuned, way):
    folder, adapter = tuned(**WAYS[way])
    subject = open_subject(adapter)
    with torch.no_grad():
        with subject.column("model") as model:
            assert torch.equal(model(X).logits, live(folder, adapter)(X).logits)
        with subject.column("base") as model:
            softmax = load_model(folder, dtype=torch.float32)
            softmax.set_attention_mode("softmax")
            same = torch.equal(model(X).logits, softmax(X).logits)
    # PEFT cannot switch off the biases of its own layers: then the column is not called the base.
    assert same == subject.has_recovery == (way != "all biases")


def test_fan_in_fan_out_says_nothing_about_linear_layers(tuned, tmp_path):
    folder, adapter = tuned()
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    merge.run(adapter, output=tmp_path / "out", quiet=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="fan_in_fan_out"):
        wanted = live(folder, adapter)(X).logits
    torch.testing.assert_close(
        load_model(tmp_path / "out", dtype=torch.float32)(X).logits, wanted, rtol=1e-5, atol=1e-5
    )


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("a_field_of_a_later_peft", 0.5),
    ],
)
def test_fields_that_may_change_the_model_are_refused_by_name(tuned, tmp_path, field, value):
    _, adapter = tuned()
    edit_json(adapter / "adapter_config.json", another_field_of_a_later_peft=None)
    merge.run(adapter, output=tmp_path / "out", quiet=True, dry_run=True)
    edit_json(adapter / "adapter_config.json", **{field: value})
    with pytest.raises(ModelError, match=f"{field}.*save_pretrained"):
        merge.run(adapter, output=tmp_path / "out", quiet=True)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_cannot_be_added_is_merged_alone(tuned, tmp_path, lora):
    _, adapter = tuned(**lora)
    with pytest.raises(UsageError, match="cannot be added"):
        merge.run([adapter, adapter], output=tmp_path / "out", quiet=True)


def test_a_value_too_large_for_the_dtype(setup, tmp_path):
    """Named, and nothing written: what is checked is the number that is written, not the float32 sum."""
    from safetensors.torch import load_file, save_file

    folder, adapter = setup()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = 1.5e5
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (adapter / "liger.json").unlink()
    with pytest.raises(ModelError, match="layers.1.mlp.down_proj.weight has a value of 150000, too large for float16"):
        merge.run(adapter, base=folder, output=tmp_path / "out", dtype="float16", quiet=True)
    assert not (tmp_path / "out").exists()
    merge.run(adapter, base=folder, output=tmp_path / "out", dtype="bfloat16", quiet=True)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_merged_is_evaluated(tuned, tmp_path):
    """A folder of merge_and_unload and save_pretrained has no liger.json: its base column is not called the base."""
    from transformers import AutoTokenizer

    folder, adapter = tuned(modules_to_save=["lm_head"])
    whole = live(folder, adapter).merge_and_unload()
    whole.save_pretrained(tmp_path / "by-peft")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "by-peft")
    subject = open_subject(tmp_path / "by-peft")
    with torch.no_grad():
        assert torch.equal(subject.model(X).logits, whole.eval()(X).logits)
    assert not subject.has_recovery and "no liger.json" in subject.base_source
    (adapter / "liger.json").unlink(missing_ok=True)
    assert open_subject(adapter).kind == "adapter"
