"""Calibration: closed-form fits against planted answers, the shipped base brought nearer to itself, and the command."""

import json
from pathlib import Path

import pytest
import torch
from test_convert import digest
from typer.testing import CliRunner

from liger_cli import shipped
from liger_cli.calibration import calibrate, extent
from liger_cli.calibration import reach as selection_heads
from liger_cli.calibration.calibrate import Statistics, fit_scales, fit_scores
from liger_cli.checkpoint.extras import extra_shapes, initial_values
from liger_cli.checkpoint.model_code import load_model, model_classes
from liger_cli.checkpoint.reader import EXTRAS, read_checkpoint
from liger_cli.commands.convert import convert
from liger_cli.conversion.folder import converted_config
from liger_cli.conversion.plan import make_plan, with_defaults
from liger_cli.main import app
from liger_cli.system.errors import LigerError, UsageError

BASE = Path(shipped.__file__).parent / "base"


def test_scores_find_the_keys_that_are_needed():
    """The logistic regression finds planted weights, up to sampling: 4,000 keys, correlation above 0.99."""
    torch.manual_seed(0)
    planted, keys = torch.randn(2, 8), torch.randn(2, 4000, 8) * torch.linspace(0.1, 3, 8)
    needed = torch.einsum("hnd,hd->hn", keys, planted).sigmoid()
    found = fit_scores(Statistics([keys[:, :1000], keys[:, 1000:]], [needed[:, :1000], needed[:, 1000:]]))
    for head in range(2):
        assert torch.corrcoef(torch.stack([found[head], planted[head]]))[0, 1] > 0.99


def test_scales_are_the_least_squares_solution():
    torch.manual_seed(0)
    features = torch.randn(6, 5000)
    planted = torch.tensor([0.3, 0.0, -0.1, 0.9, 1.0, 1.2])
    target = planted @ features
    statistics = Statistics([], [], features @ features.T, features @ target, float(target.square().sum()))
    grm, swa = fit_scales(statistics)
    torch.testing.assert_close(torch.cat([grm, swa]), planted, atol=2e-3, rtol=0)  # the ridge pulls by 1e-3


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A text that the tiny base's tokenizer knows, to be read in rows of 64 tokens."""
    monkeypatch.setattr(calibrate, "ROW_TOKENS", 64)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * n * n + n) % 120 + 4}" for n in range(3000)))
    return str(text)


@pytest.mark.parametrize("settings", [{}, {"normalizer": "joint"}, {"gate": "gdn", "kept": 0}, {"window": 16}])
def test_never_worse_than_the_window(tiny_base, tmp_path, words, settings):
    """A random base has nothing to calibrate for: the window's own answer is the floor; the base stays as it is."""
    base = tiny_base()
    before = digest(base)
    report, _ = convert(str(base), str(tmp_path / "out"), settings=settings, calibrate=True, calibration_data=words)
    measured = report["calibration"]
    assert measured["kl"] <= measured["window_only_kl"] * (1 + 1e-6)
    assert json.loads((tmp_path / "out" / "liger.json").read_text())["calibration"] == measured
    assert digest(base) == before
    load_model(tmp_path / "out")


def test_the_shipped_base(tmp_path, monkeypatch):
    """Untrained, well over a fifth of the window's distance from the base is gone, on rows that took no part."""
    monkeypatch.setattr(calibrate, "ROWS", 6)
    monkeypatch.setattr(calibrate, "HELD_OUT", 2)
    report, plan = convert(str(BASE), str(tmp_path / "out"), calibrate=True)
    measured = report["calibration"]
    assert measured["kl"] < 0.6 * measured["window_only_kl"]
    kept = [spec.kept for spec in plan.specs]
    assert sum(kept) <= 6 * 128 and len(set(kept)) > 1  # shared out
    assert {spec.normalizer for spec in plan.specs} == {"running"}
    model = load_model(tmp_path / "out", dtype=torch.float32)
    assert any(attention.keep_score.any() for attention in model.model.liger_attentions())


def test_what_makes_the_window_worse_is_dropped(tiny_base, tmp_path, monkeypatch):
    """Where neither fit nor kept tokens help, the folder is the window's: the figures are given here."""
    monkeypatch.setattr(
        calibrate, "judge", lambda model, rows: {"kl": 2.0, "window_only_kl": 1.0, "recurrent_layers": []}
    )
    monkeypatch.setattr(calibrate, "ROW_TOKENS", 64)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n % 120 + 4}" for n in range(3000)))
    report, plan = convert(str(tiny_base()), str(tmp_path / "out"), calibrate=True, calibration_data=str(text))
    assert {spec.kept for spec in plan.specs} == {0}
    assert (report["calibration"]["kl"], report["calibration"]["dropped_kl"]) == (1.0, 2.0)
    names = {name.rpartition(".")[2] for name, _ in load_model(tmp_path / "out").named_parameters()}
    assert "grm_scale" in names and "keep_score" not in names
    assert "so none are kept" in (tmp_path / "out" / "README.md").read_text()


