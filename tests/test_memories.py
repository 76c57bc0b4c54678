"""What a calibration measures of a layer: ranks of keys, parts of attention, gradients, costs; and the allotment."""

import itertools
from pathlib import Path

import pytest
import torch

from liger_cli.calibration.allotment import Option, allot, evened
from liger_cli.calibration.base import load_base
from liger_cli.calibration.costs import HeadCosts
from liger_cli.calibration.fits import StateFit, fit_keep_score
from liger_cli.calibration.layerwise import projection, visit, visit_backward
from liger_cli.calibration.memories import draw_queries, parts_of, ranks, sizes_below
from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.conversion.plan import make_plan
from liger_cli.shipped import BASE_DIR

WINDOW, SINKS, LENGTH = 8, 2, 96
SCALED = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 5.0},
}


@pytest.fixture(scope="module")
def model():
    plan = make_plan(read_checkpoint(Path(BASE_DIR), False), {"window": WINDOW, "sinks": SINKS, "kept": 4, "mix": 0.0})
    return load_base(plan)


@pytest.fixture(scope="module")
def rows(model):
    return torch.randint(0, model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def layers_of(model, rows, backward=False):
    found = {}
    attentions = model.get_decoder().liger_attentions()
    (visit_backward if backward else visit)(
        model, attentions, rows, lambda layer: found.__setitem__(layer.attention.layer_idx, layer), "test"
    )
    return found


def test_ranks():
    """By definition: of the keys that left, how many score higher, or the same and come later."""
    scores = torch.tensor([[0.0, 0.0, 5.0, 1.0, 3.0, 3.0, 2.0, 9.0, 9.0, 9.0]])
    found = ranks(scores, torch.tensor([1, 9]), window=3, sinks=2)
    assert found[0, 0].tolist() == [-1, -1, 10, 10, 10, 10, 10, 10, 10, 10]
    assert found[0, 1].tolist() == [-1, -1, 0, 4, 2, 1, 3, -1, -1, -1]


def test_parts_of_attention(model, rows):
    """Each part against a masked softmax, and all together against what the model itself gives."""
    layer = layers_of(model, rows)[2]
    queries, sizes = torch.tensor([20, 50, 95]), [0, 4, 16]
    scores = torch.randn(layer.k.shape[1], LENGTH, generator=torch.Generator().manual_seed(1))
    rank = ranks(scores, queries, WINDOW, SINKS)
    parts = parts_of(layer, 1, 0, queries, rank[0], sizes)
    own = slice(0, layer.groups)
    assert torch.allclose(parts.full(), layer.heads[1, own][:, queries], atol=1e-5)
    logits = layer.rotated_q[1, own][:, queries] @ layer.rotated_k[1, 0].T * layer.attention.scaling
    values = layer.v[1, 0]
    for place, size in enumerate(sizes):
        exact = logits.masked_fill(rank[0] >= size, -torch.inf)
        assert torch.allclose(parts.exact_lse[place], exact.logsumexp(-1), atol=1e-5)
        assert torch.allclose(parts.exact[place], exact.softmax(-1) @ values, atol=1e-5)
        evicted = (rank[0] >= size) & (rank[0] < LENGTH)
        assert torch.equal(parts.count[place], evicted.sum(-1).float())
        several = evicted.sum(-1).clamp_min(1)
        mean = (logits * evicted).sum(-1) / several
        assert torch.allclose(parts.mean_logit[place], mean, atol=1e-4)
        moment = (logits * evicted) @ values / several[:, None]
        average = evicted.float() @ values / several[:, None]
        assert torch.allclose(parts.slope[place], moment - mean.unsqueeze(-1) * average, atol=1e-4)


def test_a_state_is_exact_where_the_evicted_keys_are_equal(model, rows):
    layer = layers_of(model, rows)[1]
    layer.rotated_k[:] = layer.rotated_k[:, :, :1]
    layer.k[:] = layer.k[:, :, :1]
    queries = torch.tensor([40, 95])
    rank = ranks(torch.zeros(layer.k.shape[1], LENGTH), queries, WINDOW, SINKS)
    parts = parts_of(layer, 0, 0, queries, rank[0], [0])
    mass = torch.zeros(layer.groups, 3 + layer.q.shape[-1])
    mass[:, 1] = 1.0  # the mean logit itself
    found = parts.with_state(0, mass, torch.ones(layer.groups))
    # The base's own output was made from other keys: what equal keys give is the mean of all values.
    wanted = torch.stack([layer.v[0, 0, : query + 1].mean(0) for query in queries])
    assert torch.allclose(found, wanted.expand_as(found), atol=1e-4)


def test_the_fitted_state_is_nearer_than_none(model, rows):
    """On the very queries it was fitted on, where a least-squares fit cannot lose but for its penalty."""
    layer = layers_of(model, rows)[0]
    queries = draw_queries(LENGTH, WINDOW + SINKS, 64, torch.Generator().manual_seed(0))
    scores = torch.zeros(layer.k.shape[1], LENGTH)
    rank = ranks(scores, queries, WINDOW, SINKS)
    several = [parts_of(layer, row, 0, queries, rank[0], [0]) for row in range(2)]
    fit = StateFit()
    for parts in several:
        fit.add(parts)
    mass, slope = fit.solve()
    without = sum(float((parts.exact[0] - parts.full()).square().sum()) for parts in several)
    found = sum(float((parts.with_state(0, mass[0], slope[0]) - parts.full()).square().sum()) for parts in several)
    assert found < 0.5 * without


def test_scores_find_the_keys_that_are_looked_at():
    """Keys with a mark in one channel are looked at by every query, from anywhere."""

    class Attention:
        scaling, liger_window, attn_logit_softcapping = 1.0, WINDOW, None

    class Layer:
        attention, groups = Attention(), 1

    generator = torch.Generator().manual_seed(0)
    k = 0.1 * torch.randn(1, 1, 256, 4, generator=generator)
    marked = torch.arange(5, 200, 13)
    k[0, 0, marked, 2] = 1.0
    q = torch.zeros(1, 1, 256, 4)
    q[..., 2] = 6.0
    layer = Layer()
    layer.k, layer.rotated_k, layer.rotated_q = k, k, q
    score = fit_keep_score(layer, torch.arange(0, 256, 2), SINKS)
    best = (k[0, 0] @ score[0]).topk(len(marked)).indices
    assert set(best.tolist()) == set(marked.tolist())


@pytest.mark.parametrize("family", ["shipped", "granite", "cohere", "gemma2"])
def test_gradients_are_those_of_the_whole_model(model, tiny_base, family):
    """Layer by layer, each run again, against one backward pass through all of them: heads that scale logits, too."""
    if family != "shipped":
        base = read_checkpoint(tiny_base(family, **SCALED[family]), False)
        model = load_base(make_plan(base, {"window": WINDOW, "kept": 4, "mix": 0.0}, linearize_local=True))
    rows = torch.randint(4, model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    seen = layers_of(model, rows[:1], backward=True)
    model.set_attention_mode("softmax")
    inputs = {}

    def keep(index):
        def hook(module, args):
            args[0].requires_grad_(True) if args[0].is_leaf else args[0].retain_grad()
            inputs[index] = args[0]

        return hook

    attentions = model.get_decoder().liger_attentions()
    hooks = [projection(one).register_forward_pre_hook(keep(one.layer_idx)) for one in attentions]
    with torch.enable_grad():
        log_p = model(rows[:1], use_cache=False).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
        log_p.gather(-1, drawn).sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model.set_attention_mode("liger")
    for index, layer in seen.items():
        whole = inputs[index].grad[0].unflatten(-1, (layer.heads.shape[1], -1)).transpose(0, 1)
        assert torch.allclose(layer.gradient[0], whole, atol=1e-4 * float(whole.abs().max())), index


def test_costs_fall_to_nothing_where_everything_is_kept(model, rows):
    layer = layers_of(model, rows[:1], backward=True)[1]
    queries = draw_queries(LENGTH, WINDOW + SINKS, 32, torch.Generator().manual_seed(0))
    rank = ranks(torch.zeros(layer.k.shape[1], LENGTH), queries, WINDOW, SINKS)
    sizes = [0, 16, LENGTH]
    costs = HeadCosts.zeros(1, 0, sizes)
    costs.add(layer, 0, queries, parts_of(layer, 0, 0, queries, rank[0], sizes))
    score = costs.score()[:, 0]
    assert score[0] > 0 and score[-1] < 1e-6 * score[0]
    assert costs.score()[:, 1].isinf().all()  # no state was fitted


def test_sizes_and_queries():
    assert sizes_below(512, 64) == [0, 16, 32, 64, 128, 256]
    assert sizes_below(64, 64) == [0]
    found = draw_queries(100, 20, 30, torch.Generator().manual_seed(0))
    assert len(found.unique()) == 30 and found.min() > 20 and found.max() < 100
    assert draw_queries(10, 64, 5, torch.Generator()).tolist() == [9]


HEADS = {
    (0, 0): [
        Option(0, False, 0, 9.0),
        Option(16, False, 16, 4.0),
        Option(64, True, 64, 1.0),
        Option(None, False, 0, 0.0),
    ],
    (0, 1): [
        Option(0, False, 0, 2.0),
        Option(16, False, 16, 1.5),
        Option(64, False, 64, 1.4),
        Option(None, False, 0, 0.0),
    ],
    (1, 0): [Option(0, True, 0, 0.3), Option(16, False, 16, 0.1), Option(None, False, 0, 0.0)],
}


@pytest.mark.parametrize("budget", [0, 16, 32, 64, 80, 96, 1000])
def test_allotment_against_all_combinations(budget):
    found = allot(HEADS, budget)
    assert sum(one.price for one in found.values()) <= budget
    best = min(
        sum(one.cost for one in several)
        for several in itertools.product(
            *([one for one in options if one.kept is not None] for options in HEADS.values())
        )
        if sum(one.price for one in several) <= budget
    )
    # Convex hulls leave out what lies between two of their corners; at these budgets nothing does.
    assert sum(one.cost for one in found.values()) == pytest.approx(best)


def test_allotment_with_softmax_heads():
    found = allot(HEADS, 16, softmax=1)
    assert found[0, 0].kept is None  # it costs most at any size that the others could pay for
    assert found[0, 1].kept == 16 and found[1, 0].kept == 0
    with pytest.raises(ValueError, match="above the budget"):
        allot({(0, 0): [Option(0, False, 8, 1.0)]}, 4)


def test_allotment_buys_softmax_heads_like_anything_else():
    options = {(0, 0): [Option(0, False, 10, 5.0), Option(None, False, 100, 0.0)], (0, 1): [Option(0, False, 10, 1.0)]}
    assert allot(options, 110, None)[0, 0].kept is None
    assert allot(options, 109, None)[0, 0].kept == 0


def test_states_lie_evenly():
    """Each layer gets the cheapest slice of its heads, at no higher a price; softmax heads do not count."""
    worth = [3.0, -1.0, 2.0, 0.0, 2.5, -0.5]
    options = {
        (layer, head): [Option(8, False, 8, 5.0), Option(8, True, 8 + price, 5.0 - one)]
        for layer, price in ((0, 0), (1, 4))
        for head, one in enumerate(worth)
    }
    options[0, 3] = [Option(None, False, 0, 0.0), Option(8, False, 8, 5.0)]
    found = {head: several[int(worth[head[1]] > 0)] for head, several in options.items()}
    found[0, 3] = options[0, 3][0]
    even = evened(found, options)
    flags = [[even[layer, head].rest for head in range(6)] for layer in (0, 1)]
    # Of five heads 0, 2 and 4 are every second but for the softmax head between them: the last two cannot both be had.
    assert flags[0] == [True, True, True, False, True, False]
    assert even[0, 3] == found[0, 3]
    assert flags[1] == [True, False, True, False, True, False] == [found[1, head].rest for head in range(6)]
    flags = [[True, True, False, True], [True, False, False, True], [False] * 4]
    for before in flags:
        several = [[Option(8, False, 8, 5.0), Option(8, True, 12, 4.0)] for _ in range(4)]
        options = {(0, head): one for head, one in enumerate(several)}
        after = evened({(0, head): options[0, head][flag] for head, flag in enumerate(before)}, options)
        after = [one.rest for _, one in sorted(after.items())]
        assert sum(after) == sum(before) and (before == after or before == [True, True, False, True])
