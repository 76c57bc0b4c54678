"""Every row of `families.FAMILIES`, and the variants of a family that its config can ask for, held to transformers.

The table of tests is made from the registry: a family is listed only if all of this passes. The random models have
weights large enough that attention is far from uniform, and norms, biases and sinks that are not neutral.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from conftest import TINY
from test_convert import BLOCKER
from test_extras import LOLCATS, SUPRA
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import Geometry, read_checkpoint
from liger_cli.commands import convert as convert_module
from liger_cli.commands import families as family_table
from liger_cli.commands.convert import convert
from liger_cli.system.errors import ModelError, UsageError

TOLERANCE = 2e-5
ALTERNATING = ["sliding_attention", "full_attention"] * 2
SMALL_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
# What a family's table row needs to be tiny and to show its local layers within a short text.
TINY_FAMILY = {
    "ministral": {"layer_types": ALTERNATING, "sliding_window": 24},
    "gemma2": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24, "layer_types": ALTERNATING},
    "olmo3": {"sliding_window": 24},
    "cohere2": {"sliding_window": 24},
    "exaone4": {"sliding_window": 24},
    "gpt_oss": {"sliding_window": 24},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-3": ("mistral", {"sliding_window": None}),
    "ministral3-long": ("ministral3", {
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0},
    }),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN, "attention_bias": True}),
    "qwen3_moe-dense-layer": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "gemma3-wide": ("gemma3_text", {"sliding_window": 24, "layer_types": ALTERNATING, "query_pre_attn_scalar": 7}),
    "phi4-mini": ("phi3", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
    }),
    "phi3-window": ("phi3", {"sliding_window": 24}),
    "olmo-clip": ("olmo", {"clip_qkv": 0.3}),
    "olmoe-clip": ("olmoe", {"clip_qkv": 0.3}),
    "granite-scale": ("granite", {"attention_multiplier": 0.7, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "granitemoe-scale": ("granitemoe", {"attention_multiplier": 0.7}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, "sliding_window": 24}),
    "cohere-norm": ("cohere", {"use_qk_norm": True}),
    "exaone4-small": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "ernie-bias": ("ernie4_5", {"use_bias": True}),
    "seed-bias": ("seed_oss", {"attention_out_bias": True}),
    "stablelm-12b": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "stablelm-bias": ("stablelm", {"use_qkv_bias": True}),
    "phi-norm": ("phi", {"qk_layernorm": True, "num_key_value_heads": 4}),
}  # fmt: skip
CASES = {name: (name, TINY_FAMILY.get(name, {})) for name in FAMILIES} | VARIANTS
every_case = pytest.mark.parametrize("case", CASES)
NOT_LOADED = "mlp.act_fn."  # Apertus writes two constants of its activation function beside the learned ones


def settings_of(case: str) -> tuple[str, dict]:
    model_type, overrides = CASES[case]
    known = AutoConfig.for_model(model_type)
    small = {key: value for key, value in SMALL_EXPERTS.items() if hasattr(known, key)}
    # StableLM and Phi have no head_dim of their own.
    tiny = {key: value for key, value in TINY.items() if key != "head_dim" or hasattr(known, key)}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return model_type, {**tiny, **small, **ids, **overrides}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """folder_of(case) -> a tiny random base; folder_of(case, **convert's arguments) -> it converted by the command."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def make_base(case):
        model_type, settings = settings_of(case)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "norm" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                elif "self_attn" in name:
                    parameter.mul_(8.0)
        model.save_pretrained(root / case)
        return root / case

    def make(case, linearize_local=False, **spec):
        base = make_base(case)
        if not spec:
            return base
        name = "-".join([case, str(linearize_local), *(f"{key}{value}" for key, value in sorted(spec.items()))])
        if not (root / name).exists():
            convert(str(base), str(root / name), settings=spec, linearize_local=linearize_local)
        return root / name

    return make


def implementations(folder) -> list[str]:
    """The attention functions that the family has in transformers, on a CPU."""
    config = AutoConfig.from_pretrained(folder)
    names = ["eager", "sdpa"]
    if not getattr(AutoModelForCausalLM._model_mapping[type(config)], "_supports_sdpa", False):
        names.remove("sdpa")
    return names


def load_base(folder, implementation="eager"):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()


def load(folder, implementation="eager"):
    return load_model(folder, attn_implementation=implementation).eval()


def tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(4, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def sliding_window(base) -> int:
    return getattr(base.config, "sliding_window", None) or 10**6


@every_case
@torch.no_grad()
def test_identity(folder_of, case):
    """The gate. mix 0, window >= T: the base's logits bit for bit, padded or not; local layers left alone or not."""
    family = FAMILIES[CASES[case][0]]
    assert bool(family.identity_tolerance) == bool(family.identity_reason)
    for implementation in implementations(folder_of(case)):
        base = load_base(folder_of(case), implementation)
        model = load(folder_of(case, mix=0.0, window=64), implementation)
        assert list(model.state_dict()) == list(base.state_dict())
        all_linearized = all(layer.keeps_state for layer in model.get_decoder().liger_attentions())
        length = min(60, sliding_window(base)) if all_linearized else 60
        linearized = load(folder_of(case, linearize_local=True, mix=0.0, window=64), implementation)
        assert all(layer.keeps_state for layer in linearized.get_decoder().liger_attentions())
        for candidate, size in ((model, length), (linearized, min(60, sliding_window(base)))):
            ids = tokens(size, batch=2)
            mask = torch.ones_like(ids)
            mask[1, : size // 3] = 0
            for arguments in ({}, {"attention_mask": mask}):
                actual, expected = candidate(ids, **arguments).logits, base(ids, **arguments).logits
                assert expected.std() > 1e-3
                assert (actual - expected).abs().max().item() <= family.identity_tolerance


@every_case
@torch.no_grad()
def test_band(folder_of, case):
    """mix 0, a window shorter than the text: the base under an explicit band mask."""
    base = load_base(folder_of(case))
    model = load(folder_of(case, linearize_local=True, mix=0.0, window=7))
    ids = tokens(60)
    band = create_causal_mask(
        config=base.config,
        inputs_embeds=base.get_input_embeddings()(ids),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=sliding_window_overlay(7),
    )
    expected = base(ids, attention_mask=band).logits
    assert (expected - base(ids).logits).abs().max() > 1e-3
    close(model(ids).logits, expected, 1e-5)


@every_case
@torch.no_grad()
def test_cached_and_padded(folder_of, case):
    """One token at a time and in pieces = the text at once; a padded row = the row alone; softmax mode = the base."""
    model = load(folder_of(case, window=8, mix=0.5))
    ids = tokens(45)
    expected = model(ids).logits
    past = DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=past).logits for part in ids.split([20, 13, *[1] * 12], dim=1)]
    close(torch.cat(pieces, dim=1), expected)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(54) >= 9).long()[None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = torch.cat([padded, tokens(54)])
    both = {"attention_mask": torch.cat([mask, torch.ones_like(mask)])}
    both["position_ids"] = torch.cat([positions, torch.arange(54)[None]])
    close(model(batch, **both).logits[:1, 9:], expected)
    model.set_attention_mode("softmax")
    assert torch.equal(model(ids).logits, load_base(folder_of(case))(ids).logits)


@every_case
def test_files(folder_of, case, tmp_path):
    """Tensors as the registry says; the same names when saved again; tied embeddings tied; saved as read."""
    base, folder = folder_of(case), folder_of(case, window=8, mix=0.5)
    checkpoint = read_checkpoint(base)
    expected = checkpoint.family.expected_tensors(checkpoint.config, checkpoint.geometry)
    held = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    assert expected.items() <= held.items()
    assert all(NOT_LOADED in name for name in held.keys() - expected.keys())
    model = load(folder)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings == ("lm_head.weight" not in held)
    model.save_pretrained(tmp_path / "again")
    from safetensors import safe_open

    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == held  # noqa: SIM118
    ids = tokens(12)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("linearize_local", [False, True])
@every_case
@torch.no_grad()
def test_sizes(folder_of, case, linearize_local, monkeypatch):
    """The dry run's parameters, state and KV cache are the built model's."""
    base = folder_of(case)
    monkeypatch.chdir(base.parent)
    settings = {"window": 30, "sinks": 2, "normalizer": "running"}
    report, plan = convert(str(base), "x", settings=settings, linearize_local=linearize_local, dry_run=True)
    original = load_base(base)
    assert report["parameters"] == original.num_parameters() + sum(
        tensor.numel for name, tensor in plan.checkpoint.tensors.items() if name.endswith((".beta", ".eps"))
    )
    model = load(folder_of(case, linearize_local=linearize_local, **settings))
    (row,) = plan.memory(contexts=(50,))
    for subject, expected in ((model, row["state_bytes"]), (original, row["kv_cache_bytes"])):
        cache = subject(tokens(50), use_cache=True).past_key_values
        assert sum(held_bytes(layer) for layer in cache.layers) == expected


# Fused projections, partial and interleaved rotary, norms behind it, none in some layers; sink logits, a soft cap,
# queries that grow with their position; local layers; as many key/value heads as query heads.
DIFFERENT = (
    *("phi3", "phi", "glm", "hunyuan_v1_dense", "cohere2", "gpt_oss", "gemma2", "ministral3-long", "olmo2", "stablelm"),
)


@pytest.mark.parametrize("method", ["lolcats", "supra"])
@pytest.mark.parametrize("case", DIFFERENT)
@torch.no_grad()
def test_published_methods(folder_of, case, method):
    """LoLCATs and SUPRA in families that differ: the whole text is the text in pieces, and the plan knows the bytes."""
    settings = {"lolcats": {**LOLCATS, "window": 8}, "supra": SUPRA}[method]
    model, ids = load(folder_of(case, linearize_local=True, **settings)), tokens(50)
    whole = model(ids, use_cache=True)
    assert whole.logits.isfinite().all()
    cache, pieces = DynamicCache(config=model.config), []
    for part in ids.split([20, 1, 1, 9, 1, 18], dim=1):
        pieces.append(model(part, past_key_values=cache, use_cache=True).logits)
    close(torch.cat(pieces, dim=1), whole.logits)
    _, plan = convert(str(folder_of(case)), "x", settings=settings, linearize_local=True, dry_run=True)
    (row,) = plan.memory(contexts=(50,))
    assert sum(held_bytes(layer) for layer in cache.layers) == row["state_bytes"]


def held_bytes(layer) -> int:
    if hasattr(layer, "states"):
        return sum(tensor.nbytes for tensor in layer.tensors().values())
    return layer.keys.nbytes + layer.values.nbytes


@every_case
def test_lora(folder_of, case):
    """PEFT finds the family's projections in every layer, they change the output, and without them it is as before."""
    from peft import LoraConfig, get_peft_model

    model = load(folder_of(case, window=8, mix=0.5))
    family, ids = FAMILIES[CASES[case][0]], tokens(20)
    with torch.no_grad():
        before = model(ids).logits
    peft = get_peft_model(model, LoraConfig(target_modules=list(family.lora_targets), r=2, init_lora_weights=False))
    names = [name for name, module in peft.named_modules() if hasattr(module, "lora_A") and "self_attn" in name]
    assert len(names) == 4 * len(family.lora_targets)
    assert all("self_attn" in name for name, p in peft.named_parameters() if p.requires_grad)
    peft(ids).logits.sum().backward()
    assert all(p.grad is not None for p in peft.parameters() if p.requires_grad)
    with torch.no_grad():
        assert not torch.equal(peft(ids).logits, before)
        with peft.disable_adapter():
            assert torch.equal(peft(ids).logits, before)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if "mixture of experts" in FAMILIES[name].note])
