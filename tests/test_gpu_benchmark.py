"""The benchmark that waits for a GPU, on a CPU and shapes of nothing: it runs, and survives what may be missing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    specification = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "measure_machine", lambda device, dtype: {"bandwidth_bytes_per_s": 1e9})
    return module


@pytest.fixture
def lines(gpu, tmp_path):
    def run(*arguments) -> list[dict]:
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out.jsonl"), *arguments])
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return run


def test_every_part(gpu, lines):
    found = lines()
    assert not any("failed" in line or "skipped" in line for line in found), found
    assert list(dict.fromkeys(line["part"] for line in found)) == list(gpu.PARTS)
    decode = [line for line in found if line["part"] == "decode" and "side" in line]
    sides = {line["side"] for line in decode}
    assert sides == {"liger gla", "liger calibrated", "softmax sdpa"} and len(decode) == 3 * 2 * 2
    for side in sides - {"softmax sdpa"}:  # a step is the same at any position
        assert (
            len({(line["launches"], line["cache_bytes"] / line["batch"]) for line in decode if line["side"] == side})
            == 1
        )
    assert all(line["bandwidth_share"] > 0 for line in decode)
    errors = [line for line in found if line["part"] == "parity" and "gate" in line]
    assert {line["gate"] for line in errors} == set(gpu.GATES)
    assert all(max(line["chunk"], line["step"]) < 1e-5 for line in errors)


def test_what_fails_or_is_late(gpu, lines, monkeypatch):
    """A part that breaks is a line, and the next one runs; what is out of time is not begun."""

    def broken(run):
        yield {"figure": 1}
        raise ImportError("libcuda.so.1 is missing")

    monkeypatch.setitem(gpu.PARTS, "lora", broken)
    found = lines("--parts", "lora,versions")
    assert {"part": "lora", "failed": "ImportError: libcuda.so.1 is missing"} in found
    assert {"part": "lora", "figure": 1} in found and any(line["part"] == "versions" for line in found)
    monkeypatch.setattr(gpu.Side, "prefill", lambda *_: (_ for _ in ()).throw(gpu.torch.OutOfMemoryError()))
    found = lines("--parts", "prefill")[len(found) :]
    assert all(line.get("skipped") == "out of memory" for line in found[:-1]) and len(found) == 3 * 2 + 1
    assert lines("--parts", "decode", "--minutes", "0")[-1] == {"part": "decode", "skipped": "out of time"}


def test_usage(gpu, capsys):
    for arguments, sentence in ((["--parts", "speed", "--device", "cpu"], "--parts has speed"), ([], "no CUDA device")):
        if gpu.torch.cuda.is_available() and not arguments:
            continue
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert sentence in capsys.readouterr().err
