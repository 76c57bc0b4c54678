"""`liger convert`: what is written, what is left alone, what it costs, and that it is whole or not there."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QWEN3_8B, TINY

from liger_cli.checkpoint.reader import fingerprint, read_weights
from liger_cli.commands import convert as convert_module
from liger_cli.commands.convert import convert, refresh
from liger_cli.conversion import folder as folder_module
from liger_cli.system import outputs
from liger_cli.system.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.system.manifest import read_manifest

BLOCKER = """
import sys
class Without:
    '''A finder that does not see liger and the packages a converted folder has to do without.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = ("liger_cli", "liger", "fla", "triton", "flash_attn")
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_writes_a_whole_folder_and_leaves_the_base_alone(tiny_base, here):
    base = tiny_base("qwen3")
    before = digest(base)
    report, _ = convert(str(base))
    assert digest(base) == before
    folder = here / "tiny-liger-gla"
    assert report["output"] == "tiny-liger-gla"
    assert entries(here) == {"tiny-liger-gla"}
    config, original = (json.loads((place / "config.json").read_text()) for place in (folder, base))
    replaced = {"architectures", "model_type", "auto_map", "liger"}
    assert {key: value for key, value in config.items() if key not in replaced} == {
        key: value for key, value in original.items() if key not in replaced
    }
    assert config["architectures"] == ["LigerQwen3ForCausalLM"]
    assert config["model_type"] == "liger_qwen3"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_liger_qwen3.LigerQwen3ForCausalLM"
    assert [layer["kind"] for layer in config["liger"]["layers"]] == ["liger"] * 4
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    for name in kept:
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert os.path.samefile(folder / "model.safetensors", base / "model.safetensors") or report["link"] != "hard"
    assert not os.path.samefile(folder / "tokenizer_config.json", base / "tokenizer_config.json")
    manifest = read_manifest(folder)
    assert manifest["kind"] == "converted"
    assert manifest["base"]["path"] == str(base.resolve())
    assert manifest["fingerprint"]["digest"].startswith("sha256:")
    assert manifest["fingerprint"] == fingerprint(read_weights(folder)) == fingerprint(read_weights(base))
    assert manifest["versions"]["transformers"]
    assert manifest["settings"]["layers"] == config["liger"]["layers"]


def test_only_listed_files_come_along(sparse_base, here):
    base = sparse_base()
    for name in ("modeling_evil.py", "weights.bin", "optimizer.pt", "consolidated.safetensors", "x.pkl", "run.sh"):
        (base / name).write_text("raise SystemExit('ran code of the base')")
    for name in ("NOTICE", "LICENSE.md", "license.py", "tokenizer.model", "vocab.json", "merges.txt"):
        (base / name).write_text("text")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": "evil.Evil"}
    (base / "config.json").write_text(json.dumps(config))
    convert(str(base), "out")
    made = {name for name in entries(here / "out") if not name.endswith(".py")}
    assert made == {
        "config.json", "liger.json", "README.md", "model.safetensors",
        "NOTICE", "LICENSE.md", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
    }  # fmt: skip
    assert not {"modeling_evil.py", "license.py"} & entries(here / "out")
    assert "evil" not in (here / "out" / "config.json").read_text()


def test_a_base_cannot_overwrite_what_liger_writes(sparse_base, here):
    base = sparse_base()
    (base / "liger.json").write_text('{"kind": "evil"}')
    convert(str(base), "out")
    assert read_manifest(here / "out")["kind"] == "converted"


def kinds(plan):
    return [spec.kind for spec in plan.specs]


@pytest.mark.parametrize(
    ("text", "softmax"),
    [("none", []), ("every:4", [3]), ("every:2", [1, 3]), ("every:8", []), ("0,2", [0, 2]), (" 3 , 3", [3])],
)
def test_softmax_layers(sparse_base, here, text, softmax):
    _, plan = convert(str(sparse_base()), softmax_layers=text, dry_run=True)
    assert [index for index, kind in enumerate(kinds(plan)) if kind == "softmax"] == softmax


@pytest.mark.parametrize(
    "text", ["", "every:", "every:0", "every:1", "every:-1", "every:x", "4", "-1", "1,,2", "1.5", "²"]
)
def test_softmax_layers_refused(sparse_base, here, text):
    with pytest.raises(UsageError, match="--softmax-layers"):
        convert(str(sparse_base()), softmax_layers=text, dry_run=True)


def test_no_layer_left(sparse_base, here):
    with pytest.raises(UsageError, match="no layer"):
        convert(str(sparse_base()), softmax_layers="0,1,2,3", dry_run=True)


def mixed(sparse_base):
    types = ["sliding_attention", "full_attention"] * 4
    config = {**TINY, "num_hidden_layers": 8, "layer_types": types, "sliding_window": 8, "use_sliding_window": True}
    return str(sparse_base("mixed", config=config))


def test_local_layers_of_a_mixed_base_stay(sparse_base, here):
    base = mixed(sparse_base)
    report, plan = convert(base, softmax_layers="every:2", dry_run=True)
    assert kinds(plan) == ["base", "liger", "base", "softmax"] * 2
    assert "--linearize-local" in report["notes"][0]
    assert kinds(convert(base, linearize_local=True, dry_run=True)[1]) == ["liger"] * 8
    with pytest.raises(UsageError, match="local"):
        convert(base, softmax_layers="0", dry_run=True)


def test_a_base_of_local_layers_is_linearized_as_a_whole(sparse_base, here):
    base = sparse_base(
        model_type="mistral", config={**TINY, "sliding_window": 4096, "max_position_embeddings": 128 << 10}
    )
    report, plan = convert(str(base), dry_run=True)
    assert kinds(plan) == ["liger"] * 4
    assert "4096" in report["notes"][0]
    cache = {row["tokens"]: row["kv_cache_bytes"] for row in report["memory"]}
    assert cache[32 << 10] == cache[128 << 10] == 4 * 4095 * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    "types", [["full_attention"] * 3, ["full_attention"] * 3 + ["linear_attention"], "full", [1, 2, 3, 4]]
)
def test_layer_types_that_contradict(sparse_base, here, types):
    with pytest.raises(LigerError, match="layer_types"):
        convert(str(sparse_base(config={**TINY, "layer_types": types})), dry_run=True)


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"gate": "glaa"}, "--gate"),
        ({"window": -1}, "--window"),
        ({"window": 0, "mix": 0.0}, "--mix"),
        ({"mix": 1.5}, "--mix"),
        ({"mix": float("nan")}, "--mix"),
        ({"sinks": -1}, "--sinks"),
        ({"normalizer": "x"}, "--normalizer"),
        ({"feature_map": "x"}, "--feature-map"),
        ({"gate_source": "x"}, "--gate-source"),
        ({"gate_normalizer": 0.0}, "--gate-normalizer"),
        ({"gate_normalizer": float("inf")}, "--gate-normalizer"),
        ({"slots": 0}, "--slots"),
    ],
)
def test_values_refused(sparse_base, here, settings, option):
    with pytest.raises(UsageError, match=f"^{option} "):
        convert(str(sparse_base()), settings=settings)
    assert entries(here) == set()


def test_memory_is_what_the_state_takes(sparse_base, here):
    base = str(sparse_base())
    report, _ = convert(base, settings={"window": 8, "sinks": 2}, softmax_layers="3", dry_run=True)
    state, token = 16 * 16 * 2 * 4, 2 * 2 * 16 * 2
    for row in report["memory"]:
        assert row["kv_cache_bytes"] == 4 * row["tokens"] * token
        assert row["state_bytes"] == 3 * (state + (8 + 2) * token + 8) + row["tokens"] * token
    normalized, _ = convert(base, settings={"window": 0, "normalizer": "running"}, dry_run=True)
    assert normalized["memory"][0]["state_bytes"] == 4 * (16 * 17 * 2 * 4 + 8)
    slots, _ = convert(base, settings={"window": 0, "gate": "gsa", "slots": 4}, dry_run=True)
    assert slots["memory"][0]["state_bytes"] == 4 * (2 * 16 * 4 * 2 * 4 + 8)


def test_dry_run_writes_nothing_and_sees_the_output(sparse_base, here):
    base = str(sparse_base())
    convert(base, "out", dry_run=True)
    assert entries(here) == set()
    (here / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        convert(base, "out", dry_run=True)


def test_existing_output(sparse_base, here):
    base = str(sparse_base())
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError):
            convert(base, "mine", force=force)
    assert (here / "mine" / "thesis.tex").read_text() == "years of work"
    convert(base, "out")
    (here / "out" / "old").write_text("")
    with pytest.raises(UsageError, match="--force"):
        convert(base, "out")
    assert (here / "out" / "old").exists()
    convert(base, "out", settings={"gate": "gdn"}, force=True)
    assert not (here / "out" / "old").exists()
    assert json.loads((here / "out" / "config.json").read_text())["liger"]["layers"][0]["gate"] == "gdn"
    (here / "link").symlink_to(here / "out")
    with pytest.raises(UsageError):
        convert(base, "link", force=True)
    assert entries(here) == {"mine", "out", "link"}


def test_force_replaces_all_or_nothing(sparse_base, here):
    base = str(sparse_base())
    convert(base, "out")
    convert(base, "out", settings={"gate": "gdn"}, force=True)
    assert json.loads((here / "out" / "config.json").read_text())["liger"]["layers"][0]["gate"] == "gdn"
    assert entries(here) == {"out"}


def test_a_failed_replacement_keeps_the_old_one(sparse_base, here, monkeypatch):
    base = str(sparse_base())
    convert(base, "out")
    before = digest(here / "out")
    monkeypatch.setattr(
        folder_module, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError):
        convert(base, "out", settings={"gate": "gdn"}, force=True)
    assert digest(here / "out") == before
    assert entries(here) == {"out"}


def test_output_and_base_may_not_overlap(sparse_base, here):
    base = sparse_base()
    inner = base / "x" / "y"
    for output in (base, inner, base.parent, base / ".." / "base"):
        with pytest.raises(UsageError):
            convert(str(base), str(output), force=True)
    assert not inner.parent.exists()


def test_read_only_base(sparse_base, here):
    base = sparse_base(shards=2)
    before = digest(base)
    for path in (*base.iterdir(), base):
        path.chmod(0o555 if path.is_dir() else 0o444)
    convert(str(base), "out")
    assert digest(base) == before
    base.chmod(0o755)


@pytest.mark.parametrize("link", ["auto", "hard", "copy"])
def test_links(sparse_base, here, link):
    base = sparse_base(shards=2)
    report, _ = convert(str(base), "out", link=link)
    assert report["link"] == read_manifest(here / "out")["settings"]["link"]
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (here / "out" / name).read_bytes() == (base / name).read_bytes()
        assert os.path.samefile(here / "out" / name, base / name) == (report["link"] == "hard")
    if link != "auto":
        assert report["link"] == link


def test_across_file_systems(sparse_base, here, monkeypatch):
    def cross_device(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(outputs.os, "link", cross_device)
    base = str(sparse_base())
    with pytest.raises(LigerError, match="hard-linked") as caught:
        convert(base, "out", link="hard")
    assert caught.value.exit_code == 1
    assert entries(here) == set()
    assert convert(base, "out")[0]["link"] in ("copy", "reflink")


def test_links_of_the_hub_cache_become_real_files(sparse_base, here, tmp_path):
    from test_checkpoint import hub_cache

    snapshot = hub_cache(sparse_base(), tmp_path / "hub")
    report, _ = convert(str(snapshot))
    assert report["output"] == "Qwen3-8B-liger-gla"
    assert report["base"]["name"] == "Qwen/Qwen3-8B"
    assert report["base"]["revision"] == "abc123"
    assert not (here / report["output"] / "model.safetensors").is_symlink()
    assert 'base_model: "Qwen/Qwen3-8B"' in (here / report["output"] / "README.md").read_text()


def test_from_the_hub(sparse_base, here, tmp_path, monkeypatch):
    import huggingface_hub
    from test_checkpoint import hub_cache

    snapshot, asked = hub_cache(sparse_base(shards=2), tmp_path / "hub"), []

    def download(hub_id, revision, allow_patterns):
        asked.append((hub_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    report, _ = convert("Qwen/Qwen3-8B", revision="main")
    assert report["base"]["revision"] == "abc123"
    assert [call[:2] for call in asked] == [("Qwen/Qwen3-8B", "main")] * 2
    assert not any("safetensors" in pattern for pattern in asked[0][2] if not pattern.endswith(".json"))
    assert "model-00002-of-00002.safetensors" in asked[1][2]


def test_no_network(here, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known\nlong traceback")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(SetupError, match="Name or service not known") as caught:
        convert("Qwen/Qwen3-8B")
    assert caught.value.exit_code == 4
    with pytest.raises(UsageError, match="does not exist"):
        convert("./Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    "name", ['x"\nlicense: evil\n---\n', "a: b # c", "{{ 6 * 111 }}", "`code` <script>", "&anchor *x"]
)
def test_hostile_names_stay_text(sparse_base, here, name):
    import yaml

    base = sparse_base(name.replace("/", "_"))
    (base / "README.md").write_text('---\nlicense: mit\nlicense_name: "x}}{{6*111}}"\n---\n')
    convert(str(base), "out")
    text = (here / "out" / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(front)
    assert front["base_model"] == base.name
    assert front["license"] == "mit"
    assert front["library_name"] == "transformers"
    assert "liger" in front["tags"]
    assert "666" not in text
    assert "\nlicense" not in body
    (note,) = (line for line in body.splitlines() if line.startswith("Note: ") and "no tokenizer" in line)
    assert "<" not in note.replace("\\<", "") and "`" not in note.replace("\\`", "")


def test_a_full_disk_leaves_nothing(sparse_base, here, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    base = sparse_base(shards=2)
    with pytest.raises(OSError):
        convert(str(base), "out")
    assert entries(here) == set()


def test_a_file_that_grows_too_large_is_one_sentence(sparse_base, liger, tmp_path):
    base = sparse_base()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    done = liger("convert", base, "out", "--link", "copy", preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert entries(tmp_path / "cwd") == set()


def test_read_only_output_is_one_sentence(sparse_base, liger, tmp_path):
    (tmp_path / "file").write_text("")
    done = liger("convert", sparse_base(), tmp_path / "file" / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted(sparse_base, tmp_path, number):
    big = {**TINY, "vocab_size": 2_000_000}
    base, here = sparse_base(shards=4, config=big), tmp_path / "cwd"
    here.mkdir()
    command = [sys.executable, "-m", "liger_cli", "convert", str(base), "out", "--link", "copy"]
    clock = random.Random(int(number))
    caught = 0
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - which jobs in the background ignore
    for _ in range(6):
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=here, preexec_fn=heard, **pipes)
        deadline = time.monotonic() + 600
        while not entries(here) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(clock.uniform(0, 0.25))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
        assert "Traceback" not in stderr
        left = entries(here)
        if "out" in left:
            assert read_manifest(here / "out")
            assert {path.stat().st_size for path in base.glob("*.safetensors")} == {
                path.stat().st_size for path in (here / "out").glob("*.safetensors")
            }
            shutil.rmtree(here / "out")
        else:
            caught += 1
            assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
        if number != signal.SIGKILL:
            assert entries(here) == set()
        else:
            for name in entries(here):
                assert name in (".out.partial", ".out.lock")
    assert caught
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert entries(here) == {"out"}


def test_refresh_renews_the_code_only(sparse_base, here, monkeypatch):
    base = sparse_base()
    monkeypatch.setattr(folder_module, "model_files", lambda family: {"modeling_liger_qwen3.py": "old"})
    convert(str(base), "out")
    before = digest(here / "out")
    os.link(here / "out" / "modeling_liger_qwen3.py", here / "elsewhere.py")
    monkeypatch.setattr(convert_module, "model_files", lambda family: {"modeling_liger_qwen3.py": "new"})
    assert refresh("out", dry_run=True)["refreshed"] == ["modeling_liger_qwen3.py"]
    assert digest(here / "out") == before
    refresh("out")
    after = digest(here / "out")
    assert (here / "out" / "modeling_liger_qwen3.py").read_text() == "new"
    assert (here / "elsewhere.py").read_text() == "old"
    assert {name for name in before if before[name] != after[name]} == {"liger.json", "modeling_liger_qwen3.py"}
    assert entries(here) == {"out", "elsewhere.py"}
    with pytest.raises(UsageError, match="refresh"):
        refresh(str(base))
    config = json.loads((here / "out" / "config.json").read_text())
    config["liger"]["format"] = 99
    (here / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="99"):
        refresh("out")


def test_a_living_neighbour_is_not_swept(sparse_base, here):
    """Who comes second waits, and then finds the name taken."""
    line = [sys.executable, "-m", "liger_cli", "convert", str(sparse_base()), "out"]
    with outputs.atomic_folder(here / "out") as partial:
        second = subprocess.Popen(line, cwd=here, stderr=subprocess.PIPE, text=True)
        assert "waiting for another run, which is writing" in second.stderr.readline()
        assert partial.is_dir()
        (partial / "file").write_text("ours")
    assert "out exists already" in second.communicate(timeout=600)[1] and second.returncode == 2
    assert entries(here) == {"out"} and entries(here / "out") == {"file"}


def test_qwen3_8b_costs_nothing(sparse_base, tmp_path):
    base, here = sparse_base(shards=5, config=QWEN3_8B), tmp_path / "cwd"
    (base / "tokenizer.json").write_bytes(b" " * (11 << 20))
    here.mkdir()
    watched = (
        "import re, runpy, sys;"
        "sys.argv = ['liger', 'convert', sys.argv[1], 'out', '--json'];\n"
        "try: runpy.run_module('liger_cli', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1],"
        " 'torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    busy = 10.0  # seconds of the processor: what else runs on the machine does not count
    for _ in range(3):
        shutil.rmtree(here / "out", ignore_errors=True)
        before, command = resource.getrusage(resource.RUSAGE_CHILDREN), [sys.executable, "-c", watched, base]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = min(busy, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    resident, torch, transformers = done.stderr.split()
    report = json.loads(done.stdout)
    assert report["parameters"] == 8_190_735_360
    assert (torch, transformers) == ("False", "False")
    assert int(resident) < 300_000
    assert busy < 2
    own = {path.name: path.stat().st_size for path in (here / "out").iterdir() if path.stat().st_nlink == 1}
    written = sum(own.values()) - own["tokenizer.json"]  # a copy: tokenizers write it in place
    if report["link"] == "hard":
        assert written < 2_000_000
    print(f"processor {busy:.2f} s, resident {int(resident) / 1024:.0f} MiB, written {written} B")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_loads_without_liger(tiny_base, tmp_path, model_type):
    convert(str(tiny_base(model_type)), str(tmp_path / "out"), softmax_layers="3")
    # transformers takes any Qwen2's vocabulary for byte pairs, which the tiny one has none of.
    text = "{'input_ids': torch.tensor([[5, 6, 7]])}" if model_type == "qwen2" else "tokenizer(WORDS, **TENSORS)"
    script = BLOCKER + (
        "import torch\n"
        "WORDS, TENSORS = ['w5 w6 w7'], {'return_tensors': 'pt'}\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        f"text = {text}\n"
        "out = model.generate(**text, max_new_tokens=5, do_sample=False, eos_token_id=None)\n"
        "assert out.shape[1] == 8, out.shape\n"
        "assert torch.isfinite(model(**text).logits).all()\n"
        "model.save_pretrained(sys.argv[2]); tokenizer.save_pretrained(sys.argv[2])\n"
        "again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
        "assert torch.equal(model(**text).logits, again(**text).logits)\n"
        "print(type(again).__name__)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-I", "-c", script, tmp_path / "out", tmp_path / "saved"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    prefix = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    assert done.stdout.strip() == f"Liger{prefix}ForCausalLM"


def test_tuned_and_merged_by_peft_without_liger(tiny_base, tmp_path):
    """Somebody else's script: LoRA, merge, save; then, with everything it was made from gone, load in a new process."""
    convert(str(tiny_base()), str(tmp_path / "out"), softmax_layers="3", link="copy")
    tune = BLOCKER + (
        "import torch\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)\n"
        "settings = LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], init_lora_weights=False)\n"
        "tuned = get_peft_model(model, settings).merge_and_unload().eval()\n"
        "tuned.save_pretrained('saved')\n"
        "torch.save(tuned(torch.arange(4, 104)[None]).logits.detach(), 'logits.pt')\n"
    )
    load = BLOCKER + (
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('saved', trust_remote_code=True)\n"
        "assert torch.equal(model(torch.arange(4, 104)[None]).logits, torch.load('logits.pt'))\n"
    )
    for step, script in enumerate((tune, load)):
        environment = {**os.environ, "HF_HOME": str(tmp_path / f"hf{step}"), "HF_HUB_OFFLINE": "1"}
        arguments = [sys.executable, "-I", "-c", script]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_how_to_run_a_model_is_not_taken_over(tiny_base, here, capsys):
    """A training script's leftovers in config.json: named, left out, and the folder and its base run."""
    import torch
    from transformers import AutoModelForCausalLM

    from liger_cli.evaluation.subject import open_subject

    base = here / "base"
    shutil.copytree(tiny_base("qwen3"), base)
    config = json.loads((base / "config.json").read_text())
    leftovers = {"return_dict": False, "_attn_implementation": "flash_attention_2", "dtype": "auto", "use_cache": False}
    (base / "config.json").write_text(json.dumps(config | leftovers))
    report, _ = convert(str(base), "out", settings={"mix": 0.0, "window": 64})
    assert all(name in report["notes"][-1] for name in leftovers)
    assert not set(leftovers) & set(json.loads((here / "out" / "config.json").read_text()))
    ids = torch.arange(4, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_base("qwen3"))(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)(ids).logits, plain)
    # A folder that was made before, and the base beside it.
    made = json.loads((here / "out" / "config.json").read_text())
    (here / "out" / "config.json").write_text(json.dumps(made | leftovers))
    subject = open_subject(here / "out", against=str(base))
    assert torch.equal(subject.model(ids).logits, plain) and torch.equal(subject.original(ids).logits, plain)
