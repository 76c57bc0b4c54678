"""Calibration: closed-form fits against planted answers, the shipped base brought nearer to itself, and the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_convert import digest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from liger_cli import shipped
from liger_cli.calibration import calibrate
from liger_cli.calibration.branches import Statistics, fit_scales
from liger_cli.calibration.costs import HeadCosts
from liger_cli.calibration.layerwise import logits_of
from liger_cli.checkpoint.extras import extra_shapes, initial_values
from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import load_model, model_classes
from liger_cli.checkpoint.reader import EXTRAS, read_checkpoint
from liger_cli.commands.convert import convert
from liger_cli.conversion.folder import converted_config
from liger_cli.conversion.plan import make_plan, with_defaults
from liger_cli.conversion.requests import Budget, Request
from liger_cli.main import app
from liger_cli.system.errors import LigerError, ModelError, UsageError

BASE = Path(shipped.__file__).parent / "base"


def test_scales_are_the_least_squares_solution():
    torch.manual_seed(0)
    features = torch.randn(6, 5000)
    planted = torch.tensor([0.3, 0.0, -0.1, 0.9, 1.0, 1.2])
    target = planted @ features
    statistics = Statistics(features @ features.T, features @ target, float(target.square().sum()))
    grm, swa = fit_scales(statistics)
    torch.testing.assert_close(torch.cat([grm, swa]), planted, atol=2e-3, rtol=0)  # the ridge pulls by 1e-3


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A text that the tiny base's tokenizer knows, in rows of 64 tokens; held out, the same kind of it."""
    monkeypatch.setattr(calibrate, "SEQ_LEN", 64)
    text = " ".join(f"w{(7 * n * n + n) % 120 + 4}" for n in range(3000))
    monkeypatch.setattr(calibrate, "prose", lambda: [text, text])
    (tmp_path / "text.txt").write_text(text)
    return str(tmp_path / "text.txt")


SMALL = {"window": 8, "sinks": 1}


@pytest.mark.parametrize(
    "settings",
    [{}, {"gate": "mamba2"}, {"normalizer": "joint"}, {"gate": "gdn", "kept": "0"}, {"window": 16, "sinks": 0}],
)
def test_a_random_base(tiny_base, tmp_path, words, settings):
    """Nothing to find there, but everything runs, is recorded, loads, and leaves the base as it is."""
    base = tiny_base()
    before = digest(base)
    report, plan = convert(
        str(base), str(tmp_path / "out"), settings=SMALL | settings, calibrate=True, calibration_data=words,
        calibration_seq_len=64,
    )  # fmt: skip
    measured = report["calibration"]
    assert measured["kl"] <= 1.1 * measured["window_only_kl"]
    assert (measured["seq_len"], measured["held_out_seq_len"]) == (64, 96)
    assert json.loads((tmp_path / "out" / "liger.json").read_text())["calibration"].items() >= measured.items()
    assert digest(base) == before
    load_model(tmp_path / "out")


def test_the_shipped_base(tmp_path):
    """Untrained, and on prose that it was not made for, most of the window's distance from the base is gone."""
    report, plan = convert(str(BASE), str(tmp_path / "out"), calibrate=True, calibration_seq_len=512)
    measured = report["calibration"]
    assert measured["kl"] < 0.5 * measured["window_only_kl"]
    assert measured["kl"] < 0.8 * measured["same_bytes_kl"]
    assert list(measured["kl_by_position"]["model"]) == ["1-64", "65-256", "257-768"]
    heads = measured["heads"]
    assert sum(one["kept"] for one in heads) <= len(heads) * 128
    assert len({one["kept"] for one in heads}) > 1 and any(one["rest"] for one in heads)
    model = load_model(tmp_path / "out", dtype=torch.float32)
    for attention, spec in zip(model.model.liger_attentions(), plan.specs, strict=True):
        assert attention.liger_spec == spec
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"heads.png", "heads.svg"} <= names
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"windows of {measured['same_bytes_window']} tokens, which take the same bytes" in card