@torch.no_grad()
def test_router_outputs(folder_of, model_type):
    """The routers' logits and the balancing loss come out as they do from the base, padding included."""
    base, model = load_base(folder_of(model_type)), load(folder_of(model_type, mix=0.0, window=64))
    if "router_logits" not in base.model._can_record_outputs:
        pytest.skip("this transformers does not record this family's router logits (GraniteMoE in 5.17)")
    ids = tokens(24, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    arguments = {"attention_mask": mask, "labels": ids, "output_router_logits": True}
    expected, actual = base(ids, **arguments), model(ids, **arguments)
    assert len(actual.router_logits) == 4
    assert all(map(torch.equal, actual.router_logits, expected.router_logits))
    assert actual.aux_loss == expected.aux_loss > 0
    assert actual.loss == expected.loss


@every_case
@torch.no_grad()
def test_hidden_states(folder_of, case):
    """output_hidden_states gives every layer's, as the base does."""
    base, model = load_base(folder_of(case)), load(folder_of(case, mix=0.0, window=64))
    expected, actual = (subject(tokens(20), output_hidden_states=True).hidden_states for subject in (base, model))
    assert len(actual) == len(expected) == 5
    assert all(map(torch.equal, actual, expected))


def test_load_without_liger(folder_of, tmp_path):
    """Every family's folder loads, generates and runs where liger, fla, triton and flash-attn are not installed."""
    folders = {name: str(folder_of(name, window=8, mix=0.5)) for name in FAMILIES}
    script = BLOCKER + (
        "import json, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "for name, folder in json.loads(sys.argv[1]).items():\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    ids = torch.arange(5, 25)[None]\n"
        "    out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)\n"
        "    assert out.shape[1] == 23 and 'liger_cli' not in sys.modules\n"
        "    torch.save(model(ids).logits.detach(), f'{name}.pt')\n"
        "    print(type(model).__name__)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-I", "-c", script, json.dumps(folders)]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [f"Liger{family.prefix}ForCausalLM" for family in FAMILIES.values()]
    for name, folder in folders.items():
        with torch.no_grad():
            close(torch.load(tmp_path / f"{name}.pt"), load_model(folder)(torch.arange(5, 25)[None]).logits, 1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults(model_type):
    """Fields that config.json leaves out: the registry assumes what the config class does."""
    family = FAMILIES[model_type]
    kind = type(AutoConfig.for_model(model_type))
    assert kind.__name__ == family.config_class
    for name, value in family.defaults.items():
        assert getattr(kind, name, None) == value or (name, value) == ("sliding_window_pattern", 4)
    assert kind.tie_word_embeddings == family.defaults.get("tie_word_embeddings", False)
    assert family.note
    sizes = {key: value for key, value in TINY.items() if key not in ("num_key_value_heads", "head_dim")}
    sizes |= {"hidden_size": 2048, "num_attention_heads": 32}
    config = kind(**sizes)
    assumed = Geometry.of(family.with_defaults(sizes))
    assert assumed.num_key_value_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    assert assumed.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_local_layers(model_type):
    """Which layers are local, from a config.json with and without `layer_types`: as the config class finds them."""
    family, kind = FAMILIES[model_type], type(AutoConfig.for_model(model_type))
    sizes = {"num_hidden_layers": 8, **({"num_key_value_heads": 32} if model_type == "qwen2" else {})}
    for extra in (
        {},
        {"sliding_window": 24},
        {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 3},
    ):
        given = {**sizes, **{name: value for name, value in extra.items() if hasattr(kind, name)}}
        config = kind(**given)
        layer_types = getattr(config, "layer_types", None)
        if layer_types is not None:
            expected = [kind != "full_attention" for kind in layer_types]
        else:
            expected = [bool(getattr(config, "sliding_window", None))] * 8
        assert family.local_layers(given) == expected
        assert family.local_layers(config.to_dict()) == expected


def tiny_folder(folder, model_type, **overrides):
    """A tiny random model of any type that transformers has."""
    known = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in {**TINY, **SMALL_EXPERTS}.items() if hasattr(known, key)}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **ids, **overrides)).save_pretrained(
        folder
    )
    return folder


