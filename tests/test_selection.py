"""What stays softmax: the greedy choice on made-up figures, the meter on real models, and the command."""

import json
import subprocess
import sys

import pytest
import torch

from liger_cli.calibration import extent, selection
from liger_cli.calibration import meter as selection_meter
from liger_cli.calibration.choice import (
    Figures,
    Ledger,
    choose_heads,
    choose_layers,
    head_passes,
    layer_passes,
    rank_correlation,
    round_sizes,
    score,
    spacings,
)
from liger_cli.calibration.reach import measure_reach
from liger_cli.commands.convert import convert
from liger_cli.conversion.requests import Request, read_request
from liger_cli.shipped import BASE_DIR
from liger_cli.system.errors import LigerError, UsageError

BASE, NONE = Figures(0.0, 0.0, 1.0), Figures(0.4, 4.0, 0.0)


def made_up(worth: dict[frozenset, float], asked: list) -> Ledger:
    """Figures as good as the best known subset of what is kept."""

    def measure(sets):
        asked.append(list(sets))
        found = []
        for kept in sets:
            closed = max((value for part, value in worth.items() if part <= kept), default=0.0)
            found.append(Figures(0.4 * (1 - closed), 4.0 * (1 - closed), closed))
        return found

    return Ledger(measure, BASE, frozenset(), NONE)


def test_the_best_layer_and_then_the_best_beside_it():
    """Layer 1 is second best alone, but adds nothing to layer 4; layer 2 does."""
    worth = {frozenset({4}): 0.6, frozenset({1}): 0.5, frozenset({2}): 0.1, frozenset({2, 4}): 0.9}
    report = choose_layers(made_up(worth, []), list(range(6)), 2)
    assert report["chosen"] == [2, 4]
    assert [step["layer"] for step in report["greedy"]] == [4, 2]
    assert report["result"]["score"] == pytest.approx(0.9)
    assert [one["only_kept"]["score"] for one in report["layers"]] == pytest.approx([0, 0.5, 0.1, 0, 0.6, 0])
    assert [one["name"] for one in report["spacings"]] == ["every:3"]
    assert report["spacings"][0]["layers"] == [2, 5] and report["spacings"][0]["score"] == pytest.approx(0.1)


def test_the_best_head_and_then_the_best_beside_it():
    worth = {frozenset({(4, 1)}): 0.6, frozenset({(1, 0)}): 0.5, frozenset({(4, 1), (2, 0)}): 0.9}
    reaches = {(layer, head): 0.1 * layer + 0.01 * head for layer in range(6) for head in range(2)}
    asked: list = []
    report = choose_heads(made_up(worth, asked), reaches, 2)
    assert report["chosen"] == ["2:0", "4:1"]
    assert [step["heads"] for step in report["greedy"]] == [["4:1"], ["2:0"]]
    assert report["result"]["score"] == pytest.approx(0.9)
    alone = {(one["layer"], one["head"]): one["only_kept"]["score"] for one in report["heads"]}
    assert alone[4, 1] == pytest.approx(0.6) and alone[2, 0] == 0 and len(alone) == 12


def test_only_the_shortlist_is_measured():
    """Of 100 heads the 16 of the farthest reach; the rest is in the report without figures."""
    asked: list = []
    report = choose_heads(made_up({}, asked), {(layer, head): layer for layer in range(50) for head in range(2)}, 1)
    assert {unit[0] for call in asked for kept in call for unit in kept} == set(range(42, 50))
    assert sum(one["only_kept"] is not None for one in report["heads"]) == 16 and len(report["heads"]) == 100