def test_named_heads_stay_softmax_beside_a_calibration(tiny_base, tmp_path, words):
    _, plan = convert(
        str(tiny_base()), str(tmp_path / "out"), settings=dict(SMALL), calibrate=True, calibration_data=words,
        calibration_seq_len=64, softmax_heads="1:0",
    )  # fmt: skip
    assert [spec.softmax_kv_heads for spec in plan.specs] == [(), (0,), (), ()]
    load_model(tmp_path / "out")


def test_the_base_writes_the_text_itself(tiny_base, tmp_path, words):
    report, _ = convert(
        str(tiny_base()), str(tmp_path / "out"), settings=dict(SMALL), calibrate=True, calibration_data="self",
        calibration_seq_len=64,
    )  # fmt: skip
    assert report["calibration"]["text"] == "text that the base wrote itself"
    assert report["calibration"]["tokens"] == calibrate.wanted_tokens()


@pytest.mark.parametrize("calibrated", [True, False])
def test_softmax_heads_and_layers_are_chosen(tiny_base, tmp_path, words, calibrated):
    choose = lambda name, **options: convert(  # noqa: E731
        str(tiny_base()), str(tmp_path / name), settings=dict(SMALL), calibrate=calibrated, calibration_data=words,
        calibration_seq_len=64, **options,
    )  # fmt: skip
    report, plan = choose("heads", softmax_heads="auto:2")
    chosen = [(index, head) for index, spec in enumerate(plan.specs) for head in spec.softmax_kv_heads]
    heads = report["calibration" if calibrated else "selection"]["heads"]
    assert chosen == [(one["layer"], one["head"]) for one in heads if one.get("softmax")] and len(chosen) == 2
    if not calibrated:  # then the score alone decides
        best = sorted(heads, key=lambda one: -one["score"][0])[:2]
        assert sorted((one["layer"], one["head"]) for one in best) == chosen
        assert not any(spec.kept for spec in plan.specs)
    _, plan = choose("layers", softmax_layers="auto:1")
    assert [spec.kind for spec in plan.specs].count("softmax") == 1
    load_model(tmp_path / "heads"), load_model(tmp_path / "layers")


def test_a_budget_is_kept(tiny_base, tmp_path, words, monkeypatch):
    """Bytes at a length: what the plan itself counts for the result, and more of them buy more exact memory."""
    found = {}
    for budget in (60_000, 200_000):
        report, plan = convert(
            str(tiny_base()), str(tmp_path / str(budget)), settings=dict(SMALL), calibrate=True, calibration_data=words,
            calibration_seq_len=64, budget=f"{budget}@256",
        )  # fmt: skip
        assert plan.cache_bytes(256) <= budget
        found[budget] = sum(64 if one.get("softmax") else one["kept"] for one in report["calibration"]["heads"])
    assert found[60_000] < found[200_000]
    monkeypatch.setattr("liger_cli.calibration.calibrate.load_base", None)  # nothing is loaded, let alone calibrated
    with pytest.raises(UsageError, match="below the least"):
        convert(
            str(tiny_base()), str(tmp_path / "none"), settings=dict(SMALL), calibrate=True, calibration_data=words,
            calibration_seq_len=64, budget="1KiB@256",
        )  # fmt: skip


