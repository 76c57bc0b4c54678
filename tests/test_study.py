"""The study: its rows, the runner that goes on where it was killed, the table made of result files."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.commands import finetune
from liger_cli.conversion.plan import make_plan
from liger_cli.conversion.plan_edits import constant_bytes
from liger_cli.shipped import BASE_DIR
from liger_cli.system.errors import UsageError
from liger_cli.training.recipes import load_recipe, recipe_names
from study import report, runner
from study.__main__ import main
from study.rows import (
    DOCUMENTS,
    FIRST,
    INSTRUCTIONS,
    RATED,
    RATES,
    TRAINED,
    WINDOW_ONLY,
    Effort,
    Unit,
    parse_tokens,
    planned,
    show_tokens,
)
from study.subjects import study_base
from study.summary import best_rates, summary
from study.unit import calibration_data, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model of two layers with the shipped base's tokenizer: FOLDER@TEXT."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("study") / "tiny"
    shutil.copytree(BASE_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(BASE_DIR)
    for name, value in (("hidden_size", 32), ("intermediate_size", 32), ("num_hidden_layers", 2), ("head_dim", 16)):
        setattr(config, name, value)
    config.layer_types = config.layer_types[:2]
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return f"{folder}@stories"


def test_rows_are_told_apart_and_have_their_controls(base):
    units = planned([study_base(base)], [1000, 5000], 2, large=20_000)
    names = [unit.name for unit in units]
    assert len(names) == len(set(names))
    rows = {unit.row.name: unit.row for unit in units}
    for unit in units:
        control = unit.row.control
        assert control is None or rows[control].column in ("window_only", "model")
        if unit.budget and control is not None:
            beside = [(x.row.name, x.budget, x.seed, x.mixture) for x in units]
            assert (control, unit.budget, unit.seed, unit.mixture) in beside, unit.name
    assert {row.recipe for row in TRAINED} - set(recipe_names()) <= {"best"}
    assert names[:3] == ["base", "window-only", "window-only-sinks4"]
    assert {"layer-0", "layer-1", "layers-every2"} <= set(names)
    assert {unit.mixture for unit in units} == {DOCUMENTS, INSTRUCTIONS}
    assert max(unit.budget for unit in units) == 20_000


def test_seeds_of_untrained_rows(base, tmp_path):
    """What a conversion measures is repeated with another text; what it does not measure has one result."""
    tiny = study_base(base)
    untrained = {(unit.row.name, unit.seed) for unit in planned([tiny], [1000], 2) if not unit.budget}
    assert all(row.needs_data for row in FIRST if (row.name, 1) in untrained)
    assert {("calibrated", 0), ("calibrated", 1), ("heads-auto1", 1), ("calibrated-kept-auto", 1)} <= untrained
    assert ("window-only", 1) not in untrained and ("gla", 1) not in untrained
    texts = [Path(calibration_data(tmp_path, tiny, seed)[1]).read_text() for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_controls_differ_by_the_window_alone():
    """Recipe by recipe: what is trained identically is the same recipe but for the branch that is off."""
    rows = {row.name: row for row in TRAINED}
    assert rows["window-only-kl"].changes == {**rows["kl"].changes, "attention": "window"}
    assert rows["window-only-kl"].recipe == rows["kl"].recipe and rows["window-only-kl"].convert == ()


def test_published_methods_are_compared_fairly(base):
    """The same sinks in every row that can have some, a window of equal bytes beside each method, other rates than the
    published ones; each with a control."""
    found = study_base(base)
    units = planned([found], [1000], 1, sinks=4)
    rows = {unit.row.name: unit.row for unit in units}
    without = {name for name, row in rows.items() if row.convert[-2:] != ("--sinks", "4")}
    assert without == {"base", "supra", *(f"supra-lr{factor:g}x" for factor in RATES)}
    checkpoint = read_checkpoint(found.folder)
    for name, model in (("gla", {"sinks": 4}), ("lolcats", load_recipe("lolcats").model | {"sinks": 4}),
                        ("supra", load_recipe("supra").model)):  # fmt: skip
        trained = rows[f"window-only-as-{name}-trained"]
        assert trained.recipe == "window-only" and rows[f"window-only-as-{name}"].convert[2:] == trained.convert
        window = int(trained.convert[1])
        wanted = constant_bytes(make_plan(checkpoint, model))
        sizes = [
            constant_bytes(make_plan(checkpoint, {"window": window + more, "mix": 0.0, "sinks": 4})) for more in (0, 1)
        ]
        assert sizes[0] <= wanted < sizes[1] or window == 1, name
    for name in RATED:
        published = load_recipe(rows[name].recipe).stages
        for factor in RATES:
            other = rows[f"{name}-lr{factor:g}x"]
            assert other.convert == rows[name].convert and other.control == rows[name].control
            rates = [stage["lr"] for stage in other.changes["stages"]]
            assert rates == pytest.approx([factor * stage.lr for stage in published])


def test_the_best_rate_is_chosen_by_the_held_out_loss():
    """On each base by itself, not by the table's own figures; nothing where no other rate was tried."""
    tried = [("lolcats", 0.3, 9.0, "b"), ("lolcats-lr3x", 0.4, 8.0, "b"), ("lolcats-lr10x", 0.2, 9.5, "b"),
             ("lolcats", 0.5, 7.0, "c"), ("lolcats-lr3x", 0.6, 7.5, "c"), ("supra", 0.9, 5.0, "b")]  # fmt: skip
    results = [
        {
            **_result(name, kl, budget=1000),
            "base": where,
            "group": "rates" if "-lr" in name else "trained",
            "training": {"parameters": 1, "tokens": 1000, "minutes": 1.0, "held_out_perplexity": held_out},
        }
        for name, kl, held_out, where in tried
    ]
    rows = best_rates(report.summarize(results))
    assert [(row["row"], row["base"], row["kl"]["mean"]) for row in rows] == [
        ("lolcats, best rate", "b", 0.4), ("lolcats, best rate", "c", 0.5),
    ]  # fmt: skip
    lines = summary(report.summarize(results)).splitlines()
    assert "| lolcats, best rate | 1k | 0.400; 50 % | 0.500; 50 % | 2 KiB |" in lines


