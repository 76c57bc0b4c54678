"""`liger finetune` on a plain conversion: the default recipe begins with a calibrated copy."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_convert import digest
from test_train_options import interrupted
from typer.testing import CliRunner

from liger_cli.calibration import calibrate
from liger_cli.calibration.text import Text
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.tokenizer import load_tokenizer
from liger_cli.commands import convert, finetune, merge
from liger_cli.main import app
from liger_cli.system.errors import UsageError
from liger_cli.system.manifest import read_manifest
from liger_cli.training.calibrated import training_text
from liger_cli.training.data import load_data
from liger_cli.training.recipes import load_recipe

SMALL = {"seq_len": 48, "batch_size": 4, "micro_batch_size": 2, "held_out": 4, "max_steps": 4, "quiet": True}
COPY, LORA = "plain-calibrated", "plain-calibrated-lora"


@pytest.fixture
def here(tiny_base, tmp_path, monkeypatch):
    """The current folder: a base, its plain conversion (window 4), one with a softmax layer, and a text."""
    monkeypatch.setattr(calibrate, "SEQ_LEN", 64)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base(), "base")
    convert.convert("base", "plain", settings={"window": 4}, softmax_layers="3")
    words = [f"w{(7 * n * n + n) % 120 + 4}" for n in range(6000)]
    rows = [{"text": " ".join(words[first : first + 60])} for first in range(0, 6000, 60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def tune(model="plain", **options):
    return finetune.run(model, data="text.jsonl", **{**SMALL, **options})


def cut_off(here, monkeypatch, **options):
    """A run that is stopped behind its second step."""
    interrupted(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        tune(**options)
    monkeypatch.undo()
    monkeypatch.chdir(here)


def test_the_default_calibrates_first(here, capsys):
    """The copy is what `liger convert --calibrate` makes, its weights are the folder's own, the base is not needed."""
    text = {"calibration_data": "text.jsonl"}
    convert.convert(
        "base", "wanted", settings={"window": 4}, softmax_layers="3", calibrate=True, calibration_seq_len=64, **text
    )
    shutil.rmtree("base")
    before = digest(here / "plain")
    capsys.readouterr()
    report = tune(**text)
    said = capsys.readouterr().err
    assert "plain is not calibrated: calibrating it into plain-calibrated" in said and "--recipe paper" in said
    assert digest(here / "plain") == before
    assert (report["recipe"], report["model"], report["output"]) == ("best", str(here / COPY), LORA)
    config, wanted = (json.loads((here / name / "config.json").read_text()) for name in (COPY, "wanted"))
    assert config == wanted
    for name, value in load_file(here / "wanted" / "model-liger.safetensors").items():
        torch.testing.assert_close(load_file(here / COPY / "model-liger.safetensors")[name], value, rtol=0, atol=0)
    assert any(os.path.samefile(path, here / "plain" / "model.safetensors") for path in (here / COPY).iterdir())
    manifest = read_manifest(here / COPY)
    assert manifest["base"] == read_manifest(here / "plain")["base"] and manifest["calibration"]["tokens"] > 0
    assert read_manifest(here / LORA)["base"]["path"] == str(here / COPY)
    merge.run(quiet=True)
    load_model(here / "plain-calibrated-merged")


@pytest.mark.parametrize("name", ["lolcats", "paper-code"])
def test_a_model_of_a_recipe_is_trained_by_it(here, name, capsys):
    """`liger convert --recipe` says so in liger.json; a name there that is none of liger's is passed over."""
    said = CliRunner().invoke(app, ["convert", "base", "own", "--recipe", name]).output
    assert "which trains it as it is" in said and "calibrates it first" not in said
    assert tune("own", dry_run=True)["recipe"] == name and not (here / "own-calibrated").exists()
    assert f"recipe: {name}" in CliRunner().invoke(app, ["inspect", "own"]).output
    manifest = json.loads((here / "own" / "liger.json").read_text())
    for other in ("../../best", ["best"], {"a": 1}, None):
        (here / "own" / "liger.json").write_text(json.dumps(manifest | {"recipe": other}))
        assert tune("own", dry_run=True)["recipe"] == ("paper" if name == "lolcats" else "best")