@pytest.mark.parametrize("budget", range(14_000, 32_000, 1_000))
def test_a_budget_is_kept_where_a_head_holds_nothing(tiny_base, budget):
    """What such a head takes depends on the others of its layer."""
    plan = make_plan(read_checkpoint(tiny_base()), {**SMALL, "gate": "none", "mix": 0.0, "kept": 8, "rest": True})
    costs = {(layer, head): HeadCosts.zeros(layer, head, [0, 16, 32]) for layer in range(4) for head in range(2)}
    for (layer, head), one in costs.items():
        one.power, one.queries = 1.0, 1
        needs = torch.tensor([[8.0, 4.0], [2.0, 1.0], [0.5, 0.2]]) * (layer + 1)
        one.nats, one.error = (needs if head else torch.zeros(3, 2) for _ in range(2))
    request = Request(budget=Budget(budget, 4096))
    found = calibrate.choose(plan, costs, request, fit=True)
    assert found[0, 0].kept == 0 and not found[0, 0].rest and found[3, 1].kept
    assert budget - 6_000 < calibrate.chosen_plan(plan, found, request).cache_bytes(4096) <= budget


@pytest.mark.parametrize("budget", ["2MiB@1K", "100KiB@16", "30KiB@1"])
def test_a_budget_for_the_whole_cache(tiny_base, tmp_path, words, budget):
    with pytest.raises(UsageError, match="--budget .* leaves every head softmax, since the base's whole cache takes"):
        convert(
            str(tiny_base()), str(tmp_path / "none"), settings=dict(SMALL), calibrate=True, calibration_data=words,
            calibration_seq_len=64, budget=budget,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"softmax_heads": "auto:1"}, {"softmax_layers": "auto:1"}, {"budget": "20KiB@1K"}])
@pytest.mark.parametrize("calibrate", [True, False])
def test_nothing_to_choose_from_in_a_local_base(tiny_base, tmp_path, options, calibrate):
    if "budget" in options and not calibrate:
        return
    base = tiny_base("mistral", sliding_window=64)
    with pytest.raises(UsageError, match="of the linearized layers none has both"):
        convert(str(base), str(tmp_path / "none"), settings=dict(SMALL), calibrate=calibrate, **options)


def test_heads_of_global_layers_are_chosen_from(tiny_base, tmp_path, words):
    """Gemma 2: of four layers two are local, also where they are linearized."""
    given = {"settings": dict(SMALL), "linearize_local": True, "calibration_data": words, "calibration_seq_len": 64}
    base = str(tiny_base("gemma2", num_hidden_layers=4))
    for count, fits in ((4, True), (5, False), (6, False)):
        given["softmax_heads"] = f"auto:{count}"
        if not fits:
            with pytest.raises(UsageError, match=f"asks for {count} heads, but there are 4"):
                convert(base, str(tmp_path / "none"), **given)
            continue
        _, plan = convert(base, str(tmp_path / str(count)), **given)
        assert [spec.kind for spec in plan.specs] == ["liger", "softmax", "liger", "softmax"]


def test_rows_longer_than_the_held_out_text(tiny_base, tmp_path, words, monkeypatch):
    """The text that judges is shorter than rows half as long again: its rows are as long as it is."""
    monkeypatch.setattr(calibrate, "prose", lambda: ("w4 w5", " ".join(f"w{4 + n % 90}" for n in range(80))))
    report, _ = convert(
        str(tiny_base()), str(tmp_path / "out"), settings=dict(SMALL), calibrate=True, calibration_data=words,
        calibration_seq_len=64,
    )  # fmt: skip
    found = report["calibration"]
    assert found["held_out_seq_len"] == found["held_out_tokens"] == 80 and found["kl"] > 0


