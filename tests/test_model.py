"""The model as a whole: identity with the base, and every way of feeding a text giving the same answer.

Tolerances are on logits of size about 1. float32: 2e-5, since the same sums are taken in another order (chunks against
steps, block-local against whole rows). The identity check is exact: the very same operations run.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import model_classes
from liger_cli.templates import liger_branches
from liger_cli.templates.liger_cache import LigerCacheLayer
from liger_cli.templates.liger_config import LayerSpec, liger_block
from liger_cli.templates.liger_gates import GATES

TOLERANCE = 2e-5
FOUR = ("llama", "mistral", "qwen2", "qwen3")


def linearized(folder, dtype=torch.float32, specs=None, attn_implementation="sdpa", **spec):
    """A tiny base as a Liger model, by the classes that `liger convert` writes."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation).eval()
    config_class, model_class = model_classes(FAMILIES[base.config.model_type])
    values = base.config.to_dict()
    values.pop("model_type")
    count = base.config.num_hidden_layers
    config = config_class(**values, liger=liger_block(specs or [LayerSpec(**spec)] * count))
    config._attn_implementation = attn_implementation
    model = model_class(config).to(dtype).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=True)
    assert not missing and not unexpected
    return base, model


def linearized_with_extras(folder, **spec):
    """The same, with what the settings add at random."""
    base, model = linearized(folder, window=16)
    config_class, model_class = type(model.config), type(model)
    values = {name: value for name, value in base.config.to_dict().items() if name != "model_type"}
    config = config_class(**values, liger=liger_block([LayerSpec(**spec)] * base.config.num_hidden_layers))
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    for name in missing:
        torch.nn.init.normal_(model.get_parameter(name))
    return base, model