def test_what_a_resumed_run_would_do(here, monkeypatch):
    """`--resume --dry-run` looks at the calibrated copy that the run was begun with."""
    cut_off(here, monkeypatch, save_steps=2)
    before = digest(here)
    assert tune(resume=True, dry_run=True)["recipe"] == "best" and digest(here) == before
    tune(resume=True)


@pytest.mark.parametrize(
    ("options", "sentence"), [({"data": ""}, "--data is ''"), ({"processes": 0}, "--processes is 0")]
)
def test_empty_values_are_no_defaults(here, options, sentence):
    """An unset variable of the shell names no data, and least of all the recipe's own."""
    with pytest.raises(UsageError, match=sentence):
        finetune.run("plain", **{**SMALL, "data": "text.jsonl", **options})


def test_the_copy_is_taken_again(here, capsys):
    tune()
    made = digest(here / COPY)
    capsys.readouterr()
    tune(force=True, seed=1)
    assert "taking plain-calibrated, the calibrated plain" in capsys.readouterr().err
    assert digest(here / COPY) == made


def test_it_is_calibrated_on_the_training_data(here, capsys):
    """The examples as they are trained on, one behind another, each once and none of the held-out ones; and prose."""
    loaded = load_data("text.jsonl", load_tokenizer(here / "base", None), 48, 4)
    text = training_text(loaded, "text.jsonl", 0)
    left, ids = [example.input_ids.tolist() for example in loaded.train], text.ids.tolist()
    assert calibrate.wanted_tokens() <= len(ids) < calibrate.wanted_tokens() + 48
    place = 0
    while place < len(ids):
        piece = next(one for one in left if ids[place : place + len(one)] == one)
        left.remove(piece)
        place += len(piece)
    tune()
    assert text.name == "the training data (text.jsonl)"
    both = "the training data (text.jsonl) and shipped prose (Moby-Dick)"
    assert read_manifest(here / COPY)["calibration"]["text"] == both
    capsys.readouterr()
    with pytest.raises(UsageError, match="in the way of a calibrated copy"):
        tune(calibration_data="text.jsonl", force=False, output="other")
    tune(output="another")
    assert f"(calibrated on {both})" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "kinds"), [(9, "opopop"), (2, "ppopop"), (1, "ppppop")])
def test_rows_of_prose_beside_the_training_data(rows, kinds):
    """In turn, so that both are fitted on and chosen by; from all over the data; prose where there is too little."""
    own, prose = Text("data", torch.arange(rows * 8 + 3), beside_prose=True), -1 - torch.arange(80).view(10, 8)
    found = calibrate._in_turn(own, prose, 6).rows(8)
    assert "".join("o" if row[0] >= 0 else "p" for row in found) == kinds
    starts = [int(row[0]) for row in found if row[0] >= 0]
    assert starts == [8 * row for row in ((0, 4, 8) if rows == 9 else range(rows))]


def test_what_calibration_did_stands_at_the_end(here, capsys):
    """Of text that the base writes, too: what it gave is said when it is done, and once more beside the training's."""
    tune(calibration_data="self", quiet=False)
    assert read_manifest(here / COPY)["calibration"]["text"] == "text that the base wrote itself"
    said = capsys.readouterr().err
    end = said[said.index(f"wrote {LORA}") :]
    sentence = "tokens of text that the base wrote itself in "
    assert sentence in said[: -len(end)] and sentence in end
    assert end.index(sentence) < end.index("held-out perplexity") < end.index("next: liger merge")
    tune(calibration_data="self", output="another")
    assert "taking plain-calibrated" in capsys.readouterr().err


