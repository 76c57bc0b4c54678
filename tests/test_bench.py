"""liger bench: what is measured is what it says, the state stays constant, slow bases are shown as such."""

import csv
import io
import json
import statistics

import pytest

from liger_cli.benchmark import bench, contest
from liger_cli.benchmark.contest import Decoding, OutOfTime, Side, cache_bytes, cache_shapes, growing
from liger_cli.commands import bench as bench_command
from liger_cli.commands import convert
from liger_cli.evaluation.report import bench_notes, bench_tables
from liger_cli.evaluation.subject import open_subject
from liger_cli.system.errors import SetupError, UsageError
from liger_cli.system.memory import PeakMemory


@pytest.fixture(scope="module")
def tiny(tiny_base, tmp_path_factory):
    """A converted tiny model with one softmax layer, in a folder of its own."""
    folder = tmp_path_factory.mktemp("bench") / "tiny-liger"
    convert.convert(str(tiny_base()), str(folder), settings={"window": 8}, softmax_layers="3")
    return folder


@pytest.fixture(scope="module")
def subject(tiny):
    return open_subject(tiny)


def _side(subject, which, batch_size=1, masked=False):
    return Side(which, lambda: subject.column(which), 128, "cpu", batch_size, masked)


@pytest.fixture(scope="module")
def result(subject):
    return bench.bench(subject, seq_len=3000, new_tokens=2, repetitions=2)


def test_rows(result):
    assert [(row["which"], row["position"]) for row in result["rows"]] == [
        (which, position) for which in ("model", "base") for position in (1024, 2048, 3000)
    ]
    for row in result["rows"]:
        assert row["latency_ms"]["mean"] > 0 and row["latency_ms"]["runs"] == 2
        assert row["prefill_s"]["mean"] > 0 and 1 <= row["prefill_s"]["runs"] <= bench.MAX_PREFILLS
        assert row["prefill_tokens_per_s"] == pytest.approx(row["position"] / row["prefill_s"]["mean"])
        assert row["prefill_note"] is None and row["latency_note"] is None
        if row["peak_bytes"] is not None:
            held = row["peak_bytes_spread"]
            assert held["runs"] == row["prefill_s"]["runs"] and held["mean"] <= row["peak_bytes"]
    json.dumps(result, allow_nan=False)


def test_cache_bytes_are_the_shapes_bytes(result):
    """Base: keys and values of 4 layers, 2 heads, 16 channels, 4 bytes. Model: one such layer, three constant ones,
    each with the number of tokens."""
    per_token_and_layer = 2 * 2 * 16 * 4
    state = 3 * (2 * 16 * 16 * 4 + 8 * per_token_and_layer + 8)
    for row in result["rows"]:
        tokens = row["position"]
        if row["which"] == "base":
            assert row["cache_bytes"] == 4 * tokens * per_token_and_layer
        else:
            assert row["cache_bytes"] == state + tokens * per_token_and_layer
            assert [entry["layers"] for entry in row["cache_shapes"]] == [3, 1]
            assert row["cache_shapes"][0]["tensors"]["state_0"] == [1, 2, 16, 16, "float32"]


def test_memory_of_a_pure_model_is_constant(tiny_base, tmp_path):
    convert.convert(str(tiny_base()), str(tmp_path / "pure"), settings={"window": 8})
    side = _side(open_subject(tmp_path / "pure"), "model")
    short, long = (side.prefill(tokens, float("inf"))[1] for tokens in (64, 2500))
    assert cache_bytes(short) == cache_bytes(long) and cache_shapes(short) == cache_shapes(long)
    assert not growing(long) and long.get_seq_length() == 2500


@pytest.mark.parametrize("which", ["model", "base"])
def test_filled_cache_is_like_a_read_one(subject, which):
    side = _side(subject, which)
    read, filled = side.prefill(300, float("inf"))[1], side.filled_cache(300)
    assert cache_shapes(read) == cache_shapes(filled)
    assert read.get_seq_length() == filled.get_seq_length() == 300
    short = side.shortened(filled, 100)
    assert cache_shapes(short) == cache_shapes(side.prefill(100, float("inf"))[1])
    if which == "base":
        assert short.layers[0].keys.data_ptr() == filled.layers[0].keys.data_ptr()
    assert side.needed_bytes(300) == cache_bytes(read)


