"""What stands around kept tokens and calibration: benchmark, memory plan, card, inspect, merge, refresh and eval."""

import pytest
import torch
from test_bench import _side
from test_extras import converted
from test_model import tokens
from transformers import DynamicCache

from liger_cli import bench
from liger_cli.checkpoint import read_checkpoint
from liger_cli.columns import open_subject
from liger_cli.contest import Decoding, cache_bytes, cache_shapes
from liger_cli.convert import convert
from liger_cli.modeling import load_model
from liger_cli.plan import make_plan
from liger_cli.roofline import step_cost

KEPT = {
    "kept": {"window": 16, "kept": 24},
    "window longer than a short text": {"window": 160, "kept": 8},
    "joint": {"window": 16, "kept": 24, "normalizer": "joint", "branch_scales": True},
    "no recurrence": {"window": 16, "kept": 24, "mix": 0.0},
    "recurrence alone": {"window": 16, "kept": 24, "mix": 1.0},
    "softmax head": {"window": 16, "kept": 24, "softmax_kv_heads": [1]},
    "sinks": {"window": 16, "sinks": 3},
    "window of one token": {"window": 1, "kept": 5},
}


@pytest.mark.parametrize("settings", KEPT.values(), ids=KEPT)
def test_filled_caches_and_planned_bytes_are_those_of_a_read_text(tiny_base, tmp_path, settings):
    """At positions before and after the window has filled: shapes, bytes, and one decoding step from there."""
    folder = converted(tiny_base(), tmp_path, **settings)
    side = _side(open_subject(folder), "model", batch_size=2)
    plan = make_plan(read_checkpoint(tiny_base()), {"slots": 8, **settings})
    longest = side.filled_cache(400)
    for position in (10, 100, 180, 400):
        read = side.prefill(position, float("inf"))[1]
        for filled in (side.filled_cache(position), side.shortened(longest, position)):
            assert cache_shapes(filled) == cache_shapes(read) and filled.get_seq_length() == position
            for ours, theirs in zip(filled.layers, read.layers, strict=True):
                if ours.kept is not None and settings.get("mix") != 1.0:  # which never looks at them
                    assert torch.equal(ours.kept[2].isfinite().sum(-1), theirs.kept[2].isfinite().sum(-1))
        contestant = Decoding(side, position, filled)
        contestant.step()
        assert cache_shapes(filled) == cache_shapes(read)
        (row,) = plan.memory((position,))
        assert side.needed_bytes(position) == cache_bytes(read) == 2 * row["state_bytes"]


def test_kept_tokens_of_local_layers(tiny_base):
    """A layer that is local in the base keeps none; plan and cache agree."""
    base = tiny_base("mistral", sliding_window=24)
    settings = {"window": 16, "kept": 8}
    plan = make_plan(read_checkpoint(base), settings)
    folder = base.parent / "liger"
    convert(str(base), str(folder), settings=settings, force=True)
    model = load_model(folder, dtype=torch.float32).eval()
    for position in (10, 60):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(position), past_key_values=cache)
        (row,) = plan.memory((position,))
        assert cache_bytes(cache) == row["state_bytes"]


def test_roofline_counts_kept_tokens(tiny_base, tmp_path):
    """Bytes and operations of a step by hand; the base's step reads nothing that the conversion added."""
    subject = open_subject(converted(tiny_base(), tmp_path, window=16, kept=24, mix=0.0, branch_scales=True))
    shapes = cache_shapes(_side(subject, "model").filled_cache(200))
    named = dict(subject.model.named_parameters())
    ours = sum(x.numel() for name, x in named.items() if "embed_tokens" not in name)
    added = sum(x.numel() for name, x in named.items() if name.rpartition(".")[2] in ("keep_score", "grm_scale"))
    added += sum(x.numel() for name, x in named.items() if name.endswith("swa_scale"))
    assert added == 4 * (2 * 16 + 4 + 4)
    cost = step_cost(subject.model, shapes, batch_size=1)
    held = 2 * (15 + 24) * 16 * 2 + (15 + 24) * 2  # keys and values, and scores, of two heads
    assert cost["bytes"] == 4 * ours + 4 * 4 * held
    assert cost["flops"] == 2 * ours + 4 * 2 * 2 * (15 + 24) * 16 * 4
    assert step_cost(subject.model, [], 1, softmax=True)["bytes"] == 4 * (ours - added)


def test_bench_of_kept_tokens(tiny_base, tmp_path, capsys):
    """The whole command with a sweep; from the shapes alone, the cache is the same."""
    folder = converted(tiny_base(), tmp_path, window=16, kept=24, branch_scales=True)
    options = {"seq_len": 200, "new_tokens": 1, "repetitions": 1, "batch_sweep": True, "base_limit": 1, "save": False}
    found = bench.run(str(folder), **options)
    shaped = bench.run(str(folder / "config.json"), shapes_only=True, **options)
    capsys.readouterr()
    row, shape_row = (next(one for one in each["rows"] if one["which"] == "model") for each in (found, shaped))
    (entry,) = row["cache_shapes"]
    assert entry["tensors"]["kept_0"] == [1, 2, 24, 16, "float32"]
    assert entry["tensors"]["kept_2"] == [1, 2, 24, "float32"]
    assert entry["tensors"]["window_scores"] == [1, 2, 15, "float32"]
    assert row["cache_shapes"] == shape_row["cache_shapes"] and row["cache_bytes"] == shape_row["cache_bytes"]
    assert all(one["batch_size"] >= 1 for one in found["batch_sweep"])
