"""Real signals, full disks, read-only places and neighbours: the base stays as it is and nothing half-made is left."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY
from test_convert import digest, entries

from liger_cli.benchmark import bench as measured_bench
from liger_cli.checkpoint import merged_shards
from liger_cli.commands import bench, convert, evaluate, finetune, merge
from liger_cli.commands import inspect as inspection
from liger_cli.system import outputs
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.manifest import new_manifest, read_manifest, write_manifest

SMALL = ("--recipe", "paper", "--seq-len", "48", "--batch-size", "4", "--micro-batch-size", "2", "--held-out", "8")
KILLED = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def workshop(tiny_base, tmp_path_factory):
    """A base of our own, its converted folder, an adapter and a text, all in one folder."""
    home = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_base(), home / "base")
    convert.convert(str(home / "base"), str(home / "made"), settings={"window": 8}, softmax_layers="3")
    rng = random.Random(0)
    lines = [" ".join(f"w{rng.randrange(4, 60)}" for _ in range(rng.randint(10, 46))) for _ in range(200)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    small = {"seq_len": 48, "batch_size": 4, "micro_batch_size": 2, "held_out": 8, "recipe": "paper"}
    finetune.run(home / "made", data=str(home / "text.jsonl"), output=home / "lora", max_steps=2, quiet=True, **small)
    return home


@pytest.fixture
def place(workshop, tmp_path):
    """The workshop's base and models linked into an empty folder, which the test may spoil."""
    for name in ("base", "made", "lora"):
        shutil.copytree(workshop / name, tmp_path / name)
    shutil.copy(workshop / "text.jsonl", tmp_path)
    (tmp_path / "made" / "model.safetensors").unlink()
    os.link(tmp_path / "base" / "model.safetensors", tmp_path / "made" / "model.safetensors")
    manifest = json.loads((tmp_path / "lora" / "liger.json").read_text())
    manifest["base"]["path"] = str(tmp_path / "made")
    (tmp_path / "lora" / "liger.json").write_text(json.dumps(manifest))
    return tmp_path


def words(command: str, *more) -> list[str]:
    """The command line of a run in `place`."""
    lines = {
        "convert": ("convert", "base", "out", "--link", "copy"),
        "calibrate": ("convert", "base", "out", "--link", "copy", "--calibrate", "--calibration-data", "text.jsonl",
                      "--window", "4", "--kept", "40"),
        "finetune": ("finetune", "made", "--data", "text.jsonl", "--output", "out", *SMALL,
                     "--max-steps", "12", "--save-steps", "2", "--eval-steps", "6"),
        "merge": ("merge", "lora", "--output", "out"),
        "eval": ("eval", "made", "--perplexity", "--data", "text.jsonl", "--seq-len", "32"),
        "bench": ("bench", "made", "--seq-len", "64", "--repetitions", "2", "--new-tokens", "2"),
    }  # fmt: skip
    return [sys.executable, "-m", "liger_cli", *lines[command], *map(str, more)]


def environment(**more) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", **more}