def test_calibration_is_paid_from_the_budget(base, tmp_path, monkeypatch):
    """What a calibration has read is not trained on."""
    found, steps = study_base(base), []
    report_of = dict.fromkeys(("tokens", "steps_done", "trainable_parameters", "first_loss", "last_loss"), 1)

    def run(converted, *, recipe, **options):
        steps.append(yaml.safe_load(Path(recipe).read_text())["max_steps"])
        return report_of | {"held_out_perplexity": 2.0}

    monkeypatch.setattr(finetune, "run", run)
    row = next(row for row in TRAINED if row.name == "best")
    for read in (0, 20_480):
        train(Unit(row, found.name, 100_000), found, tmp_path / "model", tmp_path / "adapter", tmp_path, read)
    assert steps == [24, 19]


def test_the_guide_names_the_rows_commands():
    text = (Path(__file__).parents[1] / "liger_cli" / "guides" / "reproducing.md").read_text(encoding="utf-8")
    lines = text.partition("## The rows as commands")[2].partition("\n## ")[0].splitlines()
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    rows = {row.name: row for row in (*FIRST, *TRAINED)}
    for name, convert, training in told:
        row = rows[re.match(r"`([^`]+)`", name)[1]]
        assert tuple(shlex.split(convert.strip("`"))) == row.convert, name
        recipe, _, changed = training.partition(" with ")
        assert recipe.strip("`") == (row.recipe or ""), name
        beside = {} if row.recipe in (None, "window-only") else row.changes
        assert all(f"{key}: {value}" in changed for key, value in beside.items()), name
    assert len(told) == 18


def test_only(base):
    units = planned([study_base(base)], [1000], 1, ("kl",))
    assert [unit.row.name for unit in units] == ["base", "window-only", "window-only-kl", "kl"] + [
        "window-only-kl",
        "kl",
    ]
    assert {unit.row.group for unit in planned([study_base(base)], [1000], 1, ("softmax kept",))} == {
        "softmax kept",
        "control",
    }
    with pytest.raises(UsageError, match="fits no row"):
        planned([study_base(base)], [1000], 1, ("nothing",))


@pytest.mark.parametrize(("text", "tokens"), [("0.1M", 100_000), ("100k", 100_000), ("4096", 4096), ("2M", 2_000_000)])
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens == parse_tokens(show_tokens(tokens))
    with pytest.raises(UsageError, match="is no number of tokens"):
        parse_tokens(f"{text}x")