def tokens(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def in_pieces(model, ids, piece: int, cache=None, attention_mask=None):
    """Logits of a text fed `piece` tokens at a time through a cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    for start in range(0, ids.shape[1], piece):
        stop = min(start + piece, ids.shape[1])
        extra = {}
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
            extra = {"attention_mask": attention_mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **extra).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", FOUR)
@torch.no_grad()
def test_identity(tiny_base, model_type, attn_implementation):
    """mix 0 and a window that covers the text: the base's logits, bit for bit, padded or not."""
    base, model = linearized(tiny_base(model_type), mix=0.0, window=200, attn_implementation=attn_implementation)
    ids = tokens(200, batch=2)
    assert torch.equal(model(ids).logits, base(ids).logits)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    assert torch.equal(model(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("window", [1, 5, 64, 100, 130])
@pytest.mark.parametrize("model_type", FOUR)
@torch.no_grad()
def test_band(tiny_base, model_type, window):
    """mix 0 and a window shorter than the text: the base under an explicit band mask, to 1e-5."""
    base, model = linearized(tiny_base(model_type), mix=0.0, window=window)
    ids = tokens(301)
    band = create_causal_mask(
        config=base.config,
        inputs_embeds=base.get_input_embeddings()(ids),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=sliding_window_overlay(window),
    )
    close(model(ids).logits, base(ids, attention_mask=band).logits, 1e-5)


@pytest.mark.parametrize("model_type", FOUR)
@torch.no_grad()
def test_switch(tiny_base, model_type):
    """Softmax mode is the base exactly, cached as well; window mode is mix 0; and back again nothing has changed."""
    base, model = linearized(tiny_base(model_type), window=16)
    _, window_only = linearized(tiny_base(model_type), window=16, mix=0.0)
    ids = tokens(90)
    liger = model(ids).logits
    model.set_attention_mode("softmax")
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(in_pieces(model, ids, 17), in_pieces(base, ids, 17))
    model.set_attention_mode("window")
    assert torch.equal(model(ids).logits, window_only(ids).logits)
    model.set_attention_mode("liger")
    assert torch.equal(model(ids).logits, liger)
    model.set_attention_mode("softmax", layers=[1])
    assert not torch.equal(model(ids).logits, liger)
    with pytest.raises(ValueError, match="no layer 9"):
        model.set_attention_mode("softmax", layers=[9])


@pytest.fixture(params=sorted(GATES))
def gate(request):
    return request.param


@pytest.mark.parametrize("piece", [1, 7, 64, 100])
def test_pieces(tiny_base, gate, piece):
    """The whole text at once = one token at a time = prefill in pieces."""
    _, model = linearized(tiny_base(), gate=gate, window=16, slots=8)
    ids = tokens(150, batch=2)
    with torch.no_grad():
        close(in_pieces(model, ids, piece), model(ids).logits)


@pytest.mark.parametrize("batch", [1, 3])
def test_left_padding(tiny_base, gate, batch):
    """Rows of several lengths, padded on the left, agree with each row alone; so does decoding them."""
    _, model = linearized(tiny_base(), gate=gate, window=16, slots=8)
    lengths = [37, 80, 5][:batch]
    width = max(lengths) + 11
    ids, mask = tokens(width, batch), torch.zeros(batch, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        pieces = in_pieces(model, ids, 9, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, width - length :]).logits[0]
            close(whole[row, width - length :], alone)
            close(pieces[row, width - length :], alone)


@pytest.mark.parametrize("normalizer", ["running", "joint"])
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_normalizer(tiny_base, normalizer, mix):
    """With a denominator, too: whole = pieces = tokens, left padding included."""
    _, model = linearized(tiny_base(), window=16, normalizer=normalizer, mix=mix)
    ids, mask = tokens(130, batch=2), torch.ones(2, 130, dtype=torch.long)
    mask[1, :33] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        for piece in (1, 7, 100):
            close(in_pieces(model, ids, piece, attention_mask=mask)[mask.bool()], whole[mask.bool()])
        close(model(ids[1:, 33:]).logits[0], whole[1, 33:])


@torch.no_grad()
def test_window_covers_pieces(tiny_base, monkeypatch):
    """Long texts are worked through in pieces; the logits are those of one piece, cached or not, padded or not."""
    _, model = linearized(tiny_base(), window=16, sinks=2)
    ids, mask = tokens(300, batch=2), torch.ones(2, 300, dtype=torch.long)
    mask[1, :77] = 0
    whole = model(ids, attention_mask=mask).logits[mask.bool()]
    monkeypatch.setattr(liger_branches, "PIECE_SIZE", 64)
    close(model(ids, attention_mask=mask).logits[mask.bool()], whole)
    close(in_pieces(model, ids, 130, attention_mask=mask)[0], whole[:300])


def test_right_padding(tiny_base, gate):
    _, model = linearized(tiny_base(), gate=gate, window=16, slots=8)
    ids, mask = tokens(90, 2), torch.ones(2, 90, dtype=torch.long)
    mask[0, 40:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        close(padded[0, :40], model(ids[:1, :40]).logits[0])
        close(padded[1], model(ids[1:]).logits[0])


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(tiny_base, gate, cache, length):
    """Greedy generation with a cache, of prompts shorter and longer than the window, equals the uncached one."""
    _, model = linearized(tiny_base(), gate=gate, window=16, slots=8)
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tokens(length, 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
        actual = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
    assert torch.equal(actual, expected)


def test_beam_search(tiny_base, gate):
    _, model = linearized(tiny_base(), gate=gate, window=16, slots=8)
    settings = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tokens(25, 2)
    with torch.no_grad():
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_hybrid_layers(tiny_base):
    """Softmax layers between Liger layers share one cache with them."""
    specs = [LayerSpec(window=16), LayerSpec(kind="softmax"), LayerSpec(window=8, gate="hgrn2"), LayerSpec(mix=1.0)]
    _, model = linearized(tiny_base(), specs=specs)
    ids, mask = tokens(70, 2), torch.ones(2, 70, dtype=torch.long)
    mask[1, :20] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        close(in_pieces(model, ids, 9, attention_mask=mask)[mask.bool()], whole[mask.bool()])
        settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        for cache in ("dynamic", "static"):
            actual = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
            assert torch.equal(actual, model.generate(ids, attention_mask=mask, use_cache=False, **settings))


@pytest.mark.parametrize("sinks", [1, 4])
def test_sinks(tiny_base, sinks):
    """Sink tokens: cached = uncached, padded = alone, and equal to the base under an explicit mask."""
    base, model = linearized(tiny_base(), window=16, sinks=sinks, mix=0.0)
    ids = tokens(120)
    with torch.no_grad():
        whole = model(ids).logits
        for piece in (1, 7, 50):
            close(in_pieces(model, ids, piece), whole)
        padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :9] = 0
        close(in_pieces(model, padded, 11, attention_mask=mask)[:, 9:], whole)
        row, column = torch.arange(120)[:, None], torch.arange(120)
        seen = (column <= row) & ((column > row - 16) | (column < sinks))
        close(whole, base(ids, attention_mask=seen[None, None]).logits, 1e-5)


def test_stateful(tiny_base):
    """A recurrent state cannot be rolled back: assisted generation refuses, and crop raises."""
    _, model = linearized(tiny_base())
    assert model._is_stateful
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(5), assistant_model=copy.deepcopy(model), max_new_tokens=4)
    cache = DynamicCache(config=model.config)
    in_pieces(model, tokens(5), 5, cache)
    with pytest.raises(RuntimeError, match="rolled back"):
        cache.crop(-1)


def cache_bytes(cache) -> int:
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors().values())


@pytest.mark.parametrize("how", ["prefill", "decode"])
def test_cache_memory_is_constant(tiny_base, how):
    """The storage behind the cache (not only its views) is as large after 32K tokens as after 1K."""
    _, model = linearized(tiny_base(num_hidden_layers=2), sinks=2)
    sizes = []
    with torch.no_grad():
        for length in (1024, 32768):
            cache = DynamicCache(config=model.config)
            hidden = model.get_decoder()(tokens(length), past_key_values=cache, use_cache=True)
            if how == "decode":
                hidden = model.get_decoder()(tokens(1), past_key_values=cache, use_cache=True)
            assert hidden.last_hidden_state.isfinite().all()
            assert all(isinstance(layer, LigerCacheLayer) for layer in cache.layers)
            sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1]


def test_cache_rows(tiny_base):
    """Repeating, choosing and reordering the rows of a cache moves the states along with the window."""
    _, model = linearized(tiny_base(), sinks=1, window=8)
    ids = tokens(30, 2)
    following = tokens(1, 4, seed=1)
    with torch.no_grad():
        expected = model(torch.cat([ids.repeat_interleave(2, 0), following], 1)).logits[:, -1]
        cache = DynamicCache(config=model.config)
        in_pieces(model, ids, 30, cache)
        cache.batch_repeat_interleave(2)
        selected = copy.deepcopy(cache)
        reordered = copy.deepcopy(cache)
        close(model(following, past_key_values=cache).logits[:, -1], expected)
        selected.batch_select_indices(torch.tensor([3, 1]))
        close(model(following[[3, 1]], past_key_values=selected).logits[:, -1], expected[[3, 1]])
        reordered.reorder_cache(torch.tensor([2, 3, 0, 1]))
        close(model(following[[2, 3, 0, 1]], past_key_values=reordered).logits[:, -1], expected[[2, 3, 0, 1]])


def test_cache_of_the_other_mode_is_refused(tiny_base):
    _, model = linearized(tiny_base())
    cache = DynamicCache(config=model.config)
    in_pieces(model, tokens(5), 5, cache)
    model.set_attention_mode("softmax")
    with pytest.raises(ValueError, match="another attention mode"):
        model(tokens(1), past_key_values=cache)


def test_prepared_masks_are_refused(tiny_base):
    _, model = linearized(tiny_base())
    with pytest.raises(ValueError, match="padding mask"):
        model(tokens(5), attention_mask=torch.ones(1, 1, 5, 5))


def check_packed_documents(model):
    """Packed rows give what each document gives alone, with gradients."""
    ids, lengths = tokens(120, batch=2), [[1, 50, 20, 49], [70, 3, 47]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    gradient = torch.autograd.grad(packed.square().sum(), model.model.embed_tokens.weight)[0]
    parts = [part for row, sizes in zip(ids, lengths, strict=True) for part in row.split(sizes)]
    separate = [model(part[None]).logits[0] for part in parts]
    close(packed.flatten(0, 1), torch.cat(separate))
    expected = torch.autograd.grad(torch.cat(separate).square().sum(), model.model.embed_tokens.weight)[0]
    # Each entry sums over some hundred tokens in another order: compared as a whole.
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_packed_documents(tiny_base, gate):
    """Documents packed into rows, told by positions that start anew, neither see nor remember one another."""
    specs = [LayerSpec(gate=gate, window=16, slots=8, sinks=1)] * 3 + [LayerSpec(kind="softmax")]
    _, model = linearized(tiny_base(), specs=specs)
    check_packed_documents(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_with_huge_keys(tiny_base, gate, dtype):
    """Keys in the hundreds (Qwen2.5 has such biases) overflow nothing, forward or backward."""
    _, model = linearized(tiny_base("qwen2"), dtype=dtype, gate=gate, window=16, slots=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.copy_(torch.linspace(-300, 300, layer.self_attn.k_proj.bias.numel()))
    loss = model(input_ids=tokens(300), labels=tokens(300)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_static_cache_is_swapped(tiny_base):
    """A static cache, too, ends up with constant-size layers."""
    _, model = linearized(tiny_base(), window=8)
    cache = StaticCache(config=model.config, max_cache_len=64)
    close(in_pieces(model, tokens(40), 13, cache), in_pieces(model, tokens(40), 40))
    assert all(isinstance(layer, LigerCacheLayer) for layer in cache.layers)


@torch.no_grad()
def test_no_window(tiny_base):
    """A window of 0 runs the recurrent branch alone, with coefficient 1; its window-only control attends to nothing."""
    _, model = linearized(tiny_base(), window=0, mix=0.5)
    _, recurrent = linearized(tiny_base(), window=16, mix=1.0)
    ids = tokens(90, batch=2)
    whole = model(ids).logits
    assert torch.equal(whole, recurrent(ids).logits)
    for piece in (1, 7, 64):
        close(in_pieces(model, ids, piece), whole)
    model.set_attention_mode("window")
    hidden = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, inputs, __: hidden.append(inputs[0]))
    close(in_pieces(model, ids, 7), model(ids).logits)
    hook.remove()
    assert not any(x.any() for x in hidden)


@pytest.mark.parametrize("mode", ["liger", "window", "exact"])
@pytest.mark.parametrize(
    "spec",
    [
        {"window": 0, "mix": 1.0, "sinks": 4},
        {"window": 0, "mix": 0.5, "sinks": 4},
        {"window": 16, "mix": 1.0, "normalizer": "joint", "kept": 4},
        {"window": 16, "mix": 1.0, "normalizer": "joint", "kept": 4, "sinks": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_of_one_branch(tiny_base, spec, mode):
    """No window, or no share for it, beside settings that only a window has a use for."""
    _, model = linearized_with_extras(tiny_base(), **spec)
    model.set_attention_mode(mode)
    ids = tokens(90, batch=2)
    whole = model(ids).logits
    assert whole.isfinite().all()
    for piece in (1, 7, 64):
        close(in_pieces(model, ids, piece), whole)
        close(in_pieces(model, ids, piece, StaticCache(config=model.config, max_cache_len=96)), whole)


@torch.no_grad()
def test_no_window_in_a_step_beside_learned_sinks(tiny_base):
    """GPT-OSS: a softmax over nothing but its sink logits is nothing."""
    _, model = linearized(
        tiny_base("gpt_oss", layer_types=["full_attention"] * 4), attn_implementation="eager", window=0, mix=1.0
    )
    ids = tokens(20)
    for mode in ("liger", "exact", "window"):
        model.set_attention_mode(mode)
        close(in_pieces(model, ids, 1), model(ids).logits)


@torch.no_grad()
def test_attention_dropout(tiny_base):
    """The family's attention dropout drops in training, within the window and beyond it, and not otherwise."""
    _, model = linearized(tiny_base("llama", attention_dropout=0.5), window=16, mix=0.0)
    for ids in (tokens(10), tokens(60)):
        expected = model.eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert not torch.allclose(model.train()(ids).logits, expected)


def test_gradient_checkpointing(tiny_base, gate):
    """Recomputing the layers in the backward pass changes no gradient (those themselves: tests/test_recurrence.py)."""
    _, model = linearized(tiny_base(num_hidden_layers=2), gate=gate, window=16, slots=8)
    ids = tokens(80)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(ids).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("k_proj" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient)


@pytest.mark.parametrize("settings", [{}, {"gate": "gdn"}, {"gate": "mlstm", "normalizer": "joint"}])
def test_training_computes_branches_again(tiny_base, monkeypatch, settings):
    """The same gradients as with everything kept, and nothing kept between a branch's inputs and its output."""
    monkeypatch.setattr("liger_cli.templates.liger_attention.RECOMPUTED", 0)
    _, model = linearized(tiny_base(), window=16, **settings)
    model.train()
    ids = tokens(150, batch=2)

    def step(everything_kept: bool):
        for attention in model.model.liger_attentions():
            attention.gradient_checkpointing = everything_kept
        held = {}

        def keep(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(ids, labels=ids, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        return sum(held.values()), [p.grad.clone() for p in model.parameters()]

    less, again = step(False)
    more, kept = step(True)
    assert less < 0.75 * more
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