def start(command: list[str], cwd: Path) -> subprocess.Popen:
    """Ctrl-C counts for it, which it would not where the tests themselves run as a job in the background."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, cwd=cwd, env=environment(), preexec_fn=heard, **pipes)


def run(command: list[str], cwd: Path, **options) -> subprocess.CompletedProcess:
    options = {"env": environment(), **options}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, **options)


def one_sentence(stderr: str) -> str:
    """The last line, which says what went wrong; there is no traceback before it."""
    assert "Traceback" not in stderr, stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("liger: "), stderr
    return last


def check_whole(here: Path, base: dict[str, str], command: str) -> None:
    """What has to hold after any end: an untouched base, and nothing half-made under its final name."""
    assert digest(here / "base") == base
    made = here / "made"
    assert read_manifest(made)["kind"] == "converted"
    assert (made / "model.safetensors").read_bytes() == (here / "base" / "model.safetensors").read_bytes()
    if (made / "results.json").exists():
        results = json.loads((made / "results.json").read_text())
        assert {"eval", "bench"} & set(results)
        assert (made / "README.md").read_text().startswith("---\n")
    if (here / "out").exists():
        kinds = {"convert": "converted", "calibrate": "converted", "finetune": "adapter", "merge": "merged"}
        manifest = read_manifest(here / "out")
        assert manifest["kind"] == kinds[command]
        if command == "calibrate":
            assert manifest["calibration"] and not inspection.inspect_folder(here / "out")["differences"]
        for shard in (here / "out").glob("*.safetensors"):
            header = int.from_bytes(shard.read_bytes()[:8], "little")
            ends = [
                entry["data_offsets"][1]
                for name, entry in json.loads(shard.read_bytes()[8 : 8 + header]).items()
                if name != "__metadata__"
            ]
            assert shard.stat().st_size == 8 + header + max(ends)


def kill_and_go_on(here: Path, command: str, number: int, moment: float) -> None:
    """Send a signal `moment` seconds after the start, then do what the user would: give the command again."""
    base = digest(here / "base")
    process = start(words(command), here)
    time.sleep(moment)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert "Traceback" not in stderr, stderr
    # While Python itself is taken down, after the work, a signal ends it by default; a shell shows the same 130 or 143.
    assert process.returncode in (0, KILLED[number], -number), (process.returncode, stderr)
    check_whole(here, base, command)
    left = {name for name in entries(here) if ".partial" in name}
    if number != signal.SIGKILL and command != "finetune":
        assert not left
        assert not [name for name in entries(here / "made") if name.startswith(".")]
    again = run(words(command), here)
    if again.returncode == 2:
        sentence = one_sentence(again.stderr)
        assert "out" in sentence and ("--resume" in sentence or "--force" in sentence)
        again = run(words(command, "--force" if (here / "out").exists() else "--resume"), here)
    assert again.returncode == 0, again.stderr
    check_whole(here, base, command)
    assert not [name for name in entries(here) | entries(here / "made") if ".partial" in name]
    assert command in ("eval", "bench") or (here / "out").is_dir()
    shutil.rmtree(here / "out", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", list(KILLED), ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["convert", "calibrate", "finetune", "merge", "eval", "bench"])
def test_killed_at_a_random_moment(place, command, number):
    """Two kills for each command and signal, 36 in all, anywhere from the interpreter's start to the end."""
    began = time.monotonic()
    assert run(words(command), place).returncode == 0
    whole = time.monotonic() - began
    shutil.rmtree(place / "out", ignore_errors=True)
    clock = random.Random(f"{command}{number}")
    for _ in range(2):
        kill_and_go_on(place, command, number, clock.uniform(0.02, whole))


def interrupted_when(process: subprocess.Popen, happened, number: int) -> str:
    """Wait for a moment of the run, send the signal, return stderr."""
    deadline = time.monotonic() + 600
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    return process.communicate(timeout=600)[1]


def test_terminated_training_says_how_to_go_on(place):
    base = digest(place / "base")
    log = place / "out.partial" / "log.jsonl"
    process = start(words("finetune", "--max-steps", 4000), place)

    def trained():
        return log.exists() and len(log.read_text().splitlines()) >= 4

    stderr = interrupted_when(process, trained, signal.SIGTERM)
    assert process.returncode == 143
    assert "out.partial keeps the run's checkpoints; go on with --resume" in stderr
    assert one_sentence(stderr) == "liger: interrupted"
    check_whole(place, base, "finetune")
    busy = run(words("finetune"), place)
    assert busy.returncode == 2 and "--resume" in one_sentence(busy.stderr)


STOPPED = """
import sys, time
from importlib import import_module

module, name = import_module(sys.argv.pop(1)), sys.argv.pop(1)
real = getattr(module, name)

def stopped(*arguments, **options):
    print(f"in {name}", file=sys.stderr, flush=True)
    real(*arguments, **options)
    time.sleep(600)

setattr(module, name, stopped)
from liger_cli.main import main
main()
"""


