"""Which layers stay softmax: the greedy choice on made-up figures, the meter on real models, and the command."""

import json

import pytest
import torch

from liger_cli import selection, selection_meter
from liger_cli.convert import convert
from liger_cli.errors import LigerError, UsageError
from liger_cli.selection import Figures, choose_layers, passes, score, spacings
from liger_cli.shipped import BASE_DIR

REFERENCES = {"base": Figures(0.0, 0.0, 1.0), "none": Figures(0.4, 4.0, 0.0)}


def made_up(worth: dict[frozenset, float], asked: list):
    """A `measure` whose figures are as good as the best known subset of what is kept."""

    def measure(sets):
        asked.append(list(sets))
        found = []
        for kept in sets:
            closed = max((value for part, value in worth.items() if part <= kept), default=0.0)
            found.append(Figures(0.4 * (1 - closed), 4.0 * (1 - closed), closed))
        return found

    return measure


def test_the_best_layer_and_then_the_best_beside_it():
    """Layer 1 is second best alone, but adds nothing to layer 4; layer 2 does."""
    worth = {frozenset({4}): 0.6, frozenset({1}): 0.5, frozenset({2}): 0.1, frozenset({2, 4}): 0.9}
    asked: list = []
    report = choose_layers(made_up(worth, asked), list(range(6)), 2, REFERENCES)
    assert report["chosen"] == [2, 4]
    assert [step["layer"] for step in report["greedy"]] == [4, 2]
    assert report["result"]["score"] == pytest.approx(0.9)
    assert [one["only_kept"]["score"] for one in report["layers"]] == pytest.approx([0, 0.5, 0.1, 0, 0.6, 0])
    assert [one["name"] for one in report["spacings"]] == ["every:3"]
    assert report["spacings"][0]["layers"] == [2, 5] and report["spacings"][0]["score"] == pytest.approx(0.1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_set_is_measured_twice_and_the_passes_are_foretold(count):
    asked: list = []
    choose_layers(made_up({frozenset({4}): 0.6}, asked), list(range(6)), count, REFERENCES)
    sets = [kept for call in asked for kept in call]
    assert len(sets) == len(set(sets))
    # Each call reads the base as well, and the first reading has the base and both stand-ins.
    assert 3 + len(sets) + len(asked) <= passes(6, count) <= 3 + len(sets) + len(asked) + 2


def test_spacings_of_one_size():
    assert spacings(list(range(8)), 1) == {"every:5": [4], "every:6": [5], "every:7": [6], "every:8": [7]}
    assert spacings([1, 3, 5, 7], 2) == {"every:2": [3, 7]}
    assert spacings(list(range(8)), 3) == {}


def test_score():
    """Half divergence on hard tokens, half recall; recall counts only where there is a gap in it."""
    assert score(Figures(0.1, 1.0, 0.5), REFERENCES) == pytest.approx((0.75 + 0.5) / 2)
    assert score(Figures(0.1, 1.0, None), REFERENCES) == pytest.approx(0.75)
    close = {"base": Figures(0.0, 0.0, 1.0), "none": Figures(0.4, 4.0, 0.98)}
    assert score(Figures(0.1, 1.0, 0.0), close) == pytest.approx(0.75)
    easy = {"base": Figures(0.0, 0.0, None), "none": Figures(0.4, 0.0, None)}
    assert score(Figures(0.1, 0.0, None), easy) == pytest.approx(0.75)


@pytest.fixture
def small(monkeypatch):
    """Less data, for speed: still enough to tell the layers of the shipped base apart."""
    monkeypatch.setattr(selection, "ROWS", 2)
    monkeypatch.setattr(selection, "PROBES", 6)
    monkeypatch.setattr(selection, "DISTANCES", (2,))


@pytest.fixture
def plan(tiny_base):
    from liger_cli.checkpoint import read_checkpoint
    from liger_cli.plan import make_plan

    return make_plan(read_checkpoint(tiny_base("qwen3", max_position_embeddings=2048)), {"window": 16})


@pytest.fixture
def words(tmp_path):
    """A text of the tiny bases' words."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(4, 128, (900,), generator=generator).tolist()))
    return path


def test_the_meter_measures_what_it_says(plan, words, small):
    """Its divergence is that of logits taken by hand in the same modes; all layers kept is the base."""
    meter = selection_meter.open_meter(plan, str(words))
    meter.announce(passes(4, 1))
    assert meter.none.kl > 0 and meter.base.kl == 0
    everything, one = frozenset(range(4)), frozenset({2})
    kept_all, kept_one = meter.measure([everything, one])
    assert kept_all == meter.base
    model = meter.model
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in meter.batches:
            model.set_attention_mode("softmax")
            base = model(batch.ids).logits.log_softmax(-1)
            model.set_attention_mode(meter.stand_in, [0, 1, 3])
            other = model(batch.ids).logits.log_softmax(-1)
            kl = torch.nn.functional.kl_div(other, base, log_target=True, reduction="none").sum(-1)
            total, tokens = total + float(kl[batch.judged].sum()), tokens + int(batch.judged.sum())
    # float32 sums of some hundred divergences of size 1e-3 to 1, in another order.
    assert kept_one.kl == pytest.approx(total / tokens, rel=1e-4)
    assert tokens == 900  # the first word follows the BOS token


def test_a_base_that_cannot_do_the_probes_is_judged_by_divergence_alone(plan, words, small):
    meter = selection_meter.open_meter(plan, str(words))
    assert any(batch.answers for batch in meter.batches)
    meter.announce(passes(4, 1))
    assert "KL divergence alone" in meter.recall_note
    assert not any(batch.answers for batch in meter.batches)
    assert meter.base.recall is None and meter.measure([frozenset({1})])[0].recall is None


def test_the_stand_in_nearer_to_the_base_is_taken(plan, words, small, monkeypatch):
    """Un-normalised sums are far off before training, so the window stands in; a branch that helps is used."""
    meter = selection_meter.open_meter(plan, str(words))
    better = {"window": Figures(0.4, 4.0, None), "liger": Figures(0.3, 3.0, None)}
    meter.base = Figures(0.0, 0.0, None)
    monkeypatch.setattr(meter, "_figures", lambda settings, find_hard=False: [better[mode] for _, mode in settings])
    meter.passes = 3
    meter.announce(passes(4, 1))
    assert meter.stand_in == "liger" and meter.none == better["liger"]


def test_the_shipped_base_keeps_layer_4(tmp_path, small):
    """Found by hand before this was written: of the six layers only layer 4 carries recall by itself."""
    report, plan = convert(str(BASE_DIR), str(tmp_path / "out"), softmax_layers="auto:1")
    assert [spec.kind for spec in plan.specs] == ["liger"] * 4 + ["softmax", "liger"]
    measured = report["selection"]
    assert measured["chosen"] == [4] and measured["result"]["recall"] == 1.0
    assert measured["references"]["none"]["recall"] <= 0.2
    assert {one["name"]: one["layers"] for one in measured["spacings"]} == {
        "every:4": [3], "every:5": [4], "every:6": [5]
    }  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [layer["kind"] for layer in config["liger"]["layers"]] == ["liger"] * 4 + ["softmax", "liger"]
    kept = json.loads((tmp_path / "out/liger.json").read_text())["selection"]
    assert kept["layers"] == measured["layers"] and kept["plots"] == ["softmax_layers.png", "softmax_layers.svg"]
    assert (tmp_path / "out/softmax_layers.png").read_bytes().startswith(b"\x89PNG")
    assert "softmax is kept in layer 4" in (tmp_path / "out/README.md").read_text()


def test_bars_on_the_terminal(capsys):
    from rich.console import Console

    from liger_cli.selection_view import print_selection

    report = choose_layers(made_up({frozenset({2}): 0.5}, []), [0, 2, 3], 1, REFERENCES)
    print_selection(report, Console(width=120))
    shown = capsys.readouterr().out
    assert "50 %" in shown and "kept" in shown and "█" in shown and "every:2: layers 2" in shown


def test_dry_run_says_what_would_be_measured(liger):
    """Without torch: the plan stays tensor-free."""
    done = liger("convert", BASE_DIR, "out", "--softmax-layers", "auto:2", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "selection" not in report
    assert any("6 layers would be measured, 24 passes" in note for note in report["notes"])
    assert [layer["kind"] for layer in report["layers"]].count("softmax") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"softmax_layers": "auto:4"}, "leaves no layer to linearize"),
        ({"softmax_layers": "auto:0"}, "1 or more"),
        ({"softmax_layers": "auto:two"}, "whole number"),
        ({"softmax_layers": "auto:1", "calibration_data": "no-such-file.txt"}, "no-such-file.txt is not a file"),
    ],
)
def test_what_cannot_be_chosen(tiny_base, tmp_path, arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        convert(str(tiny_base()), str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_an_output_in_the_way_is_refused_before_anything_is_measured(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(selection_meter, "open_meter", lambda *_: pytest.fail("measured"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert(str(tiny_base()), str(tmp_path / "out"), softmax_layers="auto:1")


def test_a_text_that_is_none(tiny_base, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(LigerError, match="no text"):
        convert(str(tiny_base()), str(tmp_path / "out"), softmax_layers="auto:1", calibration_data=str(empty))
