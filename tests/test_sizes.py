"""Sizes within a budget: the sharing out on made-up figures, planted models that need a long window in one layer, and
the command."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from liger_cli.calibration import calibrate, extent, sizes
from liger_cli.calibration import meter as selection_meter
from liger_cli.calibration.allocation import (
    ROUNDS,
    Ladder,
    allocate,
    choose_sizes,
    chosen_sizes,
    rungs_up_to,
    size_passes,
)
from liger_cli.calibration.choice import Figures, Ledger, Size
from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.commands.convert import convert
from liger_cli.commands.inspect import _lines, inspect_folder
from liger_cli.conversion.plan import make_plan
from liger_cli.conversion.selection_table import print_selection
from liger_cli.shipped import BASE_DIR
from liger_cli.system.errors import UsageError
from liger_cli.system.wording import by_layer, read_size

RUNGS = rungs_up_to((8, 16, 32), 64)
BASE = Figures(0.0, 0.0, None)


def ladder_of(layers: int, each: int = 10) -> Ladder:
    """`each` bytes for every token."""
    rungs = dict.fromkeys(range(layers), RUNGS)
    return Ladder("window", rungs, {layer: [each * tokens for tokens in RUNGS] for layer in rungs})


def made_up(loss, layers: int, uniform: int, asked: list) -> Ledger:
    """loss(tokens of every layer) is the divergence; layers that stay softmax have 64, others `uniform`."""

    def figures(kept) -> Figures:
        tokens = [64 if layer in kept else uniform for layer in range(layers)]
        for unit in kept:
            if isinstance(unit, Size):
                tokens[unit.layer] = unit.tokens
        return Figures(loss(tokens), loss(tokens), None)

    def measure(sets):
        asked.append(list(sets))
        return [figures(kept) for kept in sets]

    return Ledger(measure, BASE, frozenset(), figures(frozenset()))


def test_rungs():
    assert RUNGS == [8, 12, 16, 24, 32, 48, 64]
    assert rungs_up_to((0, 16), 10) == [0, 5, 10] and rungs_up_to((8, 16), 8) == [8]


@pytest.mark.parametrize("budget", [250, 400, 640, 1000, 1900, 5000])
def test_sharing_out_is_nearly_the_best(budget):
    """Against all 343 ways of three layers whose losses add up. A greedy choice is off by little; exchanges follow."""
    ladder = ladder_of(3)
    worth = (10.0, 1.0, 0.1)
    losses = {layer: [worth[layer] * (1 / tokens - 1 / 64) for tokens in RUNGS] for layer in range(3)}
    found = allocate(ladder, losses, budget)
    total = lambda places: sum(losses[layer][place] for layer, place in enumerate(places))  # noqa: E731
    ways = [places for places in product(range(len(RUNGS)), repeat=3) if sum(10 * RUNGS[x] for x in places) <= budget]
    assert ladder.total(found) <= budget
    assert total([found[layer] for layer in range(3)]) <= 1.2 * min(map(total, ways)) + 1e-12
    if budget == 5000:
        assert set(found.values()) == {len(RUNGS) - 1}


def test_no_layer_goes_below_the_least_where_there_is_room():
    losses = {layer: [float(layer == 0)] * 6 + [0.0] for layer in range(3)}
    assert [RUNGS[place] for place in allocate(ladder_of(3), losses, 960, 16).values()] == [64, 16, 16]
    assert ladder_of(3).total(allocate(ladder_of(3), losses, 300, 16)) <= 300


def test_the_layer_that_needs_it_gets_it():
    """Layer 1 answers only where it sees 48 tokens or more; the others need next to nothing."""
    asked: list = []
    loss = lambda tokens: 1.0 * (tokens[1] < 48) + 0.01 / tokens[0] + 0.001 / tokens[2]  # noqa: E731
    found = choose_sizes(made_up(loss, 3, 24, asked), ladder_of(3), 720, 24, frozenset(range(3)))
    assert chosen_sizes(found)[1] == 48 and found["result"]["score"] > 0.99
    assert 10 * sum(chosen_sizes(found).values()) <= 720
    assert [one["kl"] for one in found["layers"][1]["sizes"]] == pytest.approx(
        [loss([64, tokens, 64]) for tokens in (8, 16, 32)]
    )


def test_exchanges_mend_what_the_sum_of_costs_does_not_see():
    """Alone no layer costs anything, since the other does its work; together they do, and layer 0 does it better."""
    loss = lambda tokens: min(2 / tokens[0], 3 / tokens[1]) - min(2, 3) / 64  # noqa: E731
    found = choose_sizes(made_up(loss, 2, 24, []), ladder_of(2), 480, 24, frozenset(range(2)))
    assert found["result"]["kl"] <= min(one["kl"] for one in found["tries"])
    assert 1 <= len(found["rounds"]) <= ROUNDS
    scores = [max(one["score"] for one in found["tries"]), *(one["score"] for one in found["rounds"])]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)
    assert all(one["bytes"] <= 480 for one in found["tries"] + found["rounds"])


def test_nothing_better_than_the_uniform_size_is_the_uniform_size():
    """27 tokens lie between the sizes of the ladder, and every unequal pair is worse."""
    loss = lambda tokens: 0.5 * (len(set(tokens)) > 1) + 1 / min(tokens)  # noqa: E731
    found = choose_sizes(made_up(loss, 2, 27, []), ladder_of(2), 540, 27, frozenset(range(2)))
    assert chosen_sizes(found) == {0: 27, 1: 27} and found["result"]["score"] == 0


def test_no_set_is_measured_twice_and_the_passes_are_foretold():
    asked: list = []
    loss = lambda tokens: sum((layer + 1) / count for layer, count in enumerate(tokens))  # noqa: E731
    choose_sizes(made_up(loss, 5, 24, asked), ladder_of(5), 1200, 24, frozenset(range(5)))
    sets = [kept for call in asked for kept in call]
    assert len(sets) == len(set(sets))
    assert len(sets) + len(asked) <= size_passes(ladder_of(5).rungs)


def test_numbers_of_bytes():
    read = {"800000": 800000, "2MiB": 2 << 20, "1.5 kib": 1536, "512KiB": 512 << 10, "7B": 7, " 1GiB ": 1 << 30}
    assert {text: read_size(text) for text in read} == read
    assert [read_size(text) for text in ("", "2MB", "-1", "x", "1e3", "٣", "nan", "1..2MiB")] == [None] * 8


def test_values_by_layer():
    assert by_layer({0: 16, 1: 16, 2: 96, 3: 16}) == "16 (layers 0-1, 3), 96 (layer 2)"


@pytest.fixture
def small(monkeypatch):
    """Less data, for speed."""
    monkeypatch.setattr(extent, "ROWS", 3)
    monkeypatch.setattr(extent, "ROW_TOKENS", 128)
    monkeypatch.setattr(extent, "PROBES", 4)
    monkeypatch.setattr(calibrate, "ROWS", 4)
    monkeypatch.setattr(calibrate, "HELD_OUT", 2)
    monkeypatch.setattr(calibrate, "ROW_TOKENS", 128)


@pytest.fixture
def words(tmp_path):
    """A text of the tiny bases' words."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in torch.randint(4, 128, (1500,), generator=generator).tolist()))
    return path