def start_and_stop(command: str, module: str, name: str, place: Path) -> subprocess.Popen:
    """A run that has come to a function of a module, and stays there: however busy the machine is, it is not over."""
    process = start([sys.executable, "-c", STOPPED, module, name, *words(command)[3:]], place)
    for line in process.stderr:
        if line == f"in {name}\n":
            return process
    raise AssertionError(process.communicate())


def test_ctrl_c_while_evaluating_leaves_nothing(place):
    base = digest(place / "base")
    before = digest(place / "made")
    process = start_and_stop("eval", "liger_cli.commands.evaluate", "evaluate", place)
    time.sleep(random.Random(1).uniform(0, 0.5))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130
    assert one_sentence(stderr) == "liger: interrupted"
    assert digest(place / "made") == before
    check_whole(place, base, "eval")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_killed_calibration_leaves_nothing(place, number):
    """Killed while the base runs over the text: nothing is written by then, and the base is as it was."""
    base, before = digest(place / "base"), entries(place)
    process = start(words("calibrate"), place)
    said = process.stderr.readline()
    assert said.startswith("liger: calibrating on"), said + process.communicate()[1]
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == KILLED[number]
    if number == signal.SIGTERM:
        assert one_sentence(stderr) == "liger: interrupted"
    assert digest(place / "base") == base and entries(place) == before


def test_killed_merge_is_swept_by_the_next(place):
    base = digest(place / "base")
    process = start_and_stop("merge", "liger_cli.commands.merge", "write_shard", place)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode == -9
    check_whole(place, base, "merge")
    left = entries(place) & {".out.partial"}
    merge.run(place / "lora", output=place / "out", force=(place / "out").exists(), quiet=True)
    assert left and not [name for name in entries(place) if name.startswith(".")]
    check_whole(place, base, "merge")


def test_signals_before_the_command_begins_are_quiet(place):
    script = (
        "from liger_cli import __main__ as entry; import os, sys\n"
        "quit_at_once = entry.interrupts.quit_at_once\n"
        "entry.interrupts.quit_at_once = lambda: (quit_at_once(), print('begun', file=sys.stderr, flush=True))\n"
        "sys.argv[1:] = ['families']; entry.main()"
    )
    for number, moment in ((signal.SIGINT, 0.0), (signal.SIGTERM, 0.02), (signal.SIGINT, 0.1)):
        process = start([sys.executable, "-c", script], place)
        # Until our first line a signal meets Python itself, and its own words are unavoidable.
        assert process.stderr.readline() == "begun\n"
        time.sleep(moment)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=600)
        assert process.returncode in (0, KILLED[number]) and "Traceback" not in stderr, stderr


def test_hang_ups_that_nohup_ignores_stay_ignored(place):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    script = (
        "from liger_cli.system import interrupts; import os, signal\n"
        "with interrupts.unwinding(): os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", script], preexec_fn=ignore, capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr
    heed = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", script], preexec_fn=heed, capture_output=True, text=True)
    assert done.stdout == ""


def test_a_failure_that_an_interruption_caused_is_an_interruption(monkeypatch, capsys):
    from liger_cli.system import errors, interrupts

    monkeypatch.setattr(interrupts, "_received", [signal.SIGTERM])
    assert errors.guarded(lambda: int("x")) == 143
    assert capsys.readouterr().err == "liger: interrupted\n"


