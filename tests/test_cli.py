"""The command line around the commands: help, exit codes, sentences, JSON, and which folder is taken."""

import json
import re
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from liger_cli.checkpoint.folders import resolve_model
from liger_cli.commands import convert
from liger_cli.main import app
from liger_cli.system import errors
from liger_cli.system.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.training.recipes import load_recipe

runner = CliRunner()


def test_help_is_quick(liger):
    """Processor time of the whole process, the best of four: what else runs on the machine does not count."""
    times = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = liger("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5
    assert done.returncode == 0 and "convert" in done.stdout


def test_help_imports_nothing_heavy(liger, tmp_path):
    import subprocess

    script = (
        "import sys; sys.argv = ['liger', 'convert', '--help']\n"
        "from liger_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'datasets', 'huggingface_hub', 'jinja2', 'matplotlib'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version():
    from liger_cli import __version__

    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"liger {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["convert"], ["nonsense"], ["convert", "x", "--nonsense"], ["convert", "x", "--window", "a"]]
)
def test_wrong_usage(arguments):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_exit_codes_and_sentences(liger, sparse_base, tmp_path):
    base = sparse_base()
    done = liger("convert", base, "--gate", "glaa")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"liger: --gate is 'glaa'.*\n", done.stderr)
    (base / "config.json").write_text("{}")
    done = liger("convert", base, "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"liger: model type None is not supported.*\n", done.stderr)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (LigerError("a\n b"), 1, "liger: a b\n"),
        (UsageError("u"), 2, "liger: u\n"),
        (ModelError("m"), 3, "liger: m\n"),
        (SetupError("s"), 4, "liger: s\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/x/y"), 1, "/x/y: No space left on device; free"),
        (PermissionError(13, "Permission denied", "/x"), 1, "permissions"),
        (ModuleNotFoundError("No module named 'fla'", name="fla"), 4, "'fla'"),
        (KeyError("k"), 1, "LIGER_DEBUG=1"),
    ],
)
def test_boundary(monkeypatch, error, code, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(convert, "run", fail)
    result = runner.invoke(app, ["convert", "x"])
    assert result.exit_code == code
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_debug_shows_where(monkeypatch):
    def fail(*_, **__):
        raise KeyError("k")

    monkeypatch.setattr(convert, "run", fail)
    monkeypatch.setenv("LIGER_DEBUG", "1")
    result = runner.invoke(app, ["convert", "x"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_exits_pass_through():
    with pytest.raises(typer.Exit):
        errors.guarded(lambda: (_ for _ in ()).throw(typer.Exit(0)), (typer.Exit,))


def test_json_is_one_object(sparse_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["convert", str(sparse_base()), "--dry-run", "--json", "--softmax-layers", "every:4"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [layer["kind"] for layer in report["layers"]] == ["liger", "liger", "liger", "softmax"]
    assert {row["tokens"] for row in report["memory"]} == {512}  # the base's context
    assert report["bytes"] == 2 * report["parameters"] > 0


def test_models_of_a_recipe(sparse_base, tmp_path, monkeypatch):
    """`convert --recipe` takes the settings that the recipe is for; what the command line says stands."""
    monkeypatch.chdir(tmp_path)
    base, layers = sparse_base(), []
    for options in ([], ["--window", "16"], ["--mix", "0.5", "--sinks", "4"]):
        result = runner.invoke(app, ["convert", str(base), "--dry-run", "--json", "--recipe", "lolcats", *options])
        assert result.exit_code == 0, result.output
        layers.append(json.loads(result.stdout)["layers"][0])
    wanted = load_recipe("lolcats").model
    assert wanted.items() <= layers[0].items() and layers[0]["sinks"] == 0
    assert layers[1] == {**layers[0], "window": 16} and layers[2] == {**layers[0], "mix": 0.5, "sinks": 4}
    for name, words in (("best", "models of any settings"), ("lolcat", "did you mean")):
        result = runner.invoke(app, ["convert", str(base), "--recipe", name])
        assert result.exit_code == 2 and words in result.output, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_plan_for_people(liger, sparse_base):
    done = liger("convert", sparse_base(), "--dry-run", "--gate", "gsa", "--softmax-layers", "every:4")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for words in ("0-2", "liger gsa", "softmax", "512", "was not written", "slots 128"):
        assert words in done.stdout, done.stdout


def folder(here, name, kind, created):
    (here / name).mkdir()
    (here / name / "liger.json").write_text(json.dumps({"kind": kind, "created": created}))


def test_the_newest_fitting_folder(tmp_path, capsys):
    for hour, (name, kind) in enumerate([("b", "converted"), ("a", "converted"), ("d", "adapter"), ("e", "converted")]):
        folder(tmp_path, name, kind, f"2026-01-01T0{hour}:00:00+00:00")
    folder(tmp_path, ".hidden", "converted", "2027-01-01T00:00:00+00:00")
    folder(tmp_path, "undated", "converted", "soon")
    (tmp_path / "other").mkdir()
    assert resolve_model(None, "finetune", tmp_path).name == "e"
    assert "e" in capsys.readouterr().err
    assert resolve_model(None, "merge", tmp_path).name == "d"
    assert resolve_model(None, "eval", tmp_path).name == "d"
    folder(tmp_path, "m", "merged", "2020-01-01T00:00:00+00:00")
    assert resolve_model(None, "bench", tmp_path).name == "m"
    assert resolve_model(str(tmp_path / "b"), "eval", tmp_path).name == "b"


def test_times_are_compared_as_times(tmp_path):
    folder(tmp_path, "a", "converted", "2026-01-01T12:00:00+02:00")
    folder(tmp_path, "b", "converted", "2026-01-01T11:00:00+00:00")
    assert resolve_model(None, "finetune", tmp_path).name == "b"


def test_no_or_ambiguous_model(tmp_path):
    with pytest.raises(UsageError, match="liger convert"):
        resolve_model(None, "finetune", tmp_path)
    for name in ("one", "two"):
        folder(tmp_path, name, "converted", "2026-01-01T00:00:00+00:00")
    with pytest.raises(UsageError, match=r"one.*two|two.*one"):
        resolve_model(None, "finetune", tmp_path)
    with pytest.raises(UsageError, match="nowhere"):
        resolve_model("nowhere", "finetune", tmp_path)


def test_sizes_and_near_names():
    from liger_cli.system.wording import did_you_mean, size

    assert [size(count) for count in (0, 1023, 1024, 1536, 3 << 20, 5 << 30, 2 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "3.0 MiB", "5.0 GiB", "2048.0 TiB"
    ]  # fmt: skip
    assert size(64 << 20, 0) == "64 MiB" and size(12.0) == "12 B"
    assert did_you_mean("papre", ["paper", "distill"]) == "; did you mean paper?"
    assert did_you_mean("zzz", ["paper"]) == ""


HEAVY = """
import sys
from liger_cli.main import main
try:
    main()
except SystemExit as error:
    code = error.code
found = {"torch", "transformers", "peft", "datasets", "lm_eval", "matplotlib"} & set(sys.modules)
assert not found, found
sys.exit(code)
"""
BASE, MODEL, ADAPTER, TAKEN = "BASE", "MODEL", "ADAPTER", "TAKEN"
USAGE = [
    ("convert", "nowhere/at/all"), ("convert", "model.gguf"), ("convert", BASE, TAKEN),
    ("convert", BASE, "--gate", "x"),
    ("convert", BASE, "--window", "-1"), ("convert", BASE, "--dtype", "float16"),
    ("convert", BASE, "--calibrate", "--calibration-data", "missing.txt"),
    ("finetune", "nowhere"), ("finetune", MODEL, "--data", "missing.jsonl"), ("finetune", MODEL, "--data", TAKEN),
    ("finetune", MODEL, "--data", "demo", "--output", TAKEN), ("finetune", MODEL, "--recipe", "missing"),
    ("merge", "nowhere"), ("merge", MODEL), ("merge", ADAPTER, "--output", TAKEN), ("merge", ADAPTER, "--dtype", "x"),
    ("eval", "nowhere"), ("eval", BASE), ("eval", MODEL, "--data", "missing.txt"), ("eval", MODEL, "--format", "x"),
    ("eval", MODEL, "--against", "nowhere/at/all"), ("eval", MODEL, "--dtype", "x"), ("eval", MODEL, "--seq-len", "0"),
    ("eval", MODEL, "--batch-size", "x"), ("eval", MODEL, "--recall-distances", "x"), ("eval", "--from", "nowhere"),
    ("eval", MODEL, "--tasks", "piqa", "--limit", "-1"), ("eval", MODEL, "--tasks", "piqa", "--metadata", "x"),
    ("bench", "nowhere"), ("bench", BASE), ("bench", "--shapes-only"), ("inspect", "nowhere"),
    ("bench", MODEL, "--dtype", "x"), ("bench", MODEL, "--seq-len", "0"), ("bench", MODEL, "--format", "x"),
    ("convert", BASE, "--budget", "x"), ("convert", BASE, "--softmax-heads", "99:0"), ("convert", BASE, "--link", "x"),
    ("convert", BASE, "--layer", "x"), ("convert", BASE, "--push-to-hub", "a/b/c"), ("convert", BASE, "--refresh"),
    ("convert", BASE, "--delayed", "--gate", "none", "--normalizer", "joint", "--positions", "rope", "--mix", "1"),
    ("convert", BASE, "--calibrate", "--recipe", "lolcats"), ("finetune", MODEL, "--data", ""),
    ("finetune", MODEL, "--processes", "0"),
    ("convert", BASE, "--recipe", "x"), ("merge", ADAPTER, "--link", "x"), ("recipes", "x"),
    ("finetune", MODEL, "--data", "demo", "--dtype", "x"), ("finetune", MODEL, "--data", "demo", "--report-to", "x"),
    ("finetune", MODEL, "--data", "demo", "--resume"), ("finetune", MODEL, "--data", "demo", "--lr", "-1"),
    ("finetune", MODEL, "--data", "demo", "--micro-batch-size", "3"), ("demo", TAKEN), ("demo", TAKEN, "--force"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from conftest import TINY, write_shard, write_sparse_base

    home = tmp_path_factory.mktemp("folders")
    write_sparse_base(home / BASE, "qwen3", 1, {**TINY, "max_position_embeddings": 4096})
    convert.convert(str(home / BASE), str(home / MODEL))
    (home / TAKEN).mkdir()
    (home / TAKEN / "file").touch()
    (home / ADAPTER).mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(home / MODEL)}
    (home / ADAPTER / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = [(f"{module}.lora_A.weight", (2, 64)), (f"{module}.lora_B.weight", (64, 2))]
    write_shard(home / ADAPTER / "adapter_model.safetensors", pair, "F32", 4)
    return home


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_usage_errors_come_before_anything_heavy(folders, words):
    """Exit code 2 and one sentence, before torch and the like are imported: under a second on a machine at rest."""
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, *words], cwd=folders, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("liger: ") and done.stderr.count("\n") == 1, done.stderr