@pytest.fixture(scope="module")
def sliding(tiny_base, tmp_path_factory):
    """A base with three local layers of 200 tokens and a global one, which alone is linearized; a window of 160."""
    folder = tmp_path_factory.mktemp("bench") / "sliding-liger"
    local = ["sliding_attention"] * 3 + ["full_attention"]
    base = tiny_base("gemma3_text", sliding_window=200, layer_types=local, query_pre_attn_scalar=16)
    convert.convert(str(base), str(folder), settings={"window": 160})
    return open_subject(folder)


@pytest.mark.parametrize("which", ["model", "base"])
@pytest.mark.parametrize("tokens", [150, 180, 500])
def test_windows_longer_than_a_short_text(sliding, which, tokens):
    """Local layers and Liger's window hold what they hold after that many tokens, in every way to get there."""
    side = _side(sliding, which, batch_size=2)
    read = side.prefill(tokens, float("inf"))[1]
    filled = side.filled_cache(tokens)
    assert cache_shapes(filled) == cache_shapes(read) and filled.get_seq_length() == tokens
    assert side.needed_bytes(tokens) == cache_bytes(read)
    longer = side.filled_cache(600)
    assert cache_shapes(side.shortened(longer, tokens)) == cache_shapes(read)
    contestant = Decoding(side, tokens, filled)
    contestant.step()
    assert cache_shapes(filled) == cache_shapes(read) and filled.get_seq_length() == tokens


def test_sweep_counts_local_layers(sliding, monkeypatch):
    side = _side(sliding, "base")
    fits = 3 * 2 * side.needed_bytes(400) / bench.MEMORY_SHARE
    monkeypatch.setattr(bench, "available", lambda device: fits)
    found = bench.largest_batch(side, 400, 60.0)
    assert found["batch_size"] == 3 and "do not fit" in found["note"]


def test_softmax_heads_in_a_liger_layer(tiny_base, tmp_path):
    """The keys and values of single softmax heads grow with the text, and the caches that bench makes know it."""
    from liger_cli.templates.liger_config import LayerSpec

    if not hasattr(LayerSpec(), "softmax_kv_heads"):
        pytest.skip("no single softmax heads in this format")
    config = json.loads((tiny_base() / "config.json").read_text())
    specs = [LayerSpec(window=8, softmax_kv_heads=(1,) if index == 2 else ()).to_dict() for index in range(4)]
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "liger_qwen3", "liger": {"format": 1, "layers": specs}})
    )
    from liger_cli.benchmark.shapes import shapes_subject

    side = _side(shapes_subject(str(tmp_path / "config.json")), "model")
    read, filled = side.prefill(300, float("inf"))[1], side.filled_cache(300)
    assert cache_shapes(read) == cache_shapes(filled) and side.needed_bytes(300) == cache_bytes(read)
    assert side.needed_bytes(301) - side.needed_bytes(300) == 2 * 16 * 4
    assert len(growing(filled)) == 2


@pytest.mark.parametrize("which", ["model", "base"])
def test_a_step_leaves_the_position(subject, which):
    side = _side(subject, which)
    contestant = Decoding(side, 200, side.filled_cache(200))
    before = cache_bytes(contestant.cache)
    for _ in range(3):
        assert contestant.step() > 0
    assert cache_bytes(contestant.cache) == before
    assert growing(contestant.cache)
    assert all(getattr(layer, name).shape[2] == 200 for layer, name in growing(contestant.cache))


def test_batch(subject):
    one, four = (cache_bytes(_side(subject, "base", batch_size=n).prefill(50, float("inf"))[1]) for n in (1, 4))
    assert four == 4 * one


def test_another_model_in_the_same_race(subject, sliding):
    """Its rows stand under its own name, with its own cache; the two sides are what they are without it."""
    result = bench.bench(subject, seq_len=300, new_tokens=1, repetitions=1, beside={"other": sliding})
    rows = {row["which"]: row for row in result["rows"]}
    assert list(rows) == ["model", "base", "other"] and all(row["latency_ms"]["mean"] > 0 for row in rows.values())
    wanted = cache_bytes(_side(sliding, "model").prefill(300, float("inf"))[1])
    assert rows["other"]["cache_bytes"] == wanted != rows["model"]["cache_bytes"]
    assert rows["other"]["roofline_ms"] != rows["model"]["roofline_ms"]