def test_defaults_give_way(tiny_base, tmp_path):
    arguments = ["convert", str(tiny_base()), str(tmp_path / "out"), "--calibrate", "--dry-run", "--json"]
    layers = lambda *more: json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout)["layers"]  # noqa: E731
    assert layers()[0]["kept"] == 128 and layers()[0]["normalizer"] == "running" and layers()[0]["branch_scales"]
    assert layers("--window", "32")[0]["kept"] == 64
    assert layers("--kept", "0")[0]["kept"] == 0
    assert layers("--sinks", "4")[0]["kept"] == 128 and layers("--sinks", "4")[0]["sinks"] == 4
    assert layers("--gate", "gdn")[0]["normalizer"] == "none"
    assert layers("--normalizer", "none")[0]["normalizer"] == "none"
    assert not (tmp_path / "out").exists()


def test_bad_data(tiny_base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w5 w6 w7")
    with pytest.raises(LigerError, match="give at least 4"):
        convert(str(tiny_base()), str(tmp_path / "out"), calibrate=True, calibration_data=str(short))
    with pytest.raises(UsageError, match="not a file"):
        convert(str(tiny_base()), str(tmp_path / "out"), calibrate=True, calibration_data=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="nothing is measured"):
        convert(str(tiny_base()), str(tmp_path / "out"), calibration_data=str(short))
    assert not (tmp_path / "out").exists()


def test_learned_tensors_keep_their_initial_values(tiny_base, tmp_path, words):
    """What a calibration does not fit is written as a plain conversion writes it."""
    from safetensors.torch import load_file

    learned = {"gate_params": "learned", "feature_params": "learned"}
    convert(str(tiny_base()), str(tmp_path / "plain"), settings=learned)
    convert(str(tiny_base()), str(tmp_path / "out"), settings=learned, calibrate=True, calibration_data=words)
    plain, found = (load_file(tmp_path / name / EXTRAS) for name in ("plain", "out"))
    assert len(plain) == 5 * 4 and set(plain) < set(found)
    for name, value in plain.items():
        assert torch.equal(found[name], value), name
    load_model(tmp_path / "out")


def test_extra_tensors_that_no_file_holds_have_initial_values(tiny_base):
    """transformers makes them on the meta device: without an initial value they would be whatever lay in memory."""
    base = tiny_base()
    settings = {"gate_params": "learned", "feature_params": "learned"}
    plan = make_plan(read_checkpoint(base), with_defaults(settings, calibrate=True))
    config_class, model_class = model_classes(plan.checkpoint.family)
    config = {name: value for name, value in converted_config(plan).items() if name != "auto_map"}
    model = model_class.from_pretrained(base, config=config_class.from_dict(config))
    wanted = initial_values(extra_shapes(plan.specs, plan.checkpoint.geometry))
    assert len(wanted) == 8 * 4
    for name, value in wanted.items():
        found = model.get_parameter(name).detach().numpy()
        if name.endswith("feature_k"):
            assert torch.equal(model.get_parameter(name), model.get_parameter(name[:-1] + "q"))
        elif name.endswith(("gate_down", "feature_q")):  # random: another draw of the same spread, to three deviations
            assert found.std() == pytest.approx(value.std(), rel=3 * (2 / found.size) ** 0.5 + 0.05)
        else:
            assert (found == value).all(), name


def test_heads_are_chosen_beside_kept_tokens_whose_scores_are_fitted(tiny_base, tmp_path, monkeypatch, words):
    """Before the calibration they would be measured beside the latest tokens, which is a longer window."""
    monkeypatch.setattr(extent, "ROW_TOKENS", 64)
    seen = []

    def measure(meter, kept):
        attentions = meter.model.get_decoder().liger_attentions()
        seen.append([float(attention.keep_score.detach().abs().sum()) for attention in attentions])
        assert all(attention.liger_spec.mix == 0 for attention in attentions)
        return real(meter, kept)

    real = selection_heads.measure_reach
    monkeypatch.setattr(selection_heads, "measure_reach", measure)
    report, _ = convert(
        str(tiny_base()), str(tmp_path / "out"), settings={"window": 8}, calibrate=True, softmax_heads="auto:1",
        calibration_data=words,
    )  # fmt: skip
    assert report["selection"]["stand_in"] == calibrate.SCORED
    assert seen and all(seen[0])
