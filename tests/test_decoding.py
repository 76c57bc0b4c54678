"""One decoding step: how many operations a layer takes, and that it is one graph, whatever the position."""

import copy
import itertools

import pytest
import torch
from test_model import close, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import model_classes
from liger_cli.templates import liger_rows
from liger_cli.templates.liger_config import LayerSpec, liger_block
from liger_cli.templates.liger_export import cache_tensors
from liger_cli.templates.liger_gates import GATES

SIZES = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
SIZES |= {"vocab_size": 128, "max_position_embeddings": 512}


def made(family="llama", layers=2, softmax=(), heads=None, **spec):
    """A random model of so many equal layers, but for softmax ones, or its base where nothing is said of them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | (heads or {}), num_hidden_layers=layers)
    if not spec:
        return AutoModelForCausalLM.from_config(config).eval()
    config_class, model_class = model_classes(FAMILIES[family])
    values = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    specs = [LayerSpec(kind="softmax") if layer in softmax else LayerSpec(**spec) for layer in range(layers)]
    model = model_class(config_class(**values, liger=liger_block(specs))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("keep_score", "rest_mass", "window_factor", "_scale")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "as_strided",
        "alias",
        "detach",
        "expand",
        "select",
        "slice",
    ),
    *("squeeze", "unsqueeze", "t", "transpose", "permute", "split", "split_with_sizes", "unbind", "unfold", "diagonal"),
}


class Operations(TorchDispatchMode):
    """The operations that do more than look at a tensor in another way, by name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operations(model) -> list[str]:
    """Of the last step of `generate`."""
    forward, counts = model.forward, []

    def counted(*args, **kwargs):
        with Operations() as done:
            result = forward(*args, **kwargs)
        counts.append(done.found)
        return result

    model.forward = counted
    ids = tokens(60)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return counts[-1]


def by_layer(family: str, **spec) -> int:
    """Operations of one layer: those that a third one adds to two."""
    few, more = (len(operations(made(family, layers, **spec))) for layers in (2, 3))
    return more - few


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_operations_of_a_step(family):
    """Beside the base's own in the same layer. Heads that keep different numbers of tokens cost next to nothing."""
    base = by_layer(family)
    assert by_layer(family, gate="gla") <= 1.1 * base
    assert by_layer(family, gate="gla", sinks=4) == by_layer(family, gate="gla")
    kept = {"kept": 8, "sinks": 4}
    assert by_layer(family, **kept, branch_scales=True, normalizer="running") <= 1.65 * base
    exact = by_layer(family, **kept, mix=0.0)
    assert exact <= base + 5
    assert by_layer(family, **kept, rest=True, gate="none") <= exact + 15
    assert by_layer(family, **kept, rest=[True, True, False], gate="none") <= exact + 15
    kept = {"kept": [8, 4, 16], "sinks": 4}
    exact = by_layer(family, **kept, mix=0.0)
    assert exact <= base + 6
    assert by_layer(family, **kept, rest=True, gate="none") <= exact + 15
    assert by_layer(family, **kept, rest=[True, False, True], gate="none") <= exact + 15
    kept, heads = {"kept": [8, 4, 16, 3, 5, 5], "sinks": 4}, {"num_attention_heads": 12, "num_key_value_heads": 6}
    uneven = by_layer(family, **kept, heads=heads, rest=[True, True, False, True, False, True], gate="none")
    assert uneven <= by_layer(family, **kept, heads=heads, mix=0.0) + 21


def test_a_text_twice_as_long_takes_one_merge_of_kept_tokens_more():
    """With gradients, and on a GPU: there is no loop over blocks."""
    found = []
    for length in (256, 512, 1024, 2048):  # the first makes what is made once
        with Operations() as done:
            made(layers=1, kept=4, mix=0.0)(tokens(length), use_cache=False)
        found.append(len(done.found))
    assert found[2] - found[1] == found[3] - found[2] <= 12


STEPS = {gate: {"gate": gate, "window": 16, "slots": 8} for gate in GATES}
STEPS |= {
    "sinks": {"window": 16, "sinks": 4},
    "kept": {"window": 16, "kept": 8, "sinks": 2, "mix": 0.0},
    "kept by head": {"window": 16, "kept": [8, 4, 2], "normalizer": "running", "branch_scales": True},
    "rest": {"window": 16, "kept": 8, "sinks": 2, "rest": True, "gate": "none"},
    "rest by head": {"window": 16, "kept": [8, 0, 3], "sinks": 2, "rest": [True, True, False], "gate": "mamba2"},
    "rest by query head": {"window": 16, "rest": [False, True, False], "gate": "retnet"},
    "joint": {"window": 16, "kept": 4, "normalizer": "joint"},
    "lolcats": {"window": 16, "gate": "none", "feature_map": "hedgehog", "normalizer": "joint-max", "positions": "rope",
                "delayed": True, "sinks": 2},
    "recurrence alone": {"mix": 1.0},
    "softmax heads": {"window": 16, "kept": 8, "sinks": 2, "softmax_kv_heads": [1], "rest": [True, False, True],
                      "gate": "none"},
    "softmax layer": {"window": 16, "softmax": [1]},
}  # fmt: skip


