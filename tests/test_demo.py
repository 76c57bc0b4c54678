"""liger demo: the folder it works in, its table, and (slow) the whole job."""

import json
import time

import pytest

from liger_cli.commands import demo
from liger_cli.system.errors import UsageError


def _column(value):
    return {
        "perplexity": value,
        "recall": {"32": 1.0, "128": 0.5},
        "latency_ms": {"1024": {"mean": value}},
        "cache_bytes": {"1024": 2048},
    }


def test_table():
    columns = {name: _column(2.0) for name in demo.TITLES} | {"window_untrained": _column(3.0)}
    del columns["converted"]["latency_ms"], columns["converted"]["cache_bytes"]
    table = demo.demo_table({"columns": columns})
    assert table.header == ["", "base", "converted", "trained", "window", "hybrid"]
    assert table.rows[2] == ["recall at 128", *["50.0 %"] * 5]
    assert table.rows[3] == ["ms/token at 1024", "2.00", "", "2.00", "2.00", "2.00"]


def test_folder_in_the_way(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        demo.run(tmp_path)
    with pytest.raises(UsageError, match="not the folder of an earlier demo"):
        demo.run(tmp_path, force=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


SAMPLE = {"prompt": "Once", "base": "a", "converted": "b", "trained": "c"}


@pytest.fixture
def quick(monkeypatch):
    """The demo's commands as names in a list; `quick.fails` ends one, as a signal would."""
    from types import SimpleNamespace

    told = SimpleNamespace(done=[], fails=None)

    def command(name, result=None):
        def run(*arguments, **options):
            if told.fails == name:
                raise KeyboardInterrupt
            told.done.append(name)
            return result

        return run

    monkeypatch.setattr(demo.convert, "convert", command("convert", {}))
    monkeypatch.setattr(demo.finetune, "run", command("finetune", {}))
    monkeypatch.setattr(demo.merge, "run", command("merge", {}))
    monkeypatch.setattr(demo, "open_subject", lambda folder: None)
    evaluated = {name: {"perplexity": 2.0, "recall": {"32": 1.0}} for name in (*demo.TITLES, "window_untrained")}
    monkeypatch.setattr(demo, "_evaluated", command("eval", {"columns": evaluated, "sample": SAMPLE}))
    speeds = {name: {"latency_ms": {"1024": {"mean": 1.0}}, "cache_bytes": {"1024": 9}} for name in ("base", "trained")}
    monkeypatch.setattr(demo, "_time", command("bench", {"columns": speeds}))
    return told


def test_a_demo_that_was_stopped_is_taken_up_again(tmp_path, quick, capsys):
    """The main model first, the hybrid last; what was done is not done again; the end names what comes next."""
    quick.fails = "merge"
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "d")
    assert quick.done == ["convert", "eval", "finetune"] and (tmp_path / "d" / "base" / "config.json").is_file()
    quick.fails = None
    report = demo.run(tmp_path / "d")
    rest = ["merge", "eval", "convert", "finetune", "merge", "eval", "bench"]
    assert quick.done == ["convert", "eval", "finetune", *rest]
    assert list(report["seconds"])[0] == "liger convert base demo-liger --calibrate --calibration-data text.jsonl"
    assert json.loads((tmp_path / "d" / "demo.json").read_text()) == report
    out, err = capsys.readouterr()
    assert err.count("(done before)") == 3
    assert "One text continued: ...Once" in out and "  converted: b" in out
    assert (
        out.strip().splitlines()[-1].startswith("Your own model: liger convert FOLDER-OR-HUB-ID, then liger finetune")
    )
    with pytest.raises(UsageError, match="exists already"):
        demo.run(tmp_path / "d")
    demo.run(tmp_path / "d", force=True)
    assert len(quick.done) == 20


@pytest.mark.slow
def test_the_whole_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    demo.run(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"]["all"] <= time.monotonic() - began + 1
    columns = report["columns"]
    home = tmp_path / "liger-demo"
    assert (tmp_path / report["plot"]).is_file() and json.loads((home / "demo.json").read_text()) == report
    assert (
        columns["trained"]["perplexity"]
        < columns["converted"]["perplexity"]
        < columns["window_untrained"]["perplexity"]
    )
    assert min(columns["base"]["recall"].values()) > 0.9
    assert min(columns["hybrid"]["recall"].values()) > 0.8 > columns["window"]["recall"]["256"]
    caches = columns["trained"]["cache_bytes"]
    assert len(set(caches.values())) == 1 and len(set(columns["base"]["cache_bytes"].values())) == len(caches)
    with pytest.raises(UsageError, match="exists already"):
        demo.run()