def refused(folder, sentence, **options):
    """convert refuses with exit code 3 and writes nothing."""
    with pytest.raises(ModelError, match=sentence) as error:
        convert(str(folder), str(folder.parent / "refused"), **options)
    assert error.value.exit_code == 3
    assert not (folder.parent / "refused").exists()


def test_unlisted(tmp_path):
    """An unlisted type is refused; --experimental converts what passes the gate, and it loads."""
    base = tiny_folder(tmp_path / "base", "helium")
    refused(base, "'helium' is not supported; .*--experimental")
    report, _ = convert(str(base), str(tmp_path / "out"), experimental=True, settings={"mix": 0.0, "window": 64})
    assert "identity check passed (largest difference 0;" in report["notes"][-1]
    ids = tokens(40)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load_base(base)(ids).logits)
    convert_module.refresh(str(tmp_path / "out"))


def test_experimental_writes_nothing_where_the_gate_fails(tmp_path):
    """Differential attention has Llama's tensor names and is another function; GPT-NeoX has other names."""
    refused(tiny_folder(tmp_path / "diff", "diffllama"), "identity check failed: logits differ by", experimental=True)
    refused(tiny_folder(tmp_path / "neox", "gpt_neox"), "tensors begin with 'gpt_neox.'", experimental=True)
    config = json.loads((tmp_path / "diff" / "config.json").read_text())
    (tmp_path / "diff" / "config.json").write_text(json.dumps({**config, "model_type": "made_up"}))
    refused(tmp_path / "diff", "transformers has no causal language model of type 'made_up'", experimental=True)


