"""Softmax heads inside Liger layers: against the base under a mask for each head, and however the text is fed.

Tolerances as in test_model: logits of size about 1 in float32, the same sums in another order.
"""

import copy

import pytest
import torch
from test_families import folder_of, implementations, load_base  # noqa: F401 (a fixture)
from test_model import check_packed_documents, close, in_pieces, linearized, tokens
from transformers import DynamicCache

from liger_cli.benchmark.contest import cache_bytes
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.conversion.plan import make_plan
from liger_cli.templates import liger_heads
from liger_cli.templates.liger_cache import LigerCacheLayer
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError, layer_specs, liger_block
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_window import Scoring

# Head 0 and head 1, with sinks; a layer with none; one of another gate and window that keeps tokens by their score.
MIXED = [
    LayerSpec(window=16, softmax_kv_heads=(1,)),
    LayerSpec(window=16, softmax_kv_heads=(0,), sinks=2),
    LayerSpec(window=16),
    LayerSpec(window=8, gate="hgrn2", softmax_kv_heads=(1,), branch_scales=True, kept=4),
]
# plain; a soft cap; sinks in the softmax; one matrix for q, k, v; local in every layer; norms on q and k.
FAMILIES = ("llama", "gemma2", "gpt_oss", "phi3", "mistral-window", "qwen3")


def head_mask(length: int, window: int, heads: int, groups: int, chosen, local=None):
    """[1, Hq, T, T] for eager attention: the chosen key/value heads see all before them, the others a window."""
    row, column = torch.arange(length)[:, None], torch.arange(length)
    whole = (column <= row) & (column > row - (local or length))
    band = whole & (column > row - window)
    seen = torch.stack([whole if head // groups in chosen else band for head in range(heads)])
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None]


@pytest.mark.parametrize("window", [7, 64])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_every_head_sees_what_it_should(folder_of, case, window):  # noqa: F811
    """mix 0: the base under a mask for each head; local layers keep their own window in their softmax heads."""
    base = load_base(folder_of(case))
    folder = folder_of(case, linearize_local=True, mix=0.0, window=window, softmax_kv_heads=(1,))
    model = load_model(folder, attn_implementation="eager").eval()
    config, ids = base.config, tokens(60)
    heads, local = config.num_attention_heads, getattr(config, "sliding_window", None)
    arguments = (60, window, heads, heads // config.num_key_value_heads, (1,))
    masks = {"full_attention": head_mask(*arguments), "sliding_attention": head_mask(*arguments, local)}
    only_local = local is not None and getattr(config, "layer_types", None) is None
    mixed = "gemma2" in case or "gpt_oss" in case
    expected = base(
        ids, attention_mask=masks if mixed else masks["sliding_attention" if only_local else "full_attention"]
    )
    close(model(ids).logits, expected.logits, 1e-5)
    for piece in (1, 13):
        close(in_pieces(model, ids, piece), expected.logits)
    model.set_attention_mode("softmax")
    assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_identity(folder_of, case):  # noqa: F811
    """Every head softmax but one, and a window that covers the text: the base's logits bit for bit."""
    folder = folder_of(case, linearize_local=True, mix=0.0, window=64, softmax_kv_heads=(0,))
    ids = tokens(23, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for implementation in implementations(folder_of(case)):
        base = load_base(folder_of(case), implementation)
        model = load_model(folder, attn_implementation=implementation).eval()
        for arguments in ({}, {"attention_mask": mask}):
            assert torch.equal(model(ids, **arguments).logits, base(ids, **arguments).logits)


@torch.no_grad()
def test_softmax_heads_are_the_difference(tiny_base):
    """Both heads of two chosen in turn, and neither: three different models, of which one is the plain one."""
    _, plain = linearized(tiny_base(), window=8)
    ids = tokens(60)
    logits = [linearized(tiny_base(), window=8, softmax_kv_heads=heads)[1](ids).logits for heads in ((), (0,), (1,))]
    assert torch.equal(logits[0], plain(ids).logits)
    assert (logits[1] - logits[0]).abs().max() > 1e-3 and (logits[2] - logits[1]).abs().max() > 1e-3


@pytest.fixture(params=sorted(GATES))
def hybrid(request, tiny_base):
    """Four layers with one softmax head each, for every gate."""
    specs = [LayerSpec(gate=request.param, window=16, slots=8, softmax_kv_heads=(index % 2,)) for index in range(4)]
    return linearized(tiny_base(), specs=specs)[1]


@pytest.fixture
def mixed(tiny_base):
    return linearized_mixed(tiny_base)


def linearized_mixed(tiny_base):
    from transformers import AutoModelForCausalLM

    from liger_cli.checkpoint.families import FAMILIES
    from liger_cli.checkpoint.model_code import model_classes

    base = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32).eval()
    config_class, model_class = model_classes(FAMILIES["qwen3"])
    values = {name: value for name, value in base.config.to_dict().items() if name != "model_type"}
    model = model_class(config_class(**values, liger=liger_block(MIXED))).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("_scale", "keep_score")) for name in missing)
    torch.nn.init.normal_(model.model.layers[3].self_attn.keep_score)
    return model


