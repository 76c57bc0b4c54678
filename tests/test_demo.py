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


@pytest.mark.slow
def test_the_whole_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    demo.run(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"]["all"] <= time.monotonic() - began + 0.1
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
