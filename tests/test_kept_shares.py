"""Kept tokens shared out between layers: what is expected against what is measured, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from liger_cli import shipped
from liger_cli.calibration import calibrate, kept_shares
from liger_cli.calibration.meter import divergence, load_base
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.commands.convert import convert
from liger_cli.conversion.card import share_note
from liger_cli.conversion.plan import make_plan, with_defaults
from liger_cli.conversion.plan_edits import constant_bytes
from liger_cli.conversion.requests import read_share
from liger_cli.main import app
from liger_cli.system.errors import UsageError

SHIPPED = Path(shipped.__file__).parent / "base"


def opened(base, window: int, **settings):
    """The plan of a calibrated model, and the model of it, with random scores."""
    plan = make_plan(read_checkpoint(Path(base)), with_defaults({"window": window, **settings}, calibrate=True))
    model, generator = load_base(plan), torch.Generator().manual_seed(0)
    for attention in model.get_decoder().liger_attentions():
        if attention.liger_kept:
            attention.keep_score.data.normal_(generator=generator)
    return plan, model


def measured(model, layer: int, tokens: int, rows) -> float:
    """KL(base || model), nats a token, with one layer as a window with so many kept tokens and softmax elsewhere."""
    attentions = {attention.layer_idx: attention for attention in model.get_decoder().liger_attentions()}
    total = 0.0
    with torch.no_grad(), kept_shares._without_recurrences({layer: attentions[layer]}, {layer: tokens}):
        for row in rows.split(1):
            model.set_attention_mode("softmax")
            base = model(row, use_cache=False).logits.float().log_softmax(-1)
            attentions[layer].liger_mode = "liger"
            total += float(divergence(base, model(row, use_cache=False).logits).sum())
    return total / rows.numel()


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_small_changes_cost_what_is_expected(tiny_base, monkeypatch, model_type):
    """A random model's attention is nearly even, so that the second order is all there is: within a quarter, the spread
    of eight draws over 384 tokens and what correlations between tokens add. Parameters and their flags stay."""
    monkeypatch.setattr(kept_shares, "DRAWS", 8)
    _, model = opened(tiny_base(model_type), 8)
    first = next(model.parameters()).requires_grad_(False)
    rows = torch.randint(4, 120, (4, 96), generator=torch.Generator().manual_seed(0))
    attentions = {
        attention.layer_idx: attention for attention in model.get_decoder().liger_attentions() if attention.liger_kept
    }
    found = kept_shares.expected_losses(model, attentions, rows, dict.fromkeys(attentions, [0, 32]))
    assert attentions and not first.requires_grad and list(model.parameters())[1].requires_grad
    assert {attention.liger_mode for attention in attentions.values()} == {"liger"}
    for layer, losses in found.items():
        for tokens, loss in zip((0, 32), losses, strict=True):
            assert loss == pytest.approx(measured(model, layer, tokens, rows), rel=0.25)


def test_a_trained_model_is_told_apart_layer_by_layer(monkeypatch):
    """On the shipped base: within a factor of three of what is measured, and the layers in the same order of cost."""
    plan, model = opened(SHIPPED, 64)
    monkeypatch.setattr(calibrate, "ROW_TOKENS", 256)
    rows, shared_by, _ = calibrate.text_rows(plan, model, None)
    calibrate.fit_keep_scores(model, rows[:6])
    attentions = {attention.layer_idx: attention for attention in model.get_decoder().liger_attentions()}
    found = kept_shares.expected_losses(model, attentions, shared_by[:4], dict.fromkeys(attentions, [16]))
    wanted = {layer: measured(model, layer, 16, shared_by[:4]) for layer in attentions}
    for layer, (loss,) in found.items():
        assert wanted[layer] / 3 < loss < 3 * wanted[layer]
    assert sorted(found, key=lambda layer: found[layer][0]) == sorted(wanted, key=wanted.get)


@pytest.fixture
def expecting(monkeypatch):
    """expecting(losses by layer, KL of allocations) stands in for what takes passes of the model."""

    def install(losses, kl):
        def expected(model, attentions, rows, sizes):
            return {layer: [losses[layer] / (1 + tokens) for tokens in sizes[layer]] for layer in attentions}

        def distances(model, rows, *modes):
            kept = [a.liger_spec.kept for a in model.get_decoder().liger_attentions() if a.liger_spec.kind == "liger"]
            return [kl(kept)]

        monkeypatch.setattr(kept_shares, "expected_losses", expected)
        monkeypatch.setattr(kept_shares, "distances", distances)

    return install


ROWS = torch.zeros(2, 160, dtype=torch.long)


def test_the_layer_in_need_gets_most(tiny_base, expecting):
    expecting({0: 0.01, 1: 5.0, 2: 0.01, 3: 0.02}, lambda kept: 1 / (1 + kept[1]))
    plan, model = opened(tiny_base(), 8, kept=32)
    found, report = kept_shares.shared_out(plan, model, ROWS)
    kept = [spec.kept for spec in found.specs]
    assert kept[1] == max(kept) > 64 and kept[0] < 32
    assert constant_bytes(found) <= constant_bytes(plan)
    assert [a.liger_spec for a in model.get_decoder().liger_attentions()] == list(found.specs)
    assert report["layers"] == {str(layer): tokens for layer, tokens in enumerate(kept)}
    assert report["tries"][0]["tokens"] == [32] * 4 and len(report["tries"]) > 1


def test_the_same_everywhere_stays_where_nothing_is_nearer(tiny_base, expecting):
    expecting({0: 0.01, 1: 5.0, 2: 0.01, 3: 0.02}, lambda kept: float(len(set(kept)) > 1))
    plan, model = opened(tiny_base(), 8, kept=32)
    found, report = kept_shares.shared_out(plan, model, ROWS)
    assert found.specs == plan.specs and set(report["layers"].values()) == {32}
    assert "32 kept tokens in every layer" in share_note(report)


def test_where_there_is_nothing_to_share_out(tiny_base):
    """Texts that fit into what is kept; a single layer that keeps any; none that does."""
    for settings, rows in (
        ({"kept": 200}, ROWS),
        ({"kept": 16, "layers": ["0-2:kept=0"]}, ROWS),
        ({"kept": 0}, ROWS),
    ):
        plan, model = opened(tiny_base(), 8, **settings)
        assert kept_shares.shared_out(plan, model, rows) == (plan, None)


def test_layers_that_keep_none_stay_as_they_are(tiny_base, expecting):
    expecting({0: 1.0, 1: 5.0, 3: 0.02}, lambda kept: 1 / (1 + kept[1]))
    plan, model = opened(tiny_base(), 8, kept=32, layers=["2:kept=0,gate=gdn,normalizer=none"])
    found, _ = kept_shares.shared_out(plan, model, ROWS)
    assert found.specs[2] == plan.specs[2] and found.specs[1].kept > 32


def test_the_command(tiny_base, tmp_path, monkeypatch):
    """Shared out by default, each layer's number in the config, the report and the card; the folder loads."""
    for name, value in (("ROW_TOKENS", 96), ("ROWS", 6), ("SHARED_BY", 2), ("HELD_OUT", 2)):
        monkeypatch.setattr(calibrate, name, value)
    out = tmp_path / "out"
    arguments = ["convert", str(tiny_base()), str(out), "--calibrate", "--window", "8"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and "share the kept tokens out" in " ".join(planned.output.split())
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    shares = json.loads((out / "liger.json").read_text())["calibration"]["kept_shares"]
    layers = json.loads((out / "config.json").read_text())["liger"]["layers"]
    assert shares["mean"] == 16
    assert [layer["kept"] for layer in layers] == [shares["layers"][str(index)] for index in range(4)]
    assert "Kept tokens shared out" in (out / "README.md").read_text() or set(shares["layers"].values()) == {16}
    load_model(out)
    uniform, _ = convert(str(tiny_base()), str(tmp_path / "same"), settings={"window": 8, "kept": 16}, calibrate=True)
    assert "kept_shares" not in uniform["calibration"]


def test_share_and_what_is_refused():
    assert read_share({"kept": "share:32"}, True) == ({"kept": 32}, True)
    assert read_share({"window": 8}, True) == ({"window": 8}, True)
    assert read_share({"window": 8}, False) == ({"window": 8}, False)
    assert read_share({"kept": "64"}, True) == ({"kept": "64"}, False)
    assert read_share({"layers": ["0:kept=8"]}, True) == ({"layers": ["0:kept=8"]}, False)
    for settings, calibrates, words in (
        ({"kept": "share:"}, True, "share:N, N has to be"),
        ({"kept": "share:-3"}, True, "share:N, N has to be"),
        ({"kept": "share:32"}, False, "add --calibrate"),
        ({"kept": "share:32", "layers": ["0:kept=8"]}, True, "--layer sets kept"),
    ):
        with pytest.raises(UsageError, match=words):
            read_share(settings, calibrates)


def test_a_layer_without_kept_tokens_has_no_score(tiny_base, tmp_path, expecting, monkeypatch):
    """What is shared out may leave a layer none: its scores are not written, and cached steps agree with one pass."""
    for name, value in (("ROW_TOKENS", 160), ("ROWS", 6), ("SHARED_BY", 2), ("HELD_OUT", 2)):
        monkeypatch.setattr(calibrate, name, value)
    expecting({0: 0.0, 1: 5.0, 2: 0.01, 3: 0.02}, lambda kept: float(kept[0] > 0))
    words = " ".join(f"w{(7 * n * n + n) % 120 + 4}" for n in range(8000))
    (tmp_path / "text.txt").write_text(words)
    real = calibrate.judge

    def judge(model, held_out):  # a random base is nearest to its window: kept tokens would be dropped
        return {**real(model, held_out), "kl": 0.0}

    monkeypatch.setattr(calibrate, "judge", judge)
    convert(
        str(tiny_base()), str(tmp_path / "out"), settings={"window": 8}, calibrate=True,
        calibration_data=str(tmp_path / "text.txt"),
    )  # fmt: skip
    model = load_model(tmp_path / "out", dtype=torch.float32).eval()
    specs = [attention.liger_spec for attention in model.get_decoder().liger_attentions()]
    assert specs[0].kept == 0 and specs[1].kept > 16
    names = {name for name, _ in model.named_parameters()}
    assert not any(".0." in name and "keep_score" in name for name in names)
    ids = torch.randint(4, 120, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, parts = None, []
        for part in ids.split([23, 1, 1, 17, 18], dim=1):
            step = model(part, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert replace(specs[0], kept=specs[1].kept) == specs[1]
