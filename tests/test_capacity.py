"""How much fits: the curves of a tiny base, going on where a run stopped, and single states."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from liger_cli.shipped import BASE_DIR
from liger_cli.templates.liger_config import LayerSpec
from study import capacity
from study.associations import MEMORIES, curves, read_back


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model of one layer with the shipped base's tokenizer: FOLDER@TEXT."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("capacity") / "tiny"
    shutil.copytree(BASE_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(BASE_DIR)
    for name, value in (("hidden_size", 32), ("intermediate_size", 32), ("num_hidden_layers", 1), ("head_dim", 16)):
        setattr(config, name, value)
    config.layer_types = config.layer_types[:1]
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return f"{folder}@stories"


def run(base, home, *more) -> int:
    arguments = ["--output", str(home), "--base", base, "--distance", "96", "--count", "2", "--only", "window,32 kept"]
    return capacity.main([*arguments, *more])


def test_curves_and_going_on(base, tmp_path, capsys, monkeypatch):
    assert run(base, tmp_path, "--pairs", "1,2") == 0
    result = json.loads((tmp_path / "capacity.json").read_text())
    window, kept = (result["kinds"][name] for name in ("window only", "32 kept tokens"))
    assert set(window["recall"]) == set(kept["recall"]) == {"1", "2"}
    assert window["calibration"] is None and kept["calibration"]["kl"] <= kept["calibration"]["window_only_kl"]
    # One layer, one head of 16 channels, float32 keys and values: 63 tokens of the window, 32 kept and their scores and
    # places, a state of 16 x 17 (the running normaliser's column).
    assert window["state_bytes"] < kept["state_bytes"] and window["state_bytes"] >= 63 * 2 * 16 * 4
    assert result["tokens"]["1"] > 96 and result["tokens"]["2"] > 96
    text = (tmp_path / "capacity.md").read_text()
    assert "| 32 kept tokens |" in text and "| gdn, no decay |" in text
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
    # What is known is neither converted nor measured again; a further number of pairs alone is.
    monkeypatch.setattr("liger_cli.commands.convert.convert", None)
    marked = {**result, "kinds": {**result["kinds"], "window only": {**window, "recall": {"1": 0.25, "2": 0.75}}}}
    (tmp_path / "capacity.json").write_text(json.dumps(marked))
    assert run(base, tmp_path, "--pairs", "1,2,17") == 0
    again = json.loads((tmp_path / "capacity.json").read_text())
    shares = again["kinds"]["window only"]["recall"]
    assert (shares["1"], shares["2"]) == (0.25, 0.75) and set(shares) == {"1", "2", "17"}
    # Another question begins anew, from the same conversions.
    assert run(base, tmp_path, "--pairs", "1", "--distance", "80") == 0
    assert json.loads((tmp_path / "capacity.json").read_text())["kinds"]["window only"]["recall"].keys() == {"1"}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--pairs", "1,x"), "whole numbers"),
        (("--pairs", "0"), "1 or more each"),
        (("--pairs", "38"), "38 pairs at 96 tokens cannot be probed: count must lie between 1 and 37"),
        (("--distance", "63"), "64, the window, or more"),
        (("--count", "0"), "1 or more"),
        (("--only", "nothing"), "fits no curve"),
    ],
)
def test_what_cannot_be_measured(base, tmp_path, capsys, more, sentence):
    assert run(base, tmp_path, *more) == 2
    assert sentence in capsys.readouterr().err


def test_a_state_holds_what_its_algebra_says():
    """One association is exact, many are too many; what phi and decay cost."""
    one = LayerSpec(gate="none", feature_map="none")
    assert read_back(one, 16, 1) == 1.0
    found = curves(16, (2, 64, 256), trials=4)
    assert set(found) == {memory.name for memory in MEMORIES}
    for shares in found.values():
        assert shares["2"] > shares["256"] and shares["256"] < 0.25
    # Keys of mixed sign are nearly orthogonal, softmaxed ones all point the same way.
    assert found["sum, no decay, phi = identity"]["64"] > 2 * found["sum, no decay, phi = softmax"]["64"]
    # A decay forgets the first ones.
    assert found["gdn, no decay"]["64"] > found["gdn, pooled decay"]["64"]


def test_the_guide_shows_the_recorded_result():
    """Its table is what the committed figures give."""
    results = Path(capacity.__file__).parent / "results"
    recorded = json.loads((results / "capacity.json").read_text(encoding="utf-8"))
    tables = [capacity.recall_table(recorded), capacity.states_table(recorded)]
    guide = (Path(__file__).parents[1] / "liger_cli" / "guides" / "capacity.md").read_text(encoding="utf-8")
    shown = (results / "capacity.md").read_text(encoding="utf-8")
    for table in tables:
        rows = table.markdown().splitlines()[2:]
        assert "\n".join(rows) in shown
        assert "\n".join(rows) in guide
