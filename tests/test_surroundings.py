"""Machines as they are: locales, paths, terminals, homes and caches that cannot be written, no network, two at once."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_convert import BLOCKER, digest

from liger_cli.commands import convert
from liger_cli.system.manifest import read_manifest

NAMES = (
    "a folder with blanks",
    "Modell-Größe",
    "模型",
    "модель 'q' \"d\"",
    "emoji-🦁",
    "$(touch x);&|",
    "-dash",
    "%s{0}",
)
ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
SMALL = ("--seq-len", "48", "--batch-size", "4", "--micro-batch-size", "2", "--held-out", "4", "--max-steps", "2")


@pytest.fixture
def run(tmp_path):
    """run(*arguments, **environment): the command line in a process of its own with nothing on standard input."""

    def call(*arguments, env=None, cwd=None):
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TERM", "NO_COLOR")}
        return subprocess.run(
            [sys.executable, "-m", "liger_cli", *map(str, arguments)],
            cwd=cwd or tmp_path,
            env={**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=600,
        )

    return call


def text_of(done, code: int = 0) -> str:
    """Standard output; there must not be a traceback."""
    err = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in err and "unexpected" not in err, err
    assert done.returncode == code, err
    return done.stdout.decode("utf-8", "replace")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders(sparse_base, run, tmp_path, name):
    base = sparse_base(name)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    out = tmp_path / f"{name}-out"
    for environment in ({}, ASCII):
        report = json.loads(text_of(run("convert", base, out, "--json", "--force", env=environment)))
        assert report["output"] == str(out)
        assert read_manifest(out)["base"]["path"] == str(base)
    again = run("convert", base, out, env=ASCII)
    assert again.returncode == 2 and f"{out} exists already" in again.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}-out"])


def test_a_name_that_is_no_unicode(sparse_base, run, tmp_path):
    """Linux has names of any bytes: such a folder is converted, or refused in a sentence that leaves nothing."""
    base = sparse_base("base")
    strange = Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/odd-\xff\xfe"))
    base.rename(strange)
    for environment in ({}, ASCII):
        done = run("convert", strange, tmp_path / "out", env=environment)
        assert b"Traceback" not in done.stderr and b"unexpected" not in done.stderr, done.stderr
        assert done.returncode in (0, 1, 2, 3)
        if done.returncode:
            assert done.stderr.count(b"\n") == 1 and not (tmp_path / "out").exists()
        else:
            assert read_manifest(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")


LISTS = [("families",), ("gates",), ("recipes", "paper"), ("--help",), ("convert", "--help"), ("eval", "--help")]


@pytest.mark.parametrize("command", LISTS, ids=" ".join)
def test_lists_and_help_in_a_c_locale(run, command):
    done = run(*command, env=ASCII)
    assert text_of(done).strip() and b"\x1b" not in done.stdout
    done = run(*command, env={**ASCII, "PYTHONIOENCODING": "ascii"})
    assert text_of(done).strip() and done.stdout.isascii()


@pytest.mark.parametrize("command", [one for one in LISTS if "paper" not in one], ids=" ".join)
def test_lists_and_help_on_a_narrow_terminal(run, command):
    out = text_of(run(*command, env={"COLUMNS": "40"}))
    assert max(map(len, out.splitlines())) <= 40
    assert "--help" in command or "…" not in out  # nothing is cut


@pytest.mark.parametrize("settings", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"LC_ALL": "xx_YY"}, {"LANG": ""}])
def test_odd_settings(run, settings):
    done = run("families", env=settings)
    assert "qwen3" in text_of(done) and b"\x1b" not in done.stdout


def test_the_plan_on_a_narrow_terminal(sparse_base, run, tmp_path):
    base = sparse_base("a-base-with-a-rather-long-name-for-a-terminal")
    for settings in ({"COLUMNS": "40"}, {"COLUMNS": "40", **ASCII}, {"COLUMNS": "1"}, {"COLUMNS": "0"}):
        out = text_of(run("convert", base, "--dry-run", env=settings))
        assert "gla" in out or settings["COLUMNS"] == "1"
        assert "-liger-gla was not written" in out  # paths are kept whole, to be copied
        assert "…" not in out or settings["COLUMNS"] == "1"
        assert settings["COLUMNS"] != "40" or re.search(r"parameters: [\d,]{5,}\n", out)


def terminal(command: list[str], cwd: Path, **environment) -> bytes:
    """What a command shows on a terminal."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    shown, deadline = b"", time.monotonic() + 600
    while time.monotonic() < deadline:
        if not select.select([parent], [], [], 1)[0]:
            continue
        try:
            block = os.read(parent, 65536)
        except OSError:
            break
        if not block:
            break
        shown += block
    os.close(parent)
    assert process.wait(timeout=600) == 0, shown
    return shown


def test_colours_only_where_they_are_wanted(sparse_base, tmp_path):
    line = [sys.executable, "-m", "liger_cli", "convert", str(sparse_base("base")), "--dry-run"]
    plain = {"COLUMNS": "100", "TERM": "xterm-256color"}
    coloured = re.compile(rb"\x1b\[[\d;]*[1-9]\d*m")
    shown = terminal(line, tmp_path, **plain)
    assert b"gla" in shown and coloured.search(shown)
    shown = terminal(line, tmp_path, **plain, NO_COLOR="1")
    assert not re.search(rb"\x1b\[(3|4|9|10)\d[;\d]*m", shown)
    shown = terminal(line, tmp_path, COLUMNS="100", TERM="dumb")
    assert b"gla" in shown and b"\x1b" not in shown