def test_wrappers_are_refused(folder_of, tmp_path):
    inner = json.loads((folder_of("gemma3_text") / "config.json").read_text())
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    for experimental in (False, True):
        refused(tmp_path / "vlm", "extract its language model .*text_config.*'gemma3_text'", experimental=experimental)
    (tmp_path / "vlm" / "config.json").write_text(json.dumps({**inner, "use_bidirectional_attention": True}))
    refused(tmp_path / "vlm", "both sides")


RELEASED = {
    "liger_gla": ("llama", "LigerGLAForCausalLM", "gla"),
    "liger_gsa": ("llama", "LigerGSAForCausalLM", "gsa"),
    "liger_hgrn2": ("llama", "LigerHGRN2ForCausalLM", "hgrn2"),
    "liger_mistral_gla": ("mistral", "LigerMistralGLAForCausalLM", "gla"),
    "liger_qwen2_gla": ("qwen2", "LigerQwen2GLAForCausalLM", "gla"),
    "liger_qwen3_gla": ("qwen3", "LigerQwen3GLAForCausalLM", "gla"),
    "liger_qwen3_moe_gla": ("qwen3_moe", "LigerQwen3MoeGLAForCausalLM", "gla"),
}


@pytest.mark.parametrize("model_type", RELEASED)
def test_folders_of_the_paper_code(folder_of, liger, tmp_path, model_type):
    """Its README's recipe: the base's weights, `model_type` and `architectures` edited, the LoRA adapter apart."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base_type, architecture, gate = RELEASED[model_type]
    theirs, ours, plain = tmp_path / "theirs", tmp_path / "ours", tmp_path / "plain"
    shutil.copytree(folder_of(base_type), theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(
        json.dumps({**config, "model_type": model_type, "architectures": [architecture], "pool_size": 128})
    )
    adapted = get_peft_model(
        load_base(folder_of(base_type)),
        LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    done = liger("convert", theirs, ours, "--window", 16, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    layers = {tuple(one[name] for name in ("gate", "mix", "normalizer", "window", "slots")) for one in report["layers"]}
    assert layers == {(gate, 0.5, "none", 16, 128)}
    assert "paper's own code" in (notes := " ".join(report["notes"])) and ("128 slots" in notes) == (gate == "gsa")
    convert(str(folder_of(base_type)), str(plain), settings={"gate": gate, "mix": 0.5, "window": 16})
    ids = tokens(30)
    with torch.no_grad():
        model, same = load(ours), load(plain)
        assert torch.equal(model(ids).logits, same(ids).logits)
        before = model(ids).logits
        adapter = PeftModel.from_pretrained(model, tmp_path / "adapter")
        assert not torch.equal(adapter(ids).logits, before)
        model.set_attention_mode("softmax")
        assert torch.equal(adapter(ids).logits, adapted.eval()(ids).logits)
    for wrong in ({"mix": 0.3}, {"normalizer": "running"}, {"gate": "mamba2"}, *[{"slots": 32}] * (gate == "gsa")):
        with pytest.raises(UsageError, match="paper's own code"):
            convert(str(theirs), str(tmp_path / "x"), settings=wrong)


def test_families_command(capsys):
    family_table.run(as_json=True)
    rows = json.loads(capsys.readouterr().out)["families"]
    assert [row["model_type"] for row in rows] == list(FAMILIES)
    assert all(row["special"] for row in rows)
    family_table.run()
    printed = capsys.readouterr().out
    assert all(name in printed for name in FAMILIES)


def test_command_line(liger, tmp_path):
    """As a user meets it: exit 3 and one sentence for an unlisted type, 0 and the figures with --experimental."""
    base = tiny_folder(tmp_path / "base", "helium")
    done = liger("convert", base, "out")
    assert done.returncode == 3
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert not (tmp_path / "cwd" / "out").exists()
    done = liger("convert", base, "out", "--experimental", "--json")
    assert done.returncode == 0, done.stderr
    assert any("identity check passed" in note for note in json.loads(done.stdout)["notes"])
    assert (tmp_path / "cwd" / "out" / "liger.json").exists()
    assert "gemma3_text" in liger("families").stdout


def shape(hidden, inner, layers, heads, kv_heads, vocab, **more) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip((*names, "vocab_size"), (hidden, inner, layers, heads, kv_heads, vocab), strict=True)) | more


# As on the hub, with what those config files leave out; the number of parameters each model is published with.
PUBLISHED = {
    "llama": (shape(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True), 1_235_814_400),
    "mixtral": (shape(4096, 14336, 32, 32, 8, 32000, num_local_experts=8), 46_702_792_704),
    "qwen2_moe": (shape(2048, 5632, 24, 16, 16, 151936), 14_315_784_192),
    "qwen3_moe": (shape(2048, 6144, 48, 32, 4, 151936, head_dim=128), 30_532_122_624),
    "olmoe": (shape(2048, 1024, 16, 16, 16, 50304), 6_919_161_856),
    "gpt_oss": (shape(2880, 2880, 24, 64, 8, 201088, num_local_experts=32), 20_914_757_184),
    "gemma2": (shape(2304, 9216, 26, 8, 4, 256000), 2_614_341_888),
    "gemma3_text": (shape(1152, 6912, 26, 4, 1, 262144, sliding_window=512), 999_885_952),
    "phi": (shape(2560, 10240, 32, 32, None, 51200), 2_779_683_840),
    "phi3": (shape(3072, 8192, 32, 24, 8, 200064, tie_word_embeddings=True), 3_836_021_760),
    "olmo": (shape(2048, 8192, 16, 16, 16, 50304, tie_word_embeddings=True), 1_176_764_416),
    "smollm3": (shape(2048, 11008, 36, 16, 4, 128256), 3_075_098_624),
    "cohere": (shape(8192, 22528, 40, 64, 64, 256000), 34_980_831_232),
    "starcoder2": (shape(3072, 12288, 30, 24, 2, 49152), 3_030_371_328),
    "stablelm": (shape(2048, 5632, 24, 32, 32, 100352, use_qkv_bias=True), 1_644_515_328),
    "glm4": (shape(4096, 13696, 40, 32, 2, 151552), 9_400_279_040),
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_sizes(model_type):
    """From a config.json as it is on the hub: the number of parameters that the model is known to have."""
    (config, parameters), family = PUBLISHED[model_type], FAMILIES[model_type]
    tensors = family.expected_tensors(config, Geometry.of(family.with_defaults(config)))
    assert sum(math.prod(shape) for shape in tensors.values()) == parameters