def test_tokens_beyond_the_vocabulary(tiny_base, tmp_path):
    """As `eval` says it, in place of an index that is out of range."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    known = json.loads((base / "tokenizer.json").read_text())
    known["model"]["vocab"]["w500"] = 130
    (base / "tokenizer.json").write_text(json.dumps(known))
    (tmp_path / "text.txt").write_text("w5 w6 w500 " * 500)
    with pytest.raises(ModelError, match="the tokenizer gives the id 130, but the model has 128 embeddings"):
        convert(str(base), str(tmp_path / "out"), calibrate=True, calibration_data=str(tmp_path / "text.txt"))


def test_layers_without_a_window(tiny_base, tmp_path, words):
    """Their recurrence is scaled; there is no other branch."""
    settings = {"gate": "gla", "window": 0}
    convert(
        str(tiny_base()), str(tmp_path / "out"), settings=settings, calibrate=True, calibration_data=words,
        calibration_seq_len=64,
    )  # fmt: skip
    model = load_model(tmp_path / "out")
    assert all(layer.self_attn.grm_scale.isfinite().all() for layer in model.model.layers)
    assert model(torch.tensor([[5, 6, 7, 8]])).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_of_what_the_last_layer_gives(tiny_base, family):
    """Every family's last norm, scale and cap: a calibration takes gradients through them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base(family), dtype=torch.float32).eval()
    last, ids = [], torch.arange(4, 24)[None]
    hook = model.get_decoder().layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    logits = model(ids, use_cache=False).logits
    hook.remove()
    hidden = last[0][0] if isinstance(last[0], tuple) else last[0]
    torch.testing.assert_close(logits_of(model, hidden), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [0, -1, 31])
def test_rows_that_are_too_short(tiny_base, tmp_path, length):
    with pytest.raises(
        UsageError, match=f"--calibration-seq-len is {length}, but has to be a whole number, 32 or more"
    ):
        convert(str(tiny_base()), str(tmp_path / "none"), calibrate=True, calibration_seq_len=length)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"softmax_heads": "auto:0"}, "whole number or a share"),
        ({"softmax_heads": "auto:100%"}, "between 0 and 100"),
        ({"softmax_heads": "4"}, "layers and heads"),
        ({"softmax_layers": "auto:x"}, "whole number, 1 or more"),
        ({"softmax_layers": "auto:99"}, "leaves no layer"),
        ({"softmax_heads": "auto:99"}, "ask for fewer"),
        ({"softmax_layers": "auto:1", "softmax_heads": "auto:1"}, "give one of them"),
        ({"settings": {"kept": "share:x"}}, "share:N"),
        ({"settings": {"kept": "share:8"}, "calibrate": False}, "add --calibrate"),
        ({"settings": {"gate": "none", "normalizer": "joint-max"}}, "fits no factor of the normalizer joint-max"),
        ({"budget": "12MiB"}, "12MiB@32K"),
        ({"budget": "12MiB@32K", "calibrate": False}, "add --calibrate"),
        ({"budget": "12MiB@32K", "softmax_heads": "auto:1"}, "leave out"),
    ],
)
def test_requests_that_cannot_be_met(tiny_base, tmp_path, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        convert(str(tiny_base()), str(tmp_path / "out"), **{"calibrate": True, **options})
    assert not (tmp_path / "out").exists()


def test_defaults_give_way(tiny_base, tmp_path):
    arguments = ["convert", str(tiny_base()), str(tmp_path / "out"), "--calibrate", "--dry-run", "--json"]
    layer = lambda *more: json.loads(CliRunner().invoke(app, [*arguments, *more]).stdout)["layers"][0]  # noqa: E731
    found = layer()
    assert (found["gate"], found["kept"], found["sinks"], found["rest"], found["mix"]) == ("none", 128, 4, True, 0.0)
    assert layer("--window", "32")["kept"] == 64
    assert layer("--kept", "0")["kept"] == 0 and layer("--sinks", "0")["sinks"] == 0
    assert layer("--gate", "mamba2")["gate"] == "mamba2" and layer("--gate", "mamba2")["rest"]
    two = layer("--gate", "gla")
    assert not two["rest"] and two["branch_scales"] and two["normalizer"] == "running" and two["mix"] == 0.5
    assert layer("--gate", "gdn")["normalizer"] == "none"
    assert layer("--normalizer", "joint")["normalizer"] == "joint"
    assert not (tmp_path / "out").exists()


def test_bad_data(tiny_base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w5 w6 w7")
    with pytest.raises(LigerError, match="a calibration needs"):
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
