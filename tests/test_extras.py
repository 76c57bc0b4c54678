"""Extra tensors: learned gates, learned feature maps and branch coefficients, from the command line to generation.

Tolerances as in test_model: logits of size about 1 in float32, the same sums in another order.
"""

import json
import math

import pytest
import torch
from test_model import close, in_pieces, tokens
from transformers import AutoModelForCausalLM

from liger_cli.checkpoint.extras import extra_shapes
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import EXTRAS, Geometry, read_weights
from liger_cli.commands.convert import convert
from liger_cli.conversion.plan import layer_settings
from liger_cli.main import app
from liger_cli.system.errors import UsageError
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError
from liger_cli.templates.liger_gates import GATES

LOLCATS = {
    "gate": "none",
    "feature_map": "hedgehog",
    "feature_params": "learned",
    "positions": "rope",
    "normalizer": "joint-max",
    "delayed": True,
    "mix": 0.9,
}
SUPRA = {
    "gate": "lightning",
    "feature_map": "relu",
    "feature_params": "dense",
    "positions": "after",
    "normalizer": "group",
    "window": 0,
}
LOGITS = [name for name, gate in GATES.items() if not gate.fixed]
LEARNED = {
    "scales": {"branch_scales": True},
    "running scales": {"branch_scales": True, "normalizer": "running"},
    "joint scales": {"branch_scales": True, "normalizer": "joint"},
    "kept": {"kept": 8},
    "kept, window alone": {"kept": 8, "mix": 0.0},
    "kept, joint": {"kept": 5, "normalizer": "joint", "branch_scales": True},
    "kept, sinks": {"kept": 6, "sinks": 3},
    "kept by head": {"kept": [8, 0]},
    "delayed, kept": {
        **{"kept": [6, 0], "sinks": 2, "gate": "retnet", "delayed": True},
        **{"normalizer": "joint", "positions": "rope"},
    },
    "rest": {"kept": [6, 0], "sinks": 2, "rest": True, "gate": "none"},
    "rest in one head": {"kept": 5, "rest": [False, True], "gate": "retention"},
    "rest, no kept, softmax head": {"rest": True, "gate": "retnet", "softmax_kv_heads": [1]},
    "rest, learned gate": {"kept": 4, "rest": True, "gate": "mamba2", "gate_params": "learned", "gate_rank": 4},
    "kept by head, sinks, joint": {"kept": [3, 11], "sinks": 2, "normalizer": "joint"},
    "kept, sinks, joint, softmax head": {
        **{"kept": 5, "sinks": 2, "normalizer": "joint", "branch_scales": True, "softmax_kv_heads": [0]},
    },
    "kept, softmax head": {"kept": 8, "softmax_kv_heads": [1]},
    "max pooling": {"gate": "gdn", "gate_pooling": "max"},
    "max pooling to slots": {"gate": "gsa", "gate_pooling": "max"},
    "mlstm as an average": {"gate": "mlstm", "normalizer": "running"},
    "scales, no window": {"branch_scales": True, "window": 0},
    "lolcats": LOLCATS,
    "lolcats, sinks": LOLCATS | {"sinks": 3},
    "lolcats, softmax head": LOLCATS | {"softmax_kv_heads": [1], "feature_dim": 8},
    "lolcats, no recurrence": LOLCATS | {"mix": 0.0},
    "delayed, joint": {"gate": "retnet", "normalizer": "joint", "positions": "rope", "delayed": True, "sinks": 2},
    "hedgehog": {"feature_map": "hedgehog", "feature_params": "learned", "normalizer": "joint", "positions": "rope"},
    "narrow features": {"feature_params": "learned", "feature_dim": 8},
    "wide features, gdn": {"gate": "gdn", "feature_params": "learned", "feature_dim": 24, "feature_map": "none"},
    "wide features, kda": {"gate": "kda", "feature_params": "learned", "feature_dim": 24},
    "supra": SUPRA,
    "supra, softmax head": SUPRA | {"gate": "lightning", "softmax_kv_heads": [0], "window": 16},
    "random gate": {"gate_params": "learned", "gate_init": "random"},
} | {f"learned {gate}": {"gate": gate, "gate_params": "learned", "gate_rank": 4, "slots": 8} for gate in LOGITS}


def converted(base, tmp_path, **settings):
    folder = tmp_path / "liger"
    convert(str(base), str(folder), settings={"window": 16, "slots": 8} | settings)
    return folder