def _result(row, kl, *, seed=0, budget=0, control=None, status="done", hard=2.0, beyond=0.5, **more):
    training = {"parameters": 10, "tokens": budget, "minutes": 1.5} if budget else None
    return {
        "status": status, "base": "b", "row": row, "group": "trained" if control else "control", "control": control,
        "budget": budget, "seed": seed, "mixture": DOCUMENTS, "kl": kl, "perplexity": 2.0, "top1": 0.9,
        "hard": {"loss": hard, "base": 1.0, "window": 3.0, "tokens": 5}, "state_bytes": 2048, "commands": [],
        "recall": {"inside": {"32": 1.0, "48": 0.5}, "beyond": {"96": beyond}}, "training": training, **more,
    }  # fmt: skip


def test_table_from_results(tmp_path):
    """Gaps against the control of the same seed, and intervals over seeds, by hand."""
    results = [
        _result("base", 0.0, hard=1.0, beyond=1.0),
        _result(WINDOW_ONLY, 0.8, hard=3.0, beyond=0.0),
        _result("window-only-kl", 0.4, budget=1000, hard=2.0),
        _result("window-only-kl", 0.5, budget=1000, seed=1, hard=3.0),
        *(_result("calibrated", kl, seed=seed, control=WINDOW_ONLY) for seed, kl in enumerate((0.2, 0.4))),
        _result("kl", 0.2, budget=1000, control="window-only-kl", hard=1.5),
        _result("kl", 0.4, budget=1000, seed=1, control="window-only-kl", hard=2.5),
        {**_result("best", 0.0, budget=1000, status="missing"), "sentence": "there is no recipe 'best' yet"},
    ]
    for index, result in enumerate(results):
        path = tmp_path / "results" / "b" / f"{index}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    (tmp_path / "results" / "b" / "broken.json").write_text("{")
    files = {path.name for path in report.write(tmp_path)}
    assert files == {"b.jsonl", "table.md", "summary.md", "recovery.png", "recovery.svg"}
    shutil.rmtree(tmp_path / "results")  # the file of the base is enough
    rows = {row["row"]: row for row in report.summarize(report.load(tmp_path))}
    assert rows["kl"]["seeds"] == 2
    assert rows["kl"]["gap_kl"]["values"] == pytest.approx([0.5, 0.2])
    # Two values 0.5 and 0.2: standard error 0.15, one degree of freedom.
    assert rows["kl"]["gap_kl"]["interval"] == pytest.approx(12.706 * 0.15)
    assert rows["calibrated"]["gap_kl"]["values"] == pytest.approx([0.75, 0.5])
    assert rows["kl"]["gap_hard"]["values"] == pytest.approx([0.5, 0.25])
    assert rows["kl"]["recovery_kl"]["values"] == pytest.approx([0.75, 0.5])
    assert rows["kl"]["recall_inside"]["mean"] == 0.75
    assert rows["window-only"]["gap_kl"] is None and rows["base"]["minutes"] is None
    text = (tmp_path / "table.md").read_text()
    assert "| kl | 1k | 2 | 2.000 ± 0.000 | 0.300 ±" in text
    assert "b, best, 1k tokens, seed 0 (missing): there is no recipe 'best' yet" in text
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_summary():
    """Means with intervals where there are some, a column for each base, and single changes beside what they change."""
    results = [
        _result("base", 0.0, beyond=0.996),
        {**_result("calibrated", 0.02, control=WINDOW_ONLY), "base": "c"},
        *(_result("calibrated", kl, seed=seed, control=WINDOW_ONLY) for seed, kl in enumerate((0.2, 0.4))),
        *(_result("best", kl, budget=1000, seed=seed) for seed, kl in enumerate((0.06, 0.0602))),
        {**_result("best-rank32", 0.0512, budget=1000), "group": "variants"},
    ]
    assert summary(report.summarize(results)).splitlines() == [
        "**KL to the base; recall beyond the window; state**",
        "",
        "| row | tokens | b | c | state |",
        "|---|---:|---:|---:|---:|",
        "| base | 0 | 0.0000; 100 % | - | 2 KiB |",
        "| calibrated | 0 | 0.300 ± 1.271; 50 % | 0.0200; 50 % | 2 KiB |",
        "| best | 1k | 0.0601 ± 0.0013; 50 % | - | 2 KiB |",
        "",
        "**best and one change at a time, seed 0: KL to the base**",
        "",
        "| row | b |",
        "|---|---:|",
        "| best | 0.0600 |",
        "| best-rank32 | 0.0512 |",
    ]


def test_the_guide_shows_the_summary():
    text = (Path(__file__).parents[1] / "liger_cli" / "guides" / "figures.md").read_text(encoding="utf-8")
    kept = (Path(report.__file__).parent / "results" / "summary.md").read_text(encoding="utf-8")
    missing = [line for line in kept.splitlines() if line and line not in text]
    assert not missing and kept.count("\n| ") > 40 and kept.count("\n- ") > 10


def test_the_tables_are_those_of_the_results():
    home = Path(report.__file__).parent / "results"
    results = report.load(home)
    rows = report.summarize(results)
    assert (home / "table.md").read_text(encoding="utf-8") == report.markdown(rows, results)
    assert (home / "summary.md").read_text(encoding="utf-8") == summary(rows)


def test_a_result_answers_one_question(base):
    """Another setting, other weights or another measurement ask anew."""
    unit, effort = Unit(FIRST[3], "tiny"), {"probes": 4}
    keys = {
        runner.unit_key(unit, "a", effort),
        runner.unit_key(unit, "b", effort),
        runner.unit_key(unit, "a", {"probes": 8}),
        runner.unit_key(Unit(FIRST[4], "tiny"), "a", effort),
        runner.unit_key(Unit(FIRST[3], "tiny", seed=1), "a", effort),
    }
    assert len(keys) == 5 and runner.unit_key(unit, "a", effort) in keys


@pytest.fixture
def processes(monkeypatch):
    """Stands in for the units' processes: [(name, exit code)] of those that were started."""
    started = []
    codes = {}

    def process(unit, base, home, effort, key, log, threads, lock):
        started.append(unit.name)
        code = codes.get(unit.row.name, 0)
        log.write_text("a table\nliger: said why\n" if code else "")
        if code == 0:
            runner.result_path(home, unit).write_text(json.dumps({"key": key, "status": "done"}))
        return code

    monkeypatch.setattr(runner, "_process", process)
    return started, codes


def _run(base, home, **options):
    tiny = study_base(base)
    units = planned([tiny], [1000], 1, ("gla*", "base"))
    return runner.run(units, {"tiny": tiny}, home, {}, **options)


def test_runner_goes_on_with_what_is_left(base, processes, tmp_path):
    started, codes = processes
    codes |= {"gla-joint": runner.MISSING, "gla-running": 1, "gla": -signal.SIGKILL}
    found = _run(base, tmp_path)
    assert found["missing"] == ["tiny/gla-joint"] and found["failed"] == ["tiny/gla-running"]
    assert found["later"] == ["tiny/gla"] and not (tmp_path / "results" / "tiny" / "gla.json").exists()
    kept = json.loads((tmp_path / "results" / "tiny" / "gla-joint.json").read_text())
    assert kept["status"] == "missing" and kept["sentence"] == "said why"
    codes.clear()
    started.clear()
    again = _run(base, tmp_path, workers=2)
    assert sorted(started) == ["gla", "gla-joint", "gla-running"] and len(again["kept"]) == len(found["done"])


def test_going_on_from_an_earlier_study(base, processes, tmp_path):
    """Its results are taken over where they answer the same question; one of our own stays."""
    units = planned([study_base(base)], [], 1, ("gla*",))
    bases = {study_base(base).name: study_base(base)}
    runner.run(units, bases, tmp_path / "earlier", {"probes": 1})
    started, _ = processes
    started.clear()
    own = runner.result_path(tmp_path / "later", units[0])
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    runner.take_over(tmp_path / "earlier", tmp_path / "later")
    assert own.read_text() == "{}"
    found = runner.run(units, bases, tmp_path / "later", {"probes": 1})
    assert len(found[runner.SKIPPED]) == len(units) - 1 and len(started) == 1
    with pytest.raises(UsageError, match="holds no results of a study"):
        runner.take_over(tmp_path / "nowhere", tmp_path / "later")


def test_hours_begin_nothing_more(base, processes, tmp_path):
    started, _ = processes
    assert set(_run(base, tmp_path, hours=0)) == {"later"} and not started


def test_two_studies_share_a_folder(base, processes, tmp_path):
    started, _ = processes
    lock = tmp_path / "logs" / "tiny" / "gla.lock"
    lock.parent.mkdir(parents=True)
    with runner._locked(lock) as held:
        assert held is not None
        found = _run(base, tmp_path)
    assert found["busy"] == ["tiny/gla"] and "gla" not in started


def test_what_is_refused(tmp_path, capsys):
    for arguments, words in (
        (["--bases", "nowhere"], "no base of the study is called 'nowhere'"),
        (["--bases", f"{tmp_path}@stories"], "there is no base at"),
        (["--budgets", "lots"], "is no number of tokens"),
        (["--seeds", "0"], "--seeds is 0"),
    ):
        assert main(["--output", str(tmp_path / "out"), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_plan_computes_nothing(base, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out"), "--bases", base, "--plan"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "tiny/base" and not (tmp_path / "out").exists()


def test_measure(base, tmp_path):
    """The base column is the base, the reference marks the tokens where the window fails, figures hang together."""
    from liger_cli.commands import convert
    from liger_cli.evaluation.subject import open_subject
    from study.measure import measure, reference, text_rows

    tiny = study_base(base)
    convert.convert(str(tiny.folder), str(tmp_path / "model"), settings={"window": 4})
    effort = Effort(characters=3000, seq_len=128, probes=2, inside=(32,), beyond=(96,))
    subject = open_subject(tmp_path / "model")
    text = text_rows(subject.tokenizer, tiny.source, effort)
    losses = reference(subject, text, tmp_path / "reference.npz")
    assert {name: values.tolist() for name, values in np.load(tmp_path / "reference.npz").items()} == {
        name: values.tolist() for name, values in losses.items()
    }
    # Half the tokens made hard by hand: a random model's window changes little.
    losses["window_only"] = losses["base"] + np.tile([0.0, 1.0], len(losses["base"]))[: len(losses["base"])]
    base_figures = measure(tmp_path / "model", tiny.source, "base", effort, losses)
    assert base_figures["kl"] == pytest.approx(0, abs=1e-6) and base_figures["top1"] == 1
    assert base_figures["hard"]["tokens"] == base_figures["tokens"] // 2
    assert base_figures["hard"]["loss"] == pytest.approx(losses["base"][1::2].mean(), rel=1e-6)
    model = measure(tmp_path / "model", tiny.source, "model", effort, losses)
    window = measure(tmp_path / "model", tiny.source, "window_only", effort, losses)
    assert model["kl"] > 0 and window["kl"] > 0 and model["tokens"] == base_figures["tokens"]
    # One key/value head of 16 channels, two layers: 3 tokens of window, and a state of 16 x 16 only where there is one.
    assert window["state_bytes"] == 2 * 3 * 2 * 16 * 4
    assert model["state_bytes"] == window["state_bytes"] + 2 * 16 * 16 * 4
    assert base_figures["state_bytes"] == 2 * 1024 * 2 * 16 * 4
    assert set(model["recall"]["inside"]) == {"32"} and set(model["recall"]["beyond"]) == {"96"}


@pytest.mark.slow
def test_a_study_from_end_to_end(base, tmp_path):
    """Killed in the middle and begun again: nothing twice, the same table as without the kill."""
    options = ["--output", "study", "--bases", base, "--only", "kl", "--budgets", "4k", "--seeds", "1"]
    options += ["--large", "none", "--workers", "1", "--probes", "2", "--characters", "3000"]
    command = [sys.executable, "-m", "study", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    results = tmp_path / "study" / "results" / "tiny"
    while not (results / "base.json").exists():
        assert killed.poll() is None, killed.stderr.read().decode()
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = (results / "base.json").stat().st_mtime_ns
    before = {path.name for path in results.glob("*.json")}
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert f"kept: {len(before)}" in again.stderr and (results / "base.json").stat().st_mtime_ns == first
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert all(result["status"] == "done" for result in found.values()), again.stderr
    assert found["base"]["kl"] == pytest.approx(0, abs=1e-6)
    trained = found["kl-4k-seed0"]
    assert trained["training"]["steps"] == 1 and trained["training"]["parameters"] > 0
    assert trained["control"] == "window-only-kl" and "window-only-kl-4k-seed0" in found
    assert str(tmp_path) not in json.dumps(found)
    table = (tmp_path / "study" / "table.md").read_text()
    assert "| kl | 4k |" in table and (tmp_path / "study" / "recovery.svg").exists()
    assert not list((tmp_path / "study" / "work" / "tiny").iterdir())