@pytest.fixture(scope="module")
def planted(tiny_base, tmp_path_factory):
    """A base of four layers of which only layer 2's attention adds anything: no other needs to look back."""
    import shutil

    folder = tmp_path_factory.mktemp("planted") / "base"
    shutil.copytree(tiny_base(), folder)
    weights = load_file(folder / "model.safetensors")
    for layer in (0, 1, 3):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
    weights["model.layers.2.self_attn.o_proj.weight"].mul_(60)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


# Of the planted base: keys and values of 2 heads of 16 channels in float32.
TOKEN_BYTES = 2 * 2 * 16 * 4


def test_the_window_goes_to_the_layer_that_looks_back(planted, words, small, tmp_path, capsys):
    budget = 4 * 31 * TOKEN_BYTES  # 32 tokens in every layer
    settings = {"window": f"auto:{budget}", "mix": "window-only"}
    report, plan = convert(str(planted), str(tmp_path / "out"), settings=settings, calibration_data=str(words))
    found = report["selection"]["window_sizes"]
    windows = [spec.window for spec in plan.specs]
    assert found["uniform"] == 32 and windows[2] == 64 and max(windows[:2] + windows[3:]) == 16
    assert found["bytes"] == sizes.constant_bytes(plan) == report["memory"][0]["state_bytes"] <= budget
    assert found["result"]["kl"] < 0.5 * found["references"]["none"]["kl"]
    assert {one["kl"] for one in found["layers"][0]["sizes"]} == {0.0}
    # The folder: config, record, plot and card.
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert [layer["window"] for layer in config["liger"]["layers"]] == windows
    kept = json.loads((tmp_path / "out/liger.json").read_text())["selection"]
    assert kept["window_sizes"] == found and kept["plots"] == ["window_sizes.png", "window_sizes.svg"]
    assert (tmp_path / "out/window_sizes.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "out/README.md").read_text()
    assert f"| window, tokens | 16 (layers 0-1, 3), {windows[2]} (layer 2) |" in card
    assert "windows in tokens chosen by measurement" in card
    # What is told of it: a bar of the chosen sizes, and the line of `liger inspect`, whatever stands in liger.json.
    print_selection(report["selection"], Console(width=120))
    shown = capsys.readouterr().out
    assert "32 in every layer" in shown and "█" in shown and "windows by layer, in tokens" in shown
    lines = "\n".join(_lines(inspect_folder(tmp_path / "out")))
    assert f"window of each layer chosen by measurement within {budget} bytes" in lines and "layers 2: liger" in lines
    kept["window_sizes"] = {"setting": ["x"], "result": 3, "references": {"none": {"kl": "?"}}}
    manifest = json.loads((tmp_path / "out/liger.json").read_text())
    (tmp_path / "out/liger.json").write_text(json.dumps({**manifest, "selection": kept}))
    assert "an unknown number" in "\n".join(_lines(inspect_folder(tmp_path / "out")))


def test_the_cache_has_the_bytes_that_were_promised(planted, words, small, tmp_path):
    """Of the model that the folder gives, after a text longer than any window."""
    from liger_cli.benchmark.contest import cache_bytes
    from liger_cli.checkpoint.model_code import load_model

    settings = {"window": f"auto:{40 << 10}", "mix": 0.5}
    report, _ = convert(str(planted), str(tmp_path / "out"), settings=settings, calibration_data=str(words))
    model = load_model(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(torch.randint(4, 128, (1, 200)), use_cache=True).past_key_values
    assert cache_bytes(cache) == report["selection"]["window_sizes"]["bytes"] <= 40 << 10


def test_kept_tokens_go_to_the_layer_that_looks_back(planted, words, small, tmp_path):
    plain = make_plan(read_checkpoint(planted), {"window": 16, "kept": 16, "normalizer": "running"})
    budget = sizes.constant_bytes(plain)
    settings = {"window": 16, "kept": f"auto:{budget}"}
    report, plan = convert(
        str(planted), str(tmp_path / "out"), settings=settings, calibrate=True, calibration_data=str(words)
    )
    found = report["selection"]["kept_sizes"]
    assert found["uniform"] == 16 and found["bytes"] <= budget
    chosen = chosen_sizes(found)
    assert chosen[2] >= 48 and chosen[0] == chosen[1] == chosen[3] == 0
    assert found["result"]["kl"] < found["references"]["none"]["kl"]
    assert [spec.kept for spec in plan.specs] in ([chosen[layer] for layer in range(4)], [0] * 4)
    assert json.loads((tmp_path / "out/liger.json").read_text())["calibration"] == report["calibration"]


def test_sizes_are_measured_as_the_converted_model_runs_them(tiny_base, words, small, tmp_path):
    """The divergence of a set of windows is that of the folder that `--layer` makes with them."""
    from liger_cli.checkpoint.model_code import load_model

    plan = make_plan(read_checkpoint(tiny_base()), {"window": 16, "mix": 0.0})
    meter = selection_meter.open_meter(plan, str(words))
    meter.announce(12, "window")
    (figures,) = meter.measure([frozenset({Size(0, "window", 8), Size(2, "window", 48)})])
    layers = ["0:window=8", "2:window=48"]
    convert(str(tiny_base()), str(tmp_path / "out"), settings={"window": 16, "mix": 0.0, "layers": layers})
    model = load_model(tmp_path / "out", dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in meter.batches:
            model.set_attention_mode("softmax")
            base = model(batch.ids).logits.log_softmax(-1)
            model.set_attention_mode("liger")
            kl = selection_meter.divergence(base, model(batch.ids).logits)
            total, tokens = total + float(kl[batch.judged].sum()), tokens + int(batch.judged.sum())
    # float32 sums in another order.
    assert figures.kl == pytest.approx(total / tokens, rel=1e-4)
    assert figures.kl != meter.none.kl


def test_dry_run_says_what_would_be_measured(tmp_path):
    """Without torch; the uniform size of the same bytes stands in the plan: 64 tokens of bfloat16."""
    code = (
        "import json, sys; from liger_cli.commands.convert import convert\n"
        "wanted = {'settings': {'window': 'auto:189KiB', 'mix': 0.0}, 'dry_run': True}\n"
        f"report, _ = convert({str(BASE_DIR)!r}, 'out', **wanted)\n"
        "assert 'torch' not in sys.modules; print(json.dumps(report))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert {layer["window"] for layer in report["layers"]} == {64} and "selection" not in report
    assert any("30 sizes of 6 layers would be measured, at most" in note for note in report["notes"])
    assert report["memory"][0]["state_bytes"] == 189 << 10


def test_more_than_enough_is_not_measured(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(selection_meter, "open_meter", lambda *_: pytest.fail("measured"))
    report, plan = convert(str(tiny_base()), str(tmp_path / "out"), settings={"window": "auto:1GiB", "mix": 0.0})
    assert any("nothing is chosen" in note for note in report["notes"])
    assert min(spec.window for spec in plan.specs) > 512


def test_a_local_layer_gets_no_more_than_its_own_window(tiny_base):
    """And no kept tokens: it never looks farther."""
    types = ["sliding_attention", "full_attention"] * 2
    base = tiny_base("gemma3_text", sliding_window=40, layer_types=types, query_pre_attn_scalar=16)
    plan = make_plan(read_checkpoint(base), {"window": 16}, linearize_local=True)
    assert sizes._ladder(plan, "window", [0, 1, 2, 3]).rungs[0][-1] == 40
    assert sizes._layers(plan, "kept") == [1, 3]
    base = tiny_base("gemma3_text", sliding_window=12, layer_types=types, query_pre_attn_scalar=16)
    plan = make_plan(read_checkpoint(base), {"window": 16}, linearize_local=True)
    ladder = sizes._ladder(plan, "window", [0, 1, 2, 3])
    assert set(ladder.rungs) == {1, 3}
    assert ladder.total({1: 0, 3: 0}) == sizes.constant_bytes(plan)


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ({"window": "auto:1KiB", "mix": 0.0}, {}, r"below the minimum of 15360 \(15.0 KiB\): with a window of 16"),
        ({"kept": "auto:1KiB", "mix": 0.0}, {"calibrate": True}, r"below the minimum of .*with 0 kept tokens"),
        ({"window": "auto:x"}, {}, "BYTES has to be like 2MiB"),
        ({"window": "auto:"}, {}, "BYTES has to be like 2MiB"),
        ({"window": "wide"}, {}, "--window is 'wide', but has to be a whole number"),
        ({"kept": "-3"}, {}, "--kept is '-3', but has to be a whole number"),
        ({"kept": "auto:1MiB"}, {}, "add --calibrate"),
        ({"window": "auto:1MiB", "kept": "auto:1MiB"}, {"calibrate": True}, "both ask for auto"),
        ({"window": "auto:1MiB", "kept": 4}, {}, "without kept tokens"),
        ({"window": "auto:1MiB", "layers": ["1:kept=4"]}, {}, "without kept tokens"),
        ({"window": "auto:1MiB", "layers": ["1:window=4"]}, {}, "--layer sets window"),
        ({"window": "auto:1MiB"}, {"softmax_layers": "auto:1"}, "run those first"),
        ({"window": "auto:40KiB"}, {"calibration_data": "none.txt"}, "none.txt is not a file"),
    ],
)
def test_what_cannot_be_chosen(tiny_base, tmp_path, settings, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        convert(str(tiny_base()), str(tmp_path / "out"), settings=settings, **options)
    assert not (tmp_path / "out").exists()


def test_the_command(planted, words, liger):
    """A dry run of the smallest budget, then one that is a byte too small."""
    fits = 4 * 15 * TOKEN_BYTES
    arguments = ("convert", planted, "out", "--mix", "window-only", "--dry-run", "--window")
    done = liger(*arguments, f"auto:{fits}")
    assert done.returncode == 0 and "window 16, mix 0.0" in done.stdout
    done = liger(*arguments, f"auto:{fits - 1}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"minimum of {fits}" in done.stderr