def test_many_heads_take_few_rounds():
    assert [round_sizes(count) for count in (1, 2, 4, 6, 9)] == [[1], [1, 1], [1] * 4, [2, 2, 1, 1], [3, 2, 2, 2]]
    asked: list = []
    report = choose_heads(made_up({}, asked), {(layer, head): 1.0 for layer in range(10) for head in range(4)}, 9)
    assert len(report["chosen"]) == 9 and len(report["greedy"]) == 4
    assert sum(1 + len(call) for call in asked) + 1 <= head_passes(40, 9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_set_is_measured_twice_and_the_passes_are_foretold(count):
    for choose, foretold in (
        (lambda ledger: choose_layers(ledger, list(range(6)), count), layer_passes(6, count)),
        (lambda ledger: choose_heads(ledger, {(layer, 0): 1.0 for layer in range(6)}, count), head_passes(6, count)),
    ):
        asked: list = []
        choose(made_up({frozenset({4}): 0.6, frozenset({(4, 0)}): 0.6}, asked))
        sets = [kept for call in asked for kept in call]
        assert len(sets) == len(set(sets))
        # Each call reads the base as well; the reach of the heads takes one pass more.
        assert len(sets) + len(asked) <= foretold <= len(sets) + len(asked) + 3


def test_spacings_of_one_size():
    assert spacings(list(range(8)), 1) == {"every:5": [4], "every:6": [5], "every:7": [6], "every:8": [7]}
    assert spacings([1, 3, 5, 7], 2) == {"every:2": [3, 7]}
    assert spacings(list(range(8)), 3) == {}


def test_score():
    """Half divergence on hard tokens, half recall; recall counts only where there is a gap in it."""
    assert score(Figures(0.1, 1.0, 0.5), NONE, BASE) == pytest.approx((0.75 + 0.5) / 2)
    assert score(Figures(0.1, 1.0, None), NONE, BASE) == pytest.approx(0.75)
    assert score(Figures(0.1, 1.0, 0.0), Figures(0.4, 4.0, 0.98), BASE) == pytest.approx(0.75)
    assert score(Figures(0.1, 0.0, None), Figures(0.4, 0.0, None), Figures(0.0, 0.0, None)) == pytest.approx(0.75)


def test_probes_of_large_vocabularies_come_in_smaller_batches(plan, small):
    """The logits of the judged positions stay below half a gigabyte, whatever the vocabulary."""
    tokenizer = selection_meter.load_tokenizer(plan.checkpoint.folder, None)
    for vocab_size, sizes in ((128, [6]), (2_000_000, [4, 2]), (10**9, [1] * 6)):
        batches = selection_meter.probe_batches(tokenizer, plan, vocab_size)
        assert [len(batch.ids) for batch in batches] == sizes
        assert vocab_size == 10**9 or all(4 * batch.targets.numel() * vocab_size <= 512 << 20 for batch in batches)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 9], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 9], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None and rank_correlation([1, 2], [1, 2]) is None


def test_requests():
    assert read_request("every:4") == Request() and not read_request("3,4").measured
    assert read_request("auto:2", "auto:3") == Request(layers=2, heads=3)
    assert read_request("none", "auto:2.5%") == Request(share=0.025)
    assert read_request("4", "5:1, 0:0") == Request(named=((0, 0), (5, 1)))


@pytest.fixture
def small(monkeypatch):
    """Less data, for speed: still enough to tell the layers of the shipped base apart."""
    monkeypatch.setattr(extent, "ROWS", 2)
    monkeypatch.setattr(extent, "PROBES", 6)
    monkeypatch.setattr(extent, "DISTANCES", (2,))


@pytest.fixture
def plan(tiny_base):
    from liger_cli.checkpoint.reader import read_checkpoint
    from liger_cli.conversion.plan import make_plan

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
    meter.announce(12)
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
    meter.announce(12)
    assert "KL divergence alone" in meter.recall_note
    assert not any(batch.answers for batch in meter.batches)
    assert meter.base.recall is None and meter.measure([frozenset({1})])[0].recall is None


def test_a_base_too_short_for_any_probe(tiny_base, words, small):
    from liger_cli.checkpoint.reader import read_checkpoint
    from liger_cli.conversion.plan import make_plan

    short = make_plan(read_checkpoint(tiny_base("qwen3", max_position_embeddings=128)), {"window": 16})
    assert selection.probe_distances(short) == []
    meter = selection_meter.open_meter(short, str(words))
    meter.announce(12)
    assert "no recall probe fits" in meter.recall_note and meter.base.recall is None
    assert max(batch.ids.shape[1] for batch in meter.batches) == 128


def test_the_stand_in_nearer_to_the_base_is_taken(plan, words, small, monkeypatch):
    """Un-normalised sums are far off before training, so the window stands in; a branch that helps is used."""
    meter = selection_meter.open_meter(plan, str(words))
    better = {"window": Figures(0.4, 4.0, None), "liger": Figures(0.3, 3.0, None)}
    meter.base = Figures(0.0, 0.0, None)
    monkeypatch.setattr(meter, "_figures", lambda settings, find_hard=False: [better[mode] for _, mode in settings])
    meter.announce(12)
    assert meter.stand_in == "liger" and meter.none == better["liger"]