def shaken(folder):
    """The folder's model with every extra parameter moved away from its initial value."""
    model = load_model(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("grm_scale", "swa_scale"):
            parameter.data.uniform_(0.2, 1.2)
        elif name.rpartition(".")[2].startswith(("gate_", "feature_", "keep_", "rest_", "window_")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("settings", LEARNED.values(), ids=LEARNED)
@torch.no_grad()
def test_every_way_of_feeding_a_text(tiny_base, tmp_path, settings):
    """Whole = in pieces = token by token; a padded batch = its rows; packed documents = each alone; saved = loaded."""
    model = shaken(converted(tiny_base(), tmp_path, **settings))
    ids = tokens(90, batch=2)
    whole = model(ids).logits
    close(in_pieces(model, ids, 1), whole)
    close(in_pieces(model, ids, 37), whole)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    close(padded[0], whole[0])
    close(padded[1, 31:], model(ids[1:, 31:]).logits[0])
    positions = torch.cat([torch.arange(40), torch.arange(50)])[None]
    packed = model(ids[:1], position_ids=positions, use_cache=False).logits
    close(packed[:, 40:], model(ids[:1, 40:]).logits)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(ids).logits, whole)


@pytest.mark.parametrize("gate", LOGITS)
@torch.no_grad()
def test_a_learned_gate_starts_as_the_pooled_one(tiny_base, tmp_path, gate):
    plain = load_model(converted(tiny_base(), tmp_path / "plain", gate=gate), dtype=torch.float32)
    learned = load_model(
        converted(tiny_base(), tmp_path / "learned", gate=gate, gate_params="learned"), dtype=torch.float32
    )
    close(learned(tokens(60)).logits, plain(tokens(60)).logits)


@torch.no_grad()
def test_scales_start_as_the_mix(tiny_base, tmp_path):
    plain = load_model(converted(tiny_base(), tmp_path / "plain", mix=0.3), dtype=torch.float32)
    settings = {"branch_scales": True, "mix": 0.3}
    learned = load_model(converted(tiny_base(), tmp_path / "learned", **settings), dtype=torch.float32)
    close(learned(tokens(60)).logits, plain(tokens(60)).logits)


@torch.no_grad()
def test_modes(tiny_base, tmp_path):
    """With extra tensors, too, softmax mode is the base and window mode the window with coefficient 1."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)
    model = shaken(converted(tiny_base(), tmp_path, branch_scales=True, gate_params="learned"))
    window = load_model(converted(tiny_base(), tmp_path / "window", mix=0.0), dtype=torch.float32)
    model.set_attention_mode("softmax")
    assert torch.equal(model(tokens(60)).logits, base(tokens(60)).logits)
    model.set_attention_mode("window")
    assert torch.equal(model(tokens(60)).logits, window(tokens(60)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extra_tensors_stay_float32(tiny_base, tmp_path, dtype):
    model = load_model(converted(tiny_base(), tmp_path, branch_scales=True, gate_params="learned"), dtype=dtype)
    kinds = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["grm_scale"] == kinds["gate_up"] == torch.float32 and kinds["weight"] == dtype


def test_own_shard(tiny_base, tmp_path):
    """The base's shard is linked under another name, the index names both, and the folder loads without liger."""
    base = tiny_base()
    folder = converted(base, tmp_path, gate_params="learned", gate_rank=4, branch_scales=True)
    assert (folder / "model-base.safetensors").samefile(base / "model.safetensors") or (
        (folder / "model-base.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    )
    sizes = Geometry.of(json.loads((base / "config.json").read_text()))
    shapes = extra_shapes((LayerSpec(gate_params="learned", gate_rank=4, branch_scales=True),) * 4, sizes)
    written = {shard.name: shard for shard in read_weights(folder)}
    assert {name: tensor.shape for name, tensor in written[EXTRAS].tensors.items()} == {
        name: extra.shape for name, extra in shapes.items()
    }
    assert {tensor.dtype for tensor in written[EXTRAS].tensors.values()} == {"F32"}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert model.model.layers[2].self_attn.grm_scale.tolist() == [0.5] * 4


def test_added_parameters_are_counted(tiny_base, tmp_path):
    settings = {"gate_params": "learned", "gate_rank": 4, "branch_scales": True}
    report, plan = convert(str(tiny_base()), str(tmp_path / "out"), settings=settings, dry_run=True)
    layer = 4 * 64 + 2 * 16 * 4 + 2 * 16 + 2 * 4  # gate_down, gate_up, gate_bias, two scales
    assert report["added_parameters"] == 4 * layer
    assert not (tmp_path / "out").exists()


def test_random_gates_depend_on_nothing_but_the_seed(tiny_base, tmp_path):
    settings = {"gate_params": "learned", "gate_init": "random"}
    one = (converted(tiny_base(), tmp_path / "a", **settings) / EXTRAS).read_bytes()
    assert one == (converted(tiny_base(), tmp_path / "b", **settings) / EXTRAS).read_bytes()
    weights = load_model(tmp_path / "a" / "liger").model.layers[0].self_attn
    assert math.isclose(weights.gate_up.std().item(), 16**-0.5, rel_tol=0.2)


def test_layers_may_differ(tiny_base, tmp_path):
    """--layer on the command line; the whole table of settings by flags alone."""
    from typer.testing import CliRunner

    arguments = ["convert", str(tiny_base()), str(tmp_path / "out"), "--window", "16", "--gate-init", "random"]
    arguments += ["--layer", "0,2-3:gate=gdn,window=8,normalizer=none", "--layer", "2:mix=window-only"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["liger"]["layers"]
    assert [layer["gate"] for layer in layers] == ["gdn", "gla", "gdn", "gdn"]
    assert [layer["window"] for layer in layers] == [8, 16, 8, 8]
    assert [layer["mix"] for layer in layers] == [0.5, 0.5, 0.0, 0.5]
    assert {layer["gate_params"] for layer in layers} == {"learned"}
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    ["gate=gdn", "9:gate=gdn", "2-1:gate=gdn", "0:gates=gdn", "0:window=-1", "x:window=1", "0:mix=much", "0:gate"],
)
def test_bad_layer_settings(tiny_base, tmp_path, text):
    with pytest.raises(UsageError):
        convert(str(tiny_base()), str(tmp_path / "out"), settings={"layers": [text]})
    assert not (tmp_path / "out").exists()


def test_layer_settings_add_up():
    assert layer_settings(["0-1:window=8", "1:sinks=4,branch-scales=true"], 4) == {
        0: {"window": 8},
        1: {"window": 8, "sinks": 4, "branch_scales": True},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate_init": "random"},
        {"feature_dim": 8},
        {"normalizer": "joint", "window": 0},
        {"normalizer": "running", "feature_map": "none"},
        {"normalizer": "running", "gate": "gdn"},
        {"branch_scales": 1},
        {"gate_rank": 0},
        {"positions": "alibi"},
        {"gate": "retnet", "gate_params": "learned"},
        {"feature_params": "dense", "feature_dim": 8},
        {"positions": "after", "feature_map": "hedgehog"},
        {"positions": "after", "gate": "gsa"},
        {"positions": "after", "normalizer": "running"},
        LOLCATS | {"branch_scales": True},
        LOLCATS | {"kept": 4},
        LOLCATS | {"window": 0},
        LOLCATS | {"positions": "none"},
        LOLCATS | {"feature_params": "dense"},
        LOLCATS | {"normalizer": "running"},
        LOLCATS | {"gate": "gla"},
        LOLCATS | {"delayed": 1},
    ],
)
def test_settings_that_contradict_one_another(wrong):
    with pytest.raises(LigerConfigError):
        LayerSpec(**wrong)


def test_merge_keeps_extra_tensors(tiny_base, tmp_path):
    """A merged folder has the same extra tensors, float32 in a folder of bfloat16, too."""
    from peft import LoraConfig, get_peft_model

    from liger_cli.commands import merge

    folder = converted(tiny_base(), tmp_path, branch_scales=True, gate_params="learned")
    model = get_peft_model(shaken(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge.run(str(tmp_path / "adapter"), base=str(folder), output=str(tmp_path / "merged"), dtype="bfloat16")
    merged = {shard.name: shard for shard in read_weights(tmp_path / "merged")}
    assert {tensor.dtype for tensor in merged[EXTRAS].tensors.values()} == {"F32"}
    found = load_model(tmp_path / "merged").model.layers[1].self_attn
    assert torch.equal(found.swa_scale, torch.full((4,), 0.5))
