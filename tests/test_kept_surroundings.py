"""What stands around kept tokens and calibration: benchmark, memory plan, card, inspect, merge, refresh and eval."""

import json

import pytest
import torch
from test_bench import _side
from test_evaluate import _adapter
from test_extras import converted, shaken
from test_model import tokens
from transformers import AutoModelForCausalLM, DynamicCache

from liger_cli.benchmark.contest import Decoding, cache_bytes, cache_shapes
from liger_cli.benchmark.roofline import step_cost
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import EXTRAS, read_checkpoint
from liger_cli.commands import bench, evaluate, merge
from liger_cli.commands.convert import convert, refresh
from liger_cli.commands.inspect import inspect_folder, run
from liger_cli.conversion.plan import make_plan
from liger_cli.evaluation.subject import COLUMNS, open_subject
from liger_cli.system.manifest import read_manifest
from liger_cli.templates.liger_kept import EMPTY

KEPT = {
    "kept": {"window": 16, "kept": 24},
    "window longer than a short text": {"window": 160, "kept": 8},
    "kept and sinks": {"window": 16, "kept": 24, "sinks": 4},
    "kept by head": {"window": 16, "kept": [0, 24], "sinks": 2},
    "kept by head beside a softmax head": {"window": 16, "kept": [7, 24], "softmax_kv_heads": [0]},
    "rest": {"window": 16, "kept": [5, 24], "sinks": 2, "rest": [True, False], "gate": "mamba2"},
    "rest, no kept, long window": {"window": 160, "rest": True, "gate": "retnet"},
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
                if ours.priority is not None:
                    assert torch.equal((ours.priority > EMPTY).sum(-1), (theirs.priority > EMPTY).sum(-1))
        contestant = Decoding(side, position, filled)
        contestant.step()
        assert cache_shapes(filled) == cache_shapes(read)
        (row,) = plan.memory((position,))
        assert side.needed_bytes(position) == cache_bytes(read) == 2 * row["state_bytes"]


def test_kept_tokens_of_local_layers(tiny_base, tmp_path):
    """A layer that is local in the base keeps none; plan and cache agree."""
    base = tiny_base("mistral", sliding_window=24)
    settings = {"window": 16, "kept": 8}
    plan = make_plan(read_checkpoint(base), settings)
    convert(str(base), str(tmp_path / "liger"), settings=settings)
    model = load_model(tmp_path / "liger", dtype=torch.float32).eval()
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
    held = 2 * (16 + 24) * (2 * 16 * 4 + 8)  # keys, values and priorities of two heads
    assert cost["bytes"] == 4 * ours + 4 * (held + 8)  # and the number of tokens
    assert cost["flops"] == 2 * ours + 4 * 2 * 2 * (16 + 24) * 16 * 4
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
    assert entry["tensors"]["pairs"] == [1, 2, 16 + 24, 2, 16, "float32"]
    assert entry["tensors"]["priority"] == [1, 2, 16 + 24, "int64"]
    assert row["cache_shapes"] == shape_row["cache_shapes"] and row["cache_bytes"] == shape_row["cache_bytes"]
    assert all(one["batch_size"] >= 1 for one in found["batch_sweep"])


@pytest.mark.parametrize("cache", ["static", "offloaded"])
def test_generation_with_other_caches(tiny_base, tmp_path, cache):
    """transformers' own caches take Liger's layers in: the same tokens as without a cache, padding included."""
    if cache == "offloaded":
        try:
            torch.Stream()
        except RuntimeError:
            pytest.skip("a CUDA build of torch without a driver has no streams, which transformers' offloading needs")
    model = shaken(converted(tiny_base(), tmp_path, window=16, kept=8, branch_scales=True))
    ids = tokens(60, 2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    settings = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings), wanted)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some | `text`.txt"
    path.write_text(" ".join(f"w{(7 * n * n + n) % 120 + 4}" for n in range(3000)))
    return path