@pytest.mark.parametrize("piece", [1, 7, 64])
@torch.no_grad()
def test_pieces(hybrid, piece):
    ids = tokens(120, batch=2)
    close(in_pieces(hybrid, ids, piece), hybrid(ids).logits)


@torch.no_grad()
def test_left_padding(hybrid):
    """Rows of several lengths, padded on the left, agree with each row alone; so does decoding them."""
    lengths, width = [37, 80, 5], 91
    ids, mask = tokens(width, 3), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = hybrid(ids, attention_mask=mask, position_ids=positions).logits
    pieces = in_pieces(hybrid, ids, 9, attention_mask=mask)
    assert whole.isfinite().all() and pieces.isfinite().all()
    for row, length in enumerate(lengths):
        alone = hybrid(ids[row : row + 1, width - length :]).logits[0]
        close(whole[row, width - length :], alone)
        close(pieces[row, width - length :], alone)


@torch.no_grad()
def test_right_padding(hybrid):
    ids, mask = tokens(90, 2), torch.ones(2, 90, dtype=torch.long)
    mask[0, 40:] = 0
    padded = hybrid(ids, attention_mask=mask).logits
    close(padded[0, :40], hybrid(ids[:1, :40]).logits[0])
    close(padded[1], hybrid(ids[1:]).logits[0])