@pytest.mark.parametrize("which", ["model", "base"])
def test_runs_what_generate_runs(subject, which):
    """Reading and stepping hand the model what `generate` does: positions, one position's logits, the text in one
    piece, and a mask where this release of transformers gives one."""
    import torch

    side, calls = _side(subject, which, 2, contest.mask_is_given(subject.liger_model)), []

    def note(module, args, given):
        mask, places = given.get("attention_mask"), given["position_ids"].expand(2, -1).tolist()
        calls.append((given["input_ids"].shape, None if mask is None else mask.shape, places, given["logits_to_keep"]))

    hook = subject.liger_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with side.activate() as model:
            ids = torch.randint(4, 120, (2, 20))
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2)
        generated, calls[:] = list(calls), []
        _, cache = side.prefill(20, float("inf"))
        side.step(cache, 20)
    finally:
        hook.remove()
    assert calls == generated and len(calls) == 2


def test_stops_what_takes_too_long(subject, monkeypatch):
    """Stopped and skipped runs carry their reason, no figure, and the decoding figures are there all the same."""
    with pytest.raises(OutOfTime):
        _side(subject, "base").prefill(64, limit=-1.0)
    prefill = Side.prefill

    def slow_base(self, tokens, limit):
        if self.which == "base" and tokens >= 2048:
            raise OutOfTime
        return prefill(self, tokens, limit)

    monkeypatch.setattr(Side, "prefill", slow_base)
    result = bench.bench(subject, seq_len=4096, new_tokens=1, repetitions=1, base_limit=70)
    rows = {(row["which"], row["position"]): row for row in result["rows"]}
    assert rows["base", 1024]["prefill_s"] and rows["model", 4096]["prefill_s"]
    assert rows["base", 2048]["prefill_s"] is None and rows["base", 2048]["prefill_note"] == "stopped after 70 s"
    assert rows["base", 4096]["prefill_note"].startswith("not tried")
    assert rows["base", 4096]["latency_ms"]["mean"] > 0 and rows["base", 4096]["peak_bytes"] is None
    shown = "\n".join(table.markdown() for table in bench_tables(result))
    assert "stopped after 70 s" in shown and "not tried" in shown
    assert any("base at 4096 tokens: prefill not tried" in note for note in bench_notes(result))


def test_stops_within_a_layer(subject, monkeypatch):
    """The time is looked at before every module, not only between layers."""
    reached, now = [], [0.0]
    monkeypatch.setattr(contest.time, "perf_counter", lambda: now[0])

    def slow(*_):
        reached.append("q_proj")
        now[0] += 1.1

    attention = subject.liger_model.get_decoder().layers[0].self_attn
    hooks = [
        attention.q_proj.register_forward_hook(slow),
        attention.o_proj.register_forward_hook(lambda *_: reached.append("o_proj")),
    ]
    try:
        with pytest.raises(OutOfTime):
            _side(subject, "base").prefill(64, limit=1.0)
    finally:
        for hook in hooks:
            hook.remove()
    assert reached == ["q_proj"]


def test_refuses_what_would_take_too_long(subject, monkeypatch):
    """A length whose time is bound to be over, by the last one's, is not begun, and says by what it was judged."""
    begun = []
    prefill = Side.prefill

    def slow_base(self, tokens, limit):
        if self.which == "base" and tokens >= 1024:
            begun.append(tokens)
            return 40.0, prefill(self, tokens, limit)[1]
        return prefill(self, tokens, limit)

    monkeypatch.setattr(Side, "prefill", slow_base)
    result = bench.bench(subject, seq_len=4096, new_tokens=1, repetitions=1, base_limit=70)
    rows = {(row["which"], row["position"]): row for row in result["rows"]}
    assert set(begun) == {1024}
    assert rows["base", 2048]["prefill_note"] == "not tried: 1024 tokens took 40 s, so 2048 take more than 70 s"
    assert rows["base", 4096]["prefill_s"] is None and rows["base", 4096]["prefill_note"].startswith("not tried")
    assert result["prefill_speedup"]["position"] == 1024


def test_flatness(subject, monkeypatch):
    """Ratios of interleaved medians at the longest and the shortest position, one a repetition."""
    seconds = {("model", 1024): [1, 1, 4, 2, 2, 2], ("model", 3000): [2, 2, 2, 3, 3, 9]}
    left = {}

    def step(self):
        steps = left.setdefault((self.side.which, self.position), [0, 0, *seconds[self.side.which, self.position]])
        return steps.pop(0)

    monkeypatch.setattr(Decoding, "step", step)
    side = _side(subject, "model")
    cache = side.prefill(8, float("inf"))[1]
    ready = [Decoding(side, position, cache) for position in (1024, 3000)]
    rows = {("model", position): {} for position in (1024, 3000)}
    flatness = bench._race(ready, 3, 2, 60.0, rows)
    assert flatness["model"]["from"] == 1024 and flatness["model"]["to"] == 3000
    assert flatness["model"]["ratio"] == bench.spread([2 / 1, 3 / 2])