@pytest.fixture(scope="module")
def made(tiny_base, text, tmp_path_factory):
    """A calibrated folder that keeps so many tokens that they cannot but help; tests must not write into it."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    settings = {"window": 4, "kept": 40, "sinks": 0, "normalizer": "running"}
    convert(
        str(tiny_base()), str(folder), settings=settings, calibrate=True, calibration_data=str(text),
        calibration_seq_len=64,
    )  # fmt: skip
    return folder


def test_card(made, text):
    card = (made / "README.md").read_text()
    measured = read_manifest(made)["calibration"]
    assert measured["kl"] < measured["window_only_kl"]
    assert "| 40 |" in card and f"| parameters added to the base's | {4 * (2 * 16 + 4 + 4)} |" in card
    section = card.partition("## Calibration")[2].partition("## Use")[0]
    shown = text.name.replace("`", "'").replace("|", "\\|")
    assert f"{measured['tokens']:,} tokens of `{shown}`" in section
    assert f"Measured on {measured['held_out_tokens']:,} tokens of `{measured['held_out']}`, a text" in section
    for name, title in (("window_only", "the windows and sinks alone"), ("model", "this model as converted")):
        row = " | ".join(f"{value:.4f}" for value in measured["kl_by_position"][name].values())
        assert f"| {title} | {row} |" in section
    assert "calibrated on" not in card.partition("## Calibration")[0]


def test_card_without_calibration(tiny_base, tmp_path):
    card = (converted(tiny_base(), tmp_path) / "README.md").read_text()
    assert "alibrat" not in card and "kept tokens" not in card and "parameters added" not in card
    assert "| mix | 0.5 |" in card


def test_inspect(made, tmp_path, capsys):
    """Settings, calibration and the shard of added tensors, which is compared with what was recorded."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(made, folder)
    report = inspect_folder(folder)
    assert not report["differences"] and report["added_parameters"] == 4 * (2 * 16 + 4 + 4)
    assert report["calibration"] == read_manifest(made)["calibration"]
    assert report["layers"][0]["kept"] == 40 and report["layers"][0]["branch_scales"]
    states = {shard["file"]: shard["state"] for shard in report["shards"]}
    assert states == {"model-base.safetensors": "as recorded", EXTRAS: "liger's own tensors, as recorded"}
    assert run(str(folder)) == 0
    out = capsys.readouterr().out
    assert "kept 40" in out and "branch_scales True" in out and "160 of them added to the base's" in out
    measured = report["calibration"]
    assert f"on {measured['held_out_tokens']:,} tokens of {measured['held_out']}" in " ".join(out.split())

    with open(folder / EXTRAS, "r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x11")
    assert inspect_folder(folder)["differences"] == [f"{EXTRAS} is not as recorded"]

    manifest = json.loads((folder / "liger.json").read_text())
    manifest["calibration"]["kl"] = float("nan")
    (folder / "liger.json").write_text(json.dumps(manifest))
    assert read_manifest(folder) is None

    # What an earlier liger wrote records no such shard; what a stranger wrote may record anything.
    manifest = json.loads((folder / "liger.json").read_text())
    del manifest["extras"]
    manifest["calibration"] = {"tokens": "many", "kl": None, "text": ["a", "\x1b[2J"]}
    (folder / "liger.json").write_text(json.dumps(manifest))
    assert not inspect_folder(folder)["differences"]
    assert run(str(folder)) == 0
    assert "an unknown number" in (out := capsys.readouterr().out) and "\x1b" not in out


def test_refresh_keeps_the_calibration(made, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(made, folder)
    before = read_manifest(folder)
    (folder / "liger_kept.py").write_text("old")
    refresh(str(folder))
    after = read_manifest(folder)
    assert after["calibration"] == before["calibration"] and after["extras"] == before["extras"]
    assert not inspect_folder(folder)["differences"]
    assert (folder / "README.md").read_bytes() == (made / "README.md").read_bytes()


def test_merge_keeps_the_calibration(made, tmp_path, capsys):
    _adapter(made, tmp_path / "lora")
    merge.run(tmp_path / "lora", output=tmp_path / "out", quiet=True)
    assert read_manifest(tmp_path / "out")["calibration"] == read_manifest(made)["calibration"]
    report = inspect_folder(tmp_path / "out")
    assert not report["differences"] and report["added_parameters"] == 160
    assert {shard["state"] for shard in report["shards"]} == {"as recorded"}
    assert run(str(tmp_path / "out")) == 0
    assert "as it was before the merge" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "before any fine-tuning" in card and "## Fine-tuned" in card
    assert (tmp_path / "out" / EXTRAS).read_bytes() == (made / EXTRAS).read_bytes()


@torch.no_grad()
def test_columns(tiny_base, made, text, tmp_path):
    """base = the base to the last bit; window_only = a conversion whose window runs alone and keeps nothing."""
    convert(str(tiny_base()), str(tmp_path / "window"), settings={"window": 4, "mix": 0.0})
    base = AutoModelForCausalLM.from_pretrained(tiny_base()).eval()
    window = load_model(tmp_path / "window", dtype=torch.float32).eval()
    ids = tokens(60)
    adapter = _adapter(made, tmp_path / "lora")
    for folder in (made, adapter):
        subject = open_subject(folder)
        assert subject.has_recovery
        found = {}
        for name in COLUMNS:
            with subject.column(name) as model:
                found[name] = model(ids).logits
        assert torch.equal(found["base"], base(ids).logits)
        if folder == made:
            assert torch.equal(found["window_only"], window(ids).logits)
            with subject.column("window_only") as model:
                cache = model(ids, use_cache=True).past_key_values
            assert all(layer.priority is None for layer in cache.layers)
        assert not torch.allclose(found["model"], found["window_only"], atol=1e-3)
    again = evaluate.run(str(adapter), data=str(text), perplexity=True, seq_len=64, output_format="json", save=False)
    alone = evaluate.run(str(made), data=str(text), perplexity=True, seq_len=64, output_format="json", save=False)
    perplexities = [{name: each["perplexity"][name] for name in COLUMNS} for each in (again, alone)]
    assert perplexities[0]["base"] == perplexities[1]["base"]
    assert perplexities[0]["window_only"] != perplexities[1]["window_only"]