def read(model, ids, mask):
    """A cache of a left-padded text, static where softmax attention is in it, and the positions of its last tokens."""
    specs = [each.self_attn.liger_spec for each in model.model.layers]
    softmax = any(spec.kind == "softmax" or spec.softmax_kv_heads for spec in specs)
    cache = StaticCache(model.config, max_cache_len=40) if softmax else DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache, positions[:, -1:]


@pytest.mark.parametrize("name", STEPS)
def test_nothing_waits(name, monkeypatch):
    """On a device that has no numbers, so that reading one, or a size that depends on one, is an error: a forward pass
    of training and its backward pass, a text into a cache, text behind it, and a step; and what padding looks like is
    asked once a call."""
    model = made(**STEPS[name]).to("meta").train()
    ids = torch.zeros(2, 150, dtype=torch.long, device="meta")
    model(ids, use_cache=False).logits.sum().backward()
    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids, ids[:, :70], ids[:, :1], ids[:, :1]):
            model(part, past_key_values=cache, use_cache=True)
    if "softmax" in STEPS[name]:
        return  # transformers' own mask asks once more
    asked = []
    monkeypatch.setattr(liger_rows, "_answers", lambda told: asked.append(told) or dict.fromkeys(told, False))
    model.train()(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    assert len(asked) == 1


FAST = ("gla", "kept by head", "rest by head", "lolcats", "softmax heads")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, id=name, marks=() if name in FAST else pytest.mark.slow) for name, each in STEPS.items()],
)
@torch.no_grad()
def test_a_step_is_one_graph(settings):
    """Traced once, without a break, for every position from before the window has filled, behind left padding; and
    nothing that it writes to has moved or changed its shape."""
    model, ids, mask = made(**settings), tokens(12, 2), torch.ones(2, 12, dtype=torch.long)
    mask[1, :7] = 0
    cache, last = read(model, ids, mask)
    other = copy.deepcopy(cache)
    shapes = [{name: x.shape for name, x in cache_tensors(layer).items()} for layer in cache.layers]
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(16):
            last, new = last + 1, tokens(1, 2, seed=int(last[0]))
            given = {"input_ids": new, "position_ids": last, "use_cache": True}
            close(step(past_key_values=cache, **given).logits, model(past_key_values=other, **given).logits)
    assert shapes == [{name: x.shape for name, x in cache_tensors(layer).items()} for layer in cache.layers]
    assert cache.get_seq_length() == 28 and cache.is_compileable


@pytest.mark.parametrize("settings", [STEPS[name] for name in ("gla", "softmax heads", "softmax layer")])
@torch.no_grad()
def test_an_exported_step(settings):
    """The very operations of the model's, on buffers of its own, in every later step."""
    model, ids, mask = made(**settings), tokens(12, 2), torch.ones(2, 12, dtype=torch.long)
    mask[1, :7] = 0
    cache, last = read(model, ids, mask)
    other = copy.deepcopy(cache)
    step = torch.export.export(model.decoding_step(cache), (tokens(1, 2), last + 1)).module()
    for _ in range(20):
        last, new = last + 1, tokens(1, 2, seed=int(last[0]))
        close(step(new, last), model(new, position_ids=last, past_key_values=other, use_cache=True).logits)


@torch.no_grad()
def test_no_export_of_a_cache_that_grows():
    model = made(window=16, softmax_kv_heads=[1])
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="constant shape"):
        model.decoding_step(cache)
    model(tokens(12), past_key_values=cache)
    with pytest.raises(ValueError, match="constant shape"):
        model.decoding_step(cache)


@pytest.mark.slow
@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
@torch.no_grad()
def test_generation_by_a_compiled_step(settings):
    """`generate` with a static cache compiles the step, as it does on a GPU, and gives the same tokens."""
    model, ids, mask = made(**settings), tokens(20, 2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    given = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **given)
    torch._dynamo.reset()
    compiled = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="aot_eager")
    compiled._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = model.generate(ids, cache_implementation="static", compile_config=compiled, **given)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("modes", list(itertools.pairwise(("liger", "window", "exact", "softmax", "liger"))))
@torch.no_grad()
def test_a_cache_belongs_to_its_attention_mode(modes):
    model = made(window=16, kept=4)
    model.set_attention_mode(modes[0])
    cache = model(tokens(5), use_cache=True).past_key_values
    model.set_attention_mode(modes[1])
    with pytest.raises(ValueError, match="another attention mode"):
        model(tokens(1), past_key_values=cache)