# --- disks ---------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str):
    """A file system of its own at `folder`; the test is skipped where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(place, tiny_base):
    base = digest(place / "base")
    weights = (place / "base" / "model.safetensors").stat().st_size
    with mounted(place / "disk", "-t", "tmpfs", "-o", f"size={weights + (24 << 10)}", "tmpfs"):
        for command in ("convert", "merge"):
            line = words(command)
            line[line.index("out")] = "disk/out"
            done = run(line, place)
            assert done.returncode == 1
            assert "space" in one_sentence(done.stderr) or "too little room" in done.stderr
            assert entries(place / "disk") == set()
            check_whole(place, base, command)
        shutil.copytree(place / "made", place / "disk" / "made", ignore=shutil.ignore_patterns("*.safetensors"))
        with pytest.raises(OSError, match="No space") as caught:
            outputs.write_whole(place / "disk" / "made" / "results.json", b"x" * (weights + (1 << 20)))
        assert caught.value.errno == errno.ENOSPC
        assert not [name for name in entries(place / "disk" / "made") if name.startswith((".", "results"))]


@pytest.mark.parametrize("limit", [4_000, 30_000])
def test_training_with_no_room_for_its_files(place, limit):
    """A limit on the size of a file: torch and safetensors have errors of their own for it, we have a sentence."""
    base = digest(place / "base")
    cap = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    done = run(words("finetune"), place, preexec_fn=cap)
    assert done.returncode == 1
    assert any(word in one_sentence(done.stderr) for word in ("File too large", "space")), done.stderr
    assert not (place / "out").exists()
    check_whole(place, base, "finetune")
    again = run(words("finetune"), place)
    assert again.returncode == 2 and "--resume" in one_sentence(again.stderr)


def test_a_full_standard_output_is_a_sentence(place):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "liger_cli", "families"],
            cwd=place, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in one_sentence(done.stderr) and done.stderr.count("\n") == 1


def test_a_read_only_base_and_a_read_only_output(place):
    base = digest(place / "base")
    with mounted(place / "base", "--bind", str(place / "base")):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place / "base")], check=True)
        done = run(words("convert"), place)
        assert done.returncode == 0, done.stderr
    check_whole(place, base, "convert")
    shutil.copytree(place / "made", place / "other")
    with mounted(place / "made", "--bind", str(place / "made")):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place / "made")], check=True)
        line = words("merge")
        line[line.index("out")] = "made/out"
        line += ["--base", "other"]
        done = run(line, place)
        assert done.returncode == 1
        assert "Read-only file system; check the permissions" in one_sentence(done.stderr)
    assert digest(place / "base") == base


def test_results_that_cannot_be_kept_are_still_printed(place, capsys):
    """The folder of the model is read-only: the figures come, and a sentence about the file that did not."""
    with mounted(place / "made", "--bind", str(place / "made")):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place / "made")], check=True)
        evaluate.run(
            str(place / "made"), data=str(place / "text.jsonl"), perplexity=True, seq_len=32, output_format="json"
        )
        out, err = capsys.readouterr()
        assert json.loads(out)["perplexity"]
        assert "could not be kept" in err
        assert not (place / "made" / "results.json").exists()


def test_an_output_that_one_may_not_write(place):
    """Permissions do not bind the superuser, who therefore gives that right away first."""
    (place / "closed").mkdir(mode=0o555)
    line = words("convert")
    line[line.index("out")] = "closed/out"
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("no setpriv")
        line = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *line]
    done = run(line, place)
    assert done.returncode == 1
    assert "Permission denied; check the permissions" in one_sentence(done.stderr)
    assert entries(place / "closed") == set()


def test_a_base_on_another_file_system(place):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == place.stat().st_dev:
        pytest.skip("no second file system")
    elsewhere = memory / f"liger-test-{os.getpid()}"
    shutil.copytree(place / "base", elsewhere)
    try:
        before = digest(elsewhere)
        done = run([sys.executable, "-m", "liger_cli", "convert", str(elsewhere), "hard", "--link", "hard"], place)
        assert done.returncode == 1 and "--link auto" in one_sentence(done.stderr)
        report, _ = convert.convert(str(elsewhere), str(place / "auto"))
        assert report["link"] == "copy"
        assert (place / "auto" / "model.safetensors").stat().st_nlink == 1
        assert digest(elsewhere) == before
        assert not [name for name in entries(place) if name.startswith(".") or name == "hard"]
    finally:
        shutil.rmtree(elsewhere)


@pytest.mark.parametrize("output", ["base/out", "base", ".", "base/../base/x", "alias/out"])
def test_an_output_inside_the_base(place, output):
    (place / "alias").symlink_to("base")
    base = digest(place / "base")
    done = run([sys.executable, "-m", "liger_cli", "convert", "base", output, "--force"], place)
    assert done.returncode == 2
    one_sentence(done.stderr)
    assert digest(place / "base") == base


# --- neighbours ----------------------------------------------------------------------------------------------------


def test_two_conversions_into_one_output(sparse_base, tmp_path):
    base = sparse_base(shards=4, config={**TINY, "vocab_size": 400_000})
    line = [sys.executable, "-m", "liger_cli", "convert", str(base), "out", "--link", "copy"]
    for _ in range(3):
        both = [start(line, tmp_path) for _ in range(2)]
        ends = [process.communicate(timeout=600)[1] for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes == [0, 2], ends
        assert "exists already" in one_sentence(next(end for end in ends if "exists" in end))
        assert read_manifest(tmp_path / "out")
        assert entries(tmp_path) == {"base", "out"}
        shutil.rmtree(tmp_path / "out")


def test_two_trainings_into_one_output(place):
    """The second is refused while the first lives, with --force and --resume too, and spoils nothing."""
    with outputs.claimed_folder(place / "out.partial", fresh=True):
        (place / "out.partial" / "run.json").write_text("{}")
        for option in ({}, {"force": True}):
            with pytest.raises(UsageError, match="another run is writing|unfinished run"):
                finetune.run(
                    place / "made", data=str(place / "text.jsonl"), output=place / "out", max_steps=2, quiet=True,
                    recipe="paper", seq_len=48, batch_size=4, micro_batch_size=2, held_out=8, **option,
                )  # fmt: skip
        assert (place / "out.partial" / "run.json").read_text() == "{}"
    with outputs.claimed_folder(place / "out.partial", fresh=False):
        assert (place / "out.partial" / "run.json").exists()


def test_a_name_taken_in_the_last_moment(tmp_path):
    for force in (False, True):
        with pytest.raises(UsageError), outputs.atomic_folder(tmp_path / "out", force) as folder:
            (folder / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("theirs")
        assert entries(tmp_path) == {"out"} and entries(tmp_path / "out") == {"theirs"}
        shutil.rmtree(tmp_path / "out")


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / ".results.json.partial").write_text("half")
    (tmp_path / ".out.lock").write_text("")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("the only copy")
    outputs.write_whole(tmp_path / "results.json", "{}")
    assert entries(tmp_path) == {"results.json", ".out.lock", ".out.partial", ".out.replaced"}
    with pytest.raises(UsageError), outputs.atomic_folder(tmp_path / "out"):
        pytest.fail("the name is taken")
    assert entries(tmp_path) == {"results.json", "out"}
    assert (tmp_path / "out" / "old").read_text() == "the only copy"


def test_a_replacement_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    """Between the two renames of --force the old folder has no name: it gets it back."""
    with outputs.atomic_folder(tmp_path / "out") as folder:
        write_manifest(folder, new_manifest("converted"))
        (folder / "old").write_text("old")
    rename = os.rename

    def fails(one, to):
        if one.name == ".out.partial":
            raise OSError("no")
        rename(one, to)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"), outputs.atomic_folder(tmp_path / "out", force=True):
        pass
    assert entries(tmp_path) == {"out"} and (tmp_path / "out" / "old").read_text() == "old"


def test_files_written_at_once_are_whole(tmp_path):
    texts = [str(index) * 200_000 for index in range(4)]
    threads = [
        threading.Thread(target=lambda text=text: [outputs.write_whole(tmp_path / "f", text) for _ in range(20)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "f").exists():
            assert (tmp_path / "f").read_text() in texts
    assert entries(tmp_path) == {"f"}


# --- shards that change ---------------------------------------------------------------------------------------------


def rewritten(path: Path) -> None:
    """Change one byte in place, as a download that starts again does."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [rewritten, shortened])