def test_the_reach_is_what_a_head_brings_from_beyond_the_window(plan, words, small):
    """Against the definition taken by hand for one head: full less window attention through its part of W_O."""
    meter = selection_meter.open_meter(plan, str(words))
    meter.batches = [batch for batch in meter.batches if not batch.answers]
    meter.announce(12)
    for batch in meter.batches:
        batch.hard = torch.zeros_like(batch.hard)  # the mean over all, which has no sample in it
    layer, head, seen = 2, 1, {}
    attention = meter.model.get_decoder().layers[layer].self_attn
    hooks = [
        attention.register_forward_pre_hook(lambda _, a, kw: seen.update(kw), with_kwargs=True),
        meter.model.get_decoder().layers[layer].register_forward_pre_hook(lambda _, a: seen.update(x=a[0])),
    ]
    total, tokens = 0.0, 0
    meter.apply(frozenset(range(4)), "softmax")
    with torch.inference_mode():
        for batch in meter.batches:
            meter.model(batch.ids)
            q, k, v = attention.project(seen["hidden_states"])
            q, k = attention.rotate(q, k, seen["position_embeddings"])
            scores = (q[:, 2:] @ k[:, 1:].mT) * attention.scaling  # query heads 2 and 3 read head 1
            length = scores.shape[-1]
            age = torch.arange(length)[:, None] - torch.arange(length)
            outputs = [
                scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, 1:]
                for hidden in (age < 0, (age < 0) | (age >= 16))
            ]
            beyond = (outputs[0] - outputs[1]).transpose(1, 2).flatten(2)
            added = beyond @ attention.o_proj.weight[:, 32:].T
            share = added.norm(dim=-1) / seen["x"].norm(dim=-1)
            sample = batch.judged & (torch.arange(length) % (length // 64) == 0)
            total, tokens = total + float(share[sample].sum()), tokens + int(sample.sum())
    for hook in hooks:
        hook.remove()
    reach = measure_reach(meter, frozenset({0}))
    assert set(reach) == {(one, two) for one in (1, 2, 3) for two in (0, 1)}
    # float32 norms of differences of softmax sums.
    assert reach[layer, head] == pytest.approx(total / tokens, rel=1e-3)


def test_single_heads_are_measured_as_the_converted_model_runs_them(plan, words, small, tmp_path):
    """The divergence with one head kept is that of the converted folder that keeps it."""
    from liger_cli.checkpoint.model_code import load_model

    meter = selection_meter.open_meter(plan, str(words))
    meter.announce(12)
    (figures,) = meter.measure([frozenset({(2, 1), (3, 0)})])
    convert(str(plan.checkpoint.folder), str(tmp_path / "out"), settings={"window": 16}, softmax_heads="2:1,3:0")
    model = load_model(tmp_path / "out", dtype=torch.float32).eval()
    attentions = model.get_decoder().liger_attentions()
    assert [attention.liger_spec.softmax_kv_heads for attention in attentions] == [(), (), (1,), (0,)]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in meter.batches:
            model.set_attention_mode("softmax")
            base = model(batch.ids).logits.log_softmax(-1)
            model.set_attention_mode(meter.stand_in)
            kl = selection_meter.divergence(base, model(batch.ids).logits)
            total, tokens = total + float(kl[batch.judged].sum()), tokens + int(batch.judged.sum())
    assert figures.kl == pytest.approx(total / tokens, rel=1e-4)
    assert figures.kl < meter.none.kl


def test_the_shipped_base_keeps_head_0_of_layer_4(tmp_path, small):
    """One key/value head of twelve brings recall beyond the window back, untrained; measured, not told."""
    report, plan = convert(str(BASE_DIR), str(tmp_path / "out"), softmax_heads="auto:8%")
    assert [spec.softmax_kv_heads for spec in plan.specs] == [()] * 4 + [(0,)] + [()]
    found = report["selection"]["softmax_heads"]
    assert found["chosen"] == ["4:0"] and found["result"]["recall"] >= 0.8 > 0.3 > found["references"]["none"]["recall"]
    assert max(found["heads"], key=lambda one: one["reach"])["layer"] == 4
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["liger"]["layers"][4]["softmax_kv_heads"] == [0]
    kept = json.loads((tmp_path / "out/liger.json").read_text())["selection"]
    assert kept["plots"] == ["softmax_heads.png", "softmax_heads.svg"]
    assert (tmp_path / "out/softmax_heads.png").read_bytes().startswith(b"\x89PNG")
    # One head of twelve grows with the text: a twelfth of the base's cache for each token more.
    grown = [row["state_bytes"] for row in report["memory"]], [row["kv_cache_bytes"] for row in report["memory"]]
    assert (grown[0][2] - grown[0][1]) * 12 == grown[1][2] - grown[1][1]


def test_the_shipped_base_keeps_layer_4(tmp_path, small):
    """Found by hand before this was written: of the six layers only layer 4 carries recall by itself."""
    report, plan = convert(str(BASE_DIR), str(tmp_path / "out"), softmax_layers="auto:1")
    assert [spec.kind for spec in plan.specs] == ["liger"] * 4 + ["softmax", "liger"]
    measured = report["selection"]["softmax_layers"]
    assert measured["chosen"] == [4] and measured["result"]["recall"] == 1.0
    assert measured["references"]["none"]["recall"] <= 0.2
    assert {one["name"]: one["layers"] for one in measured["spacings"]} == {
        "every:4": [3], "every:5": [4], "every:6": [5]
    }  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [layer["kind"] for layer in config["liger"]["layers"]] == ["liger"] * 4 + ["softmax", "liger"]
    kept = json.loads((tmp_path / "out/liger.json").read_text())["selection"]
    assert kept["softmax_layers"]["layers"] == measured["layers"] and kept["plots"] == [
        "softmax_layers.png",
        "softmax_layers.svg",
    ]
    assert (tmp_path / "out/softmax_layers.png").read_bytes().startswith(b"\x89PNG")
    assert "softmax layers chosen by measurement: 4;" in (tmp_path / "out/README.md").read_text()


def test_bars_on_the_terminal(capsys):
    from rich.console import Console

    from liger_cli.conversion.selection_table import print_selection

    worth = {frozenset({2}): 0.5, frozenset({(3, 1)}): 0.75}
    report = {
        "softmax_layers": choose_layers(made_up(worth, []), [0, 2, 3], 1),
        "softmax_heads": choose_heads(made_up(worth, []), {(0, 0): 0.1, (3, 1): 0.4, (0, 1): -0.2}, 1),
    }
    print_selection(report, Console(width=120))
    shown = capsys.readouterr().out
    assert "50 %" in shown and "kept" in shown and "█" in shown and "every:2: layers 2" in shown
    assert "3:1" in shown and "75 %" in shown and "auto, + 3:1" in shown


def test_dry_run_says_what_would_be_measured(tmp_path):
    """Without torch: a plan stays tensor-free."""
    code = (
        "import json, sys; from liger_cli.commands.convert import convert\n"
        "wanted = {'softmax_layers': 'auto:2', 'softmax_heads': 'auto:1', 'dry_run': True}\n"
        f"report, _ = convert({str(BASE_DIR)!r}, 'out', **wanted)\n"
        "assert 'torch' not in sys.modules; print(json.dumps(report))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert "selection" not in report
    measured = "6 layers and 8 key/value heads would be measured, at most 36 passes"
    assert any(measured in note for note in report["notes"])
    assert [layer["kind"] for layer in report["layers"]].count("softmax") == 2
    assert report["layers"][3]["softmax_kv_heads"] == [1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"softmax_layers": "auto:4"}, "leaves no layer to linearize"),
        ({"softmax_layers": "auto:0"}, "1 or more"),
        ({"softmax_layers": "auto:two"}, "whole number"),
        ({"softmax_heads": "auto:8"}, "keeps 8 heads, but only 8"),
        ({"softmax_heads": "auto:1%", "softmax_layers": "auto:4"}, "leaves no layer"),
        ({"softmax_heads": "auto:100%"}, "between 0 and 100"),
        ({"softmax_heads": "auto:x"}, "whole number or a share"),
        ({"softmax_heads": "4"}, "layers and heads such as 4:0,5:1"),
        ({"softmax_heads": "0:2"}, "key/value heads 0 to 1"),
        ({"softmax_heads": "4:0"}, "layers are 0 to 3"),
        ({"softmax_heads": "1:0", "softmax_layers": "1"}, "layer 1 is not linearized"),
        ({"softmax_heads": ",".join(f"{i}:{j}" for i in range(4) for j in range(2))}, "no head to linearize"),
        ({"calibration_data": "some.txt"}, "nothing is measured"),
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


def test_all_heads_of_a_layer_make_a_softmax_layer(tiny_base, tmp_path):
    _, plan = convert(str(tiny_base()), str(tmp_path / "out"), softmax_heads="1:0,1:1,3:1")
    assert [spec.kind for spec in plan.specs] == ["liger", "softmax", "liger", "liger"]
    assert [spec.softmax_kv_heads for spec in plan.specs] == [(), (), (), (1,)]
    assert "(layer:head) | 3:1 |\n" in (tmp_path / "out/README.md").read_text()


def test_dry_run_with_heads(liger):
    done = liger("convert", BASE_DIR, "out", "--softmax-heads", "auto:2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "12 key/value heads would be measured" in done.stdout and "softmax_kv_heads (0, 1)" not in done.stdout
    assert "5      │ softmax" in done.stdout  # the last two heads are a whole layer


def test_a_text_that_is_none(tiny_base, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(LigerError, match="no text"):
        convert(str(tiny_base()), str(tmp_path / "out"), softmax_layers="auto:1", calibration_data=str(empty))