@pytest.mark.parametrize("case", ["gemma2", "gpt_oss", "phi3", "mistral-window"])
@torch.no_grad()
def test_families_padded_and_generating(folder_of, case):  # noqa: F811
    folder = folder_of(case, linearize_local=True, window=8, softmax_kv_heads=(1,))
    model = load_model(folder, attn_implementation="eager").eval()
    ids, mask = tokens(50, 2), torch.ones(2, 50, dtype=torch.long)
    mask[1, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    close(whole[1, 13:], model(ids[1:, 13:]).logits[0])
    close(in_pieces(model, ids, 11, attention_mask=mask)[mask.bool()], whole[mask.bool()])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate(mixed, cache, length):
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tokens(length, 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = mixed.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(mixed.generate(ids, attention_mask=mask, cache_implementation=cache, **settings), expected)


@torch.no_grad()
def test_beam_search(mixed):
    settings = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = tokens(25, 2)
    assert torch.equal(mixed.generate(ids, **settings), mixed.generate(ids, use_cache=False, **settings))


@torch.no_grad()
def test_long_texts_in_pieces(tiny_base, monkeypatch):
    """Queries are worked through in pieces where a mask is needed; the logits are those of one piece."""
    _, model = linearized(tiny_base(), window=16, softmax_kv_heads=(1,))
    ids, mask = tokens(200, batch=2), torch.ones(2, 200, dtype=torch.long)
    mask[1, :77] = 0
    whole = model(ids, attention_mask=mask).logits[mask.bool()]
    monkeypatch.setattr(liger_heads, "PIECE_SIZE", 32)
    close(model(ids, attention_mask=mask).logits[mask.bool()], whole)
    close(in_pieces(model, ids, 90, attention_mask=mask)[0], whole[:200])


@torch.no_grad()
def test_modes(tiny_base):
    """Softmax mode is the base exactly; window mode turns only the recurrent branch off; and back again."""
    base, model = linearized(tiny_base(), window=16, softmax_kv_heads=(1,))
    _, control = linearized(tiny_base(), window=16, softmax_kv_heads=(1,), mix=0.0)
    ids = tokens(90)
    liger = model(ids).logits
    model.set_attention_mode("softmax")
    assert torch.equal(in_pieces(model, ids, 17), in_pieces(base, ids, 17))
    model.set_attention_mode("window")
    assert torch.equal(model(ids).logits, control(ids).logits)
    close(in_pieces(model, ids, 17), control(ids).logits)
    model.set_attention_mode("liger")
    assert torch.equal(model(ids).logits, liger)


@torch.no_grad()
def test_cache_rows(mixed):
    """Repeating, choosing, reordering, offloading: the softmax heads' keys move along; reset forgets them."""
    ids, following = tokens(30, 2), tokens(1, 4, seed=1)
    expected = mixed(torch.cat([ids.repeat_interleave(2, 0), following], 1)).logits[:, -1]
    cache = DynamicCache(config=mixed.config)
    in_pieces(mixed, ids, 30, cache)
    cache.batch_repeat_interleave(2)
    selected, reordered = copy.deepcopy(cache), copy.deepcopy(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    close(mixed(following, past_key_values=cache).logits[:, -1], expected)
    selected.batch_select_indices(torch.tensor([3, 1]))
    close(mixed(following[[3, 1]], past_key_values=selected).logits[:, -1], expected[[3, 1]])
    reordered.reorder_cache(torch.tensor([2, 3, 0, 1]))
    close(mixed(following[[2, 3, 0, 1]], past_key_values=reordered).logits[:, -1], expected[[2, 3, 0, 1]])
    assert cache.get_seq_length() == 31 and cache.layers[0].softmax_keys.shape[2] == 31
    assert cache.layers[2].softmax_keys is None
    cache.reset()
    assert not any(layer.tensors() for layer in cache.layers)


@pytest.mark.parametrize("lengths", [(64, 65), (40, 41)])
@torch.no_grad()
def test_only_the_softmax_heads_grow(mixed, lengths):
    """A token more costs the keys and values of three heads in float32, and nothing else."""
    sizes = []
    for length in lengths:
        cache = DynamicCache(config=mixed.config)
        mixed(tokens(length), past_key_values=cache)
        assert all(isinstance(layer, LigerCacheLayer) for layer in cache.layers)
        sizes.append(cache_bytes(cache))
    assert sizes[1] - sizes[0] == 3 * 2 * mixed.config.head_dim * 4


@pytest.mark.parametrize("case", ["llama", "mistral-window"])
@torch.no_grad()
def test_the_plan_foretells_the_cache(folder_of, case):  # noqa: F811
    """The state sizes that `convert` prints are the bytes that a text leaves behind, and a bench counts."""
    settings = {"window": 8, "softmax_kv_heads": (1,)}
    model = load_model(folder_of(case, linearize_local=True, **settings)).eval()
    plan = make_plan(read_checkpoint(folder_of(case)), settings, linearize_local=True)
    for row in plan.memory((40, 90)):
        cache = DynamicCache(config=model.config)
        model(tokens(row["tokens"]), past_key_values=cache)
        assert cache_bytes(cache) == row["state_bytes"]


@torch.no_grad()
def test_local_softmax_heads_stop_growing(folder_of):  # noqa: F811
    """A softmax head of a layer that is local in the base keeps what the base's own window of 24 reaches."""
    folder = folder_of("mistral-window", linearize_local=True, window=8, softmax_kv_heads=(1,))
    model = load_model(folder).eval()
    cache = DynamicCache(config=model.config)
    in_pieces(model, tokens(60), 7, cache)
    assert [layer.softmax_keys.shape[2] for layer in cache.layers] == [23] * 4


def test_packed_documents(tiny_base):
    """Packed documents neither see nor remember one another, in softmax heads either; with gradients."""
    _, model = linearized(tiny_base(), window=16, softmax_kv_heads=(1,))
    check_packed_documents(model)


@torch.no_grad()
def test_attention_dropout(tiny_base):
    """Dropped in training, in a layer whose other branches are off the path of the softmax head, and not otherwise."""
    attend = liger_heads.softmax_attention
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    there = torch.ones(1, 9).bool()
    for scoring, valid in (((0.3,), None), ((0.3, 30.0), None), ((0.3, None, torch.zeros(4)), None), ((0.3,), there)):
        run = lambda dropout: attend(q, k, v, Scoring(*scoring, dropout=dropout), valid)  # noqa: B023, E731
        assert torch.equal(run(0.0), run(0.0))
        assert not torch.allclose(run(0.5), run(0.0))
    _, model = linearized(tiny_base("llama", attention_dropout=0.5), window=16, mix=0.0, softmax_kv_heads=(0,))
    ids = tokens(60)
    expected = model.eval()(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model.train()(ids).logits, expected)


@pytest.mark.parametrize("heads", [[1, 0], [0, 0], [-1], "0", [0.0], [True], 3, None])
def test_heads_that_cannot_be_read(heads):
    with pytest.raises(LigerConfigError, match="softmax_kv_heads"):
        LayerSpec(softmax_kv_heads=heads)


def test_json_round_trip():
    spec = LayerSpec(softmax_kv_heads=[0, 2])
    assert spec.softmax_kv_heads == (0, 2) and hash(spec) == hash(LayerSpec(softmax_kv_heads=(0, 2)))
    assert layer_specs(liger_block([spec]), 1) == [spec]


@pytest.mark.parametrize(("heads", "sentence"), [((2,), "are 0 to 1"), ((0, 1), "every head")])
def test_heads_that_do_not_fit_the_model(tiny_base, heads, sentence):
    with pytest.raises(LigerConfigError, match=sentence):
        linearized(tiny_base(), softmax_kv_heads=heads)