def test_a_shard_that_changes_while_it_is_merged(place, monkeypatch, spoil):
    shard = place / "made" / "model.safetensors"
    shard.unlink()
    shutil.copyfile(place / "base" / "model.safetensors", shard)
    real, calls = merged_shards.merged_by, []

    def slow(*arguments):
        if not calls:
            spoil(shard)
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(merged_shards, "merged_by", slow)
    with pytest.raises(LigerError, match="was changed while it was read; run the command again"):
        merge.run(place / "lora", output=place / "out", quiet=True)
    assert calls and not (place / "out").exists()
    assert not [name for name in entries(place) if name.startswith(".")]


@pytest.mark.parametrize("spoil", [rewritten, shortened])
def test_an_adapter_that_changes_while_it_is_merged(place, monkeypatch, spoil):
    real, calls = merged_shards.read_tensor, []

    def slow(*arguments):
        if not calls:
            spoil(place / "lora" / "adapter_model.safetensors")
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(merged_shards, "read_tensor", slow)
    with pytest.raises(LigerError, match="was changed while it was read; run the command again"):
        merge.run(place / "lora", output=place / "out", quiet=True)
    assert calls and not (place / "out").exists()
    assert not [name for name in entries(place) if name.startswith(".")]


def test_a_shard_that_changes_while_it_is_copied(place, monkeypatch):
    shard = place / "base" / "model.safetensors"
    real = outputs.shutil.copyfile

    def slow(source, target, **options):
        result = real(source, target, **options)
        if Path(source) == shard:
            rewritten(shard)
        return result

    monkeypatch.setattr(outputs.shutil, "copyfile", slow)
    with pytest.raises(LigerError, match="was changed while it was read"):
        convert.convert(str(place / "base"), str(place / "out"), link="copy")
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_shard_that_changes_while_it_is_measured(place, monkeypatch, command):
    shard = place / "made" / "model.safetensors"
    shard.unlink()
    shutil.copyfile(place / "base" / "model.safetensors", shard)
    module, measuring = {"eval": (evaluate, evaluate), "bench": (bench, measured_bench)}[command]
    name = {"eval": "evaluate", "bench": "bench"}[command]
    real = getattr(measuring, name)

    def slow(subject, **options):
        rewritten(shard)
        return real(subject, **options)

    monkeypatch.setattr(measuring, name, slow)
    options = {"eval": {"data": str(place / "text.jsonl"), "perplexity": True, "seq_len": 32},
               "bench": {"seq_len": 16, "repetitions": 1, "new_tokens": 1}}[command]  # fmt: skip
    with pytest.raises(LigerError, match="was changed while it was read"):
        module.run(str(place / "made"), **options)
    assert not (place / "made" / "results.json").exists()