def test_notes_say_how_flat_and_how_fast(result):
    assert result["flatness"]["model"] | {"ratio": None} == {"from": 1024, "to": 3000, "ratio": None}
    assert result["flatness"]["base"]["ratio"]["runs"] == 2
    rows = {row["which"]: row["prefill_s"]["mean"] for row in result["rows"] if row["position"] == 3000}
    assert result["prefill_speedup"] == {"position": 3000, "ratio": pytest.approx(rows["base"] / rows["model"])}
    notes = " ".join(bench_notes(result))
    assert "times as long after 3000 tokens as after 1024" in notes and "reads 3000 tokens" in notes


def test_what_does_not_fit_is_said(subject, monkeypatch):
    monkeypatch.setattr(bench, "available", lambda device: 1000)
    result = bench.bench(subject, seq_len=256, new_tokens=1, repetitions=1)
    base = next(row for row in result["rows"] if row["which"] == "base")
    assert base["latency_ms"] is None and "does not fit" in base["latency_note"]


def test_steps_are_taken_in_turn(subject, monkeypatch):
    """Every round takes one step of every contestant, so that no side meets a busy moment alone."""
    taken = []
    step = Decoding.step
    monkeypatch.setattr(Decoding, "step", lambda self: taken.append((self.side.which, self.position)) or step(self))
    bench.bench(subject, seq_len=2048, new_tokens=3, repetitions=2)
    steps = taken[-3 * 2 * 4 :]
    for first in range(0, len(steps), 4):
        assert len(set(steps[first : first + 4])) == 4


def test_peak_memory_sees_an_allocation():
    import torch

    peak = PeakMemory("cpu", weights=5)
    peak.start()
    if peak.before is None:
        pytest.skip("this system does not tell a process's peak memory")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < peak.stop() < 120 << 20
    peak.start()
    assert peak.stop() < 20 << 20