def closed(folder: Path) -> list[str]:
    """A home that cannot be written to, whoever asks: a path below a plain file."""
    (folder / "file").write_text("")
    return str(folder / "file" / "home")


@pytest.mark.slow
@pytest.mark.parametrize("surroundings", ["ascii", "home"])
def test_the_whole_job(tiny_base, run, tmp_path, surroundings):
    """Convert, tune, merge, evaluate, time in a folder with blanks and umlauts, in a C locale or without a home."""
    here = tmp_path / "mein Ordner für 模型"
    here.mkdir()
    home = closed(tmp_path)
    settings = {
        "ascii": ASCII,
        "home": {"HOME": home, "HF_HOME": home, "XDG_CACHE_HOME": home, "MPLCONFIGDIR": home, "TORCH_HOME": home},
    }[surroundings]
    shutil.copytree(tiny_base(), here / "bäse")
    before = digest(here / "bäse")
    (here / "tèxt.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(["w5", "w6", "w7"] * 10)}) + "\n" for _ in range(40))
    )
    for line in (
        ("convert", "bäse", "gemäß", "--window", "8"),
        ("finetune", "gemäß", "--data", "tèxt.jsonl", *SMALL),
        ("merge",),
        ("eval", "--perplexity", "tèxt.jsonl", "--seq-len", "32", "--samples", "1"),
        ("bench", "--seq-len", "32", "--repetitions", "1", "--new-tokens", "1"),
    ):
        text_of(run(*line, env=settings, cwd=here))
    assert (here / "gemäß-lora-merged" / "results.json").exists() or (here / "gemäß-merged" / "results.json").exists()
    assert digest(here / "bäse") == before


@pytest.mark.slow
def test_a_home_that_cannot_be_written_to(tiny_base, run, tmp_path):
    home = closed(tmp_path)
    convert.convert(str(tiny_base()), str(tmp_path / "out"), settings={"window": 8})
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8 " * 40)
    settings = {"HOME": home, "HF_HOME": home, "XDG_CACHE_HOME": home}
    arguments = ("eval", "out", "--perplexity", "text.txt", "--seq-len", "16", "--format", "json")
    assert json.loads(text_of(run(*arguments, env=settings)))["perplexity"]["model"]["token"] > 0


def test_no_network(run, tmp_path):
    """A proxy that refuses: neither a cached model nor the hub; one sentence, exit code 4, soon."""
    nowhere = "http://127.0.0.1:9"
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": nowhere,
                "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "ALL_PROXY": nowhere}  # fmt: skip
    began = time.monotonic()
    done = run("convert", "nobody/no-such-model", env=settings)
    text_of(done, 4)
    assert done.stderr.count(b"\n") == 1 and b"network" in done.stderr
    assert time.monotonic() - began < 300  # against retries; the rest is imports on a busy machine


def test_standard_streams_that_are_closed(sparse_base, tmp_path):
    base = sparse_base("base")
    for redirect in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        line = f'"{sys.executable}" -m liger_cli convert base out {redirect}'
        done = subprocess.run(["sh", "-c", line], cwd=base.parent, capture_output=True, text=True, timeout=600)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0, (redirect, done.stderr)
        assert read_manifest(tmp_path / "out")


def test_a_reader_that_leaves(run, tmp_path):
    line = f'"{sys.executable}" -m liger_cli families | true'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""


LOAD = BLOCKER + (
    "import torch\n"
    "from pathlib import Path\n"
    "import time\n"
    "from transformers import AutoModelForCausalLM\n"
    "import transformers.dynamic_module_utils\n"
    "Path(sys.argv[2]).touch()\n"
    "while len(list(Path(sys.argv[2]).parent.glob('ready-*'))) < 2: time.sleep(0.001)\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "assert type(model).__name__ == 'LigerQwen3ForCausalLM'\n"
    "print(model(torch.arange(4, 20)[None]).logits.double().sum().item())\n"
)


@pytest.mark.parametrize("cache", ["empty", pytest.param("other", marks=pytest.mark.slow)])
def test_processes_that_load_one_folders_code_at_once(tiny_base, tmp_path, cache):
    """transformers copies a folder's code into a cache; two processes do that at once, into an empty one or one
    that holds another version of the same files."""
    convert.convert(str(tiny_base()), str(tmp_path / "out"), settings={"window": 8})
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(index: int, ready: Path):
        command = [sys.executable, "-I", "-c", LOAD, str(tmp_path / "out"), str(ready / f"ready-{index}")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    rounds = 1 if cache == "empty" else 4
    for number in range(rounds):
        ready = tmp_path / f"ready{number}"
        ready.mkdir()
        if number:
            with open(tmp_path / "out" / "liger_gates.py", "a") as file:
                file.write(f"\nVERSION = {number}\n")
        processes = [start(index, ready) for index in range(2)]
        ends = [process.communicate(timeout=600) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], [end[1][-2000:] for end in ends]
        assert len({end[0] for end in ends}) == 1