def test_too_little_to_calibrate_on(here, capsys):
    (here / "few.jsonl").write_text("".join(json.dumps({"text": f"w{n} w5 w6 w7"}) + "\n" for n in range(10, 25)))
    finetune.run("plain", data="few.jsonl", **SMALL)
    assert "tokens to train on, too few to calibrate on (96)" in capsys.readouterr().err
    assert "training data" not in read_manifest(here / COPY)["calibration"]["text"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "paper", "calibration_data": "text.jsonl"}, "plain is not calibrated first"),
        ({"calibration_data": "none.txt"}, "--calibration-data none.txt is not a file"),
    ],
)
def test_a_text_that_nothing_is_calibrated_on(here, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        tune(**options)
    assert not (here / COPY).exists() and not (here / LORA).exists()


def test_a_copy_that_is_gone(here, monkeypatch):
    cut_off(here, monkeypatch, save_steps=1)
    shutil.rmtree(COPY)
    with pytest.raises(UsageError, match="plain-calibrated, the calibrated plain that .* is gone"):
        tune(save_steps=1, resume=True)


def test_something_else_is_in_the_way(here):
    """A folder of another kind, and the calibrated copy of other settings."""
    (here / COPY).mkdir()
    with pytest.raises(UsageError, match="in the way of a calibrated copy of plain"):
        tune()
    (here / COPY).rmdir()
    convert.convert("base", COPY, settings={"window": 5}, softmax_layers="3", calibrate=True)
    with pytest.raises(UsageError, match="in the way of a calibrated copy of plain .* --force"):
        tune()
    assert not (here / LORA).exists()
    assert tune(force=True)["model"] == str(here / COPY)
    assert read_manifest(here / COPY)["settings"]["layers"][0]["window"] == 4


def test_a_dry_run_writes_nothing(here, capsys):
    entries = {path.name for path in here.iterdir()}
    result = CliRunner().invoke(app, ["finetune", "plain", "--data", "text.jsonl", "--seq-len", "48", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "plain would first be calibrated into plain-calibrated" in result.stderr
    assert {path.name for path in here.iterdir()} == entries


def test_it_lies_beside_the_adapter(here):
    (here / "runs").mkdir()
    tune(output="runs/first")
    assert (here / "runs" / COPY).is_dir() and not (here / COPY).exists()


@pytest.mark.parametrize("model", ["plain", None])
@pytest.mark.parametrize("output", [None, "out"])
def test_resuming(here, monkeypatch, model, output):
    """By the folder's name or as the newest one here; the copy is taken as it is."""
    flags = {"output": output, "save_steps": 1, "model": model}
    if model is None:
        shutil.rmtree("base")
    cut_off(here, monkeypatch, **flags)
    report = tune(**flags, resume=True)
    assert report["resumed_from_step"] == 2 and report["model"] == str(here / COPY)
    assert (here / (output or LORA)).is_dir()


def test_resuming_nothing_calibrates_nothing(here):
    with pytest.raises(UsageError, match="there is no unfinished run plain-lora.partial"):
        tune(resume=True)
    assert not (here / COPY).exists()


def test_a_run_of_another_recipe_is_resumed_as_it_was(here, monkeypatch):
    cut_off(here, monkeypatch, recipe="paper", save_steps=1)
    assert tune(resume=True, save_steps=1)["recipe"] == "paper"
    assert not (here / COPY).exists()


@pytest.mark.parametrize(
    ("settings", "options", "recipe"),
    [
        ({"window": 4}, {"recipe": "paper"}, "paper"),
        ({"window": 4, "mix": 0.0}, {}, "paper"),
        ({"window": 4, "mix": 0.0}, {"recipe": "best"}, "best"),
        ({"window": 4, "gate_params": "learned"}, {}, "paper"),
        ({"window": 4}, {"recipe": "window.yaml"}, "best"),
    ],
)
def test_what_is_trained_as_it_is(here, settings, options, recipe):
    """Other recipes, the window alone, which is a control, and what has parameters of its own."""
    text = json.dumps({**load_recipe("best").to_dict(), "attention": "window"})
    (here / "window.yaml").write_text(text)
    convert.convert("base", "other", settings=settings)
    report = tune("other", **options)
    assert (report["recipe"], report["model"]) == (recipe, str(here / "other"))
    assert not list(here.glob("*-calibrated"))


def test_several_processes_take_a_copy_but_make_none(here, monkeypatch):
    from liger_cli.training.calibrated import calibrated_base, copy_path
    from liger_cli.training.plan import read_base

    base = read_base(here / "plain")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="--calibrate"):
        calibrated_base(base, copy_path(base, None))
    monkeypatch.delenv("RANK")
    made = calibrated_base(base, copy_path(base, None))
    monkeypatch.setenv("RANK", "1")
    assert calibrated_base(base, copy_path(base, None)).fingerprint == made.fingerprint