def test_spread():
    assert bench.spread([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "std": pytest.approx(statistics.stdev([1, 2, 6])),
        "median": 2.0,
        "runs": 3,
    }
    assert bench.spread([4.0])["std"] is None


@pytest.mark.parametrize(("length", "positions"), [(100, [100]), (1024, [1024]), (5000, [1024, 2048, 4096, 5000])])
def test_positions(length, positions):
    assert bench.grown_positions(length) == positions


def test_run_prints_and_keeps(tiny, capsys):
    result = bench_command.run(str(tiny), seq_len=64, new_tokens=1, repetitions=2, output_format="json")
    assert json.loads(capsys.readouterr().out) == result
    kept = json.loads((tiny / "results.json").read_text())
    assert kept["bench"]["rows"] == result["rows"]
    assert (tiny / "bench.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tiny / "bench.svg").read_text()
    assert "Speed and memory" in (tiny / "README.md").read_text()
    bench_command.run(str(tiny), seq_len=64, new_tokens=1, repetitions=1, output_format="csv", save=False)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0][0] == "tokens" and rows[1][0] == "64"


def test_what_is_refused(tiny):
    for wrong, words in (
        ({"seq_len": 0}, "--seq-len is 0"),
        ({"repetitions": 0}, "--repetitions"),
        ({"base_limit": 0}, "--base-limit"),
        ({"output_format": "x"}, "--format"),
        ({"dtype": "int4"}, "--dtype is 'int4'"),
    ):
        with pytest.raises(UsageError, match=words):
            bench_command.run(str(tiny), **wrong)


def test_roofline_counts(subject, result):
    """Bytes and operations of a step by hand, for the base after 1024 tokens."""
    from liger_cli.benchmark.roofline import limit_ms, step_cost

    row = next(row for row in result["rows"] if row["which"] == "base" and row["position"] == 1024)
    cost = step_cost(subject.model, row["cache_shapes"], batch_size=1)
    weights = [x.numel() for name, x in subject.model.named_parameters() if "embed_tokens" not in name]
    assert cost["bytes"] == 4 * sum(weights) + 4 * 2 * 1024 * 2 * 16 * 4
    assert cost["flops"] == 2 * sum(weights) + 4 * 4 * 1024 * 4 * 16
    speeds = {"bandwidth_bytes_per_s": cost["bytes"], "matmul_flops_per_s": cost["flops"] / 3}
    assert limit_ms(cost, speeds) == pytest.approx(3000)
    assert row["roofline_fraction"] == pytest.approx(row["roofline_ms"] / row["latency_ms"]["mean"])


def test_the_matrix_rate_is_that_of_the_faster_type(monkeypatch):
    """Emulated half precision is no limit: steps would seem to take less time than they can."""
    import torch

    from liger_cli.benchmark import roofline

    seconds = {torch.bfloat16: 8.0, torch.float32: 2.0}
    monkeypatch.setattr(roofline, "_best", lambda call, device: seconds[call().dtype])
    monkeypatch.setattr(roofline, "MATRIX", {"cpu": 8})
    speeds = roofline.measure_machine("cpu", torch.bfloat16)
    assert speeds == {"bandwidth_bytes_per_s": roofline.BYTES / 2, "matmul_flops_per_s": 2 * 8**3 / 2}


def test_shapes_only(tiny_base, tmp_path, monkeypatch, capsys):
    """From a config alone: the same cache as the converted model's, and nothing is written."""
    monkeypatch.setattr(bench, "SWEEP_END", 4)
    config = tmp_path / "config.json"
    config.write_text((tiny_base() / "config.json").read_text())
    result = bench_command.run(
        str(config), shapes_only=True, seq_len=128, new_tokens=1, repetitions=1, output_format="json", batch_sweep=True,
        base_limit=300,
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out) == result
    convert.convert(str(tiny_base()), str(tmp_path / "converted"))
    side = _side(open_subject(tmp_path / "converted"), "model")
    row = next(row for row in result["rows"] if row["which"] == "model")
    assert row["cache_shapes"] == cache_shapes(side.prefill(128, float("inf"))[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "converted"]
    assert {entry["which"] for entry in result["batch_sweep"]} == {"model", "base"}
    assert all(entry["batch_size"] >= 1 and entry["note"] for entry in result["batch_sweep"])
    for entry in result["batch_sweep"]:
        assert entry["latency_ms"]["runs"] == bench.SWEEP_STEPS
        assert entry["tokens_per_s"] == pytest.approx(1e3 * entry["batch_size"] / entry["latency_ms"]["mean"])
    with pytest.raises(UsageError, match="--shapes-only needs"):
        bench_command.run(shapes_only=True)
    with pytest.raises(UsageError, match="does not exist"):
        bench_command.run("no such model", shapes_only=True)


def test_shapes_that_do_not_fit_into_memory(tiny_base, tmp_path, capsys):
    """A sentence before anything is allocated: the system would end the process without one."""
    config = json.loads((tiny_base() / "config.json").read_text()) | {"vocab_size": 1 << 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match=r"its weights of [\d.]+ TiB in float32 do not fit into the"):
        bench_command.run(str(tmp_path / "config.json"), shapes_only=True)


def test_a_config_of_the_hub_without_network(liger, tmp_path):
    """Found out at once: no retries, no traceback."""
    cut_off = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "")
    ran = liger("bench", "Qwen/Qwen3-8B", "--shapes-only", env={**cut_off, **proxies})
    assert ran.returncode == 4 and not ran.stdout
    assert ran.stderr.startswith("liger: the config of Qwen/Qwen3-8B could not be had from the hub")
    assert ran.stderr.count("\n") == 1


def test_sweep_that_ends_early_says_at_least(subject, result, monkeypatch):
    monkeypatch.setattr(bench, "SWEEP_END", 4)
    found = bench.largest_batch(_side(subject, "model"), 100, 60.0)
    assert found["batch_size"] == 4 and found["at_least"] and found["note"] == "the sweep ends at 4"
    table = bench_tables({**result, "batch_sweep": [found]})[-1]
    assert table.rows[0][:2] == ["model", "at least 4"] and "±" in table.rows[0][2]


def test_plot_marks_what_was_stopped(result, tmp_path):
    """A curve that ends early has a cross where it was stopped, and says so."""
    from copy import deepcopy

    from liger_cli.evaluation.plots import bench_plot

    bench_plot(result, tmp_path)
    whole = (tmp_path / "bench.svg").read_text()
    cut = deepcopy(result)
    cut["rows"][-1] |= {"prefill_s": None, "prefill_note": "stopped after 70 s"}
    bench_plot(cut, tmp_path)
    stopped = (tmp_path / "bench.svg").read_text()
    assert "softmax base: stopped" in stopped and "softmax base: stopped" not in whole


def test_sweep_stops_at_memory(subject, monkeypatch):
    side = _side(subject, "base")
    fits = 5 * 2 * side.needed_bytes(100) / bench.MEMORY_SHARE
    monkeypatch.setattr(bench, "available", lambda device: fits)
    found = bench.largest_batch(side, 100, 60.0)
    assert found["batch_size"] == 5 and "do not fit" in found["note"] and not found["at_least"]