def test_weights_that_change_while_they_are_tuned(place, monkeypatch):
    shard = place / "made" / "model.safetensors"
    shard.unlink()
    shutil.copyfile(place / "base" / "model.safetensors", shard)
    real = finetune.train

    def slow(*arguments, **options):
        rewritten(shard)
        return real(*arguments, **options)

    monkeypatch.setattr(finetune, "train", slow)
    with pytest.raises(LigerError, match="was changed while it was read"):
        finetune.run(
            place / "made", data=str(place / "text.jsonl"), output=place / "out", max_steps=1, quiet=True,
            recipe="paper", seq_len=48, batch_size=4, micro_batch_size=2, held_out=8,
        )  # fmt: skip
    assert not (place / "out").exists()


@pytest.mark.parametrize("part", ["fit_layers", "head_costs"])
def test_a_base_that_changes_while_it_is_calibrated(place, monkeypatch, part):
    from liger_cli.calibration import calibrate

    real = getattr(calibrate, part)

    def slow(*arguments):
        rewritten(place / "base" / "model.safetensors")
        return real(*arguments)

    monkeypatch.setattr(calibrate, part, slow)
    with pytest.raises(LigerError, match="was changed while it was read"):
        convert.convert(
            str(place / "base"), str(place / "out"), calibrate=True, calibration_data=str(place / "text.jsonl"),
            settings={"window": 4, "kept": 40},
        )  # fmt: skip
    assert not (place / "out").exists()
