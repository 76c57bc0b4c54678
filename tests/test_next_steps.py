"""What commands say at their end and on the way: the next command, limits of the base, and what changes nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from liger_cli.checkpoint.folders import next_step
from liger_cli.checkpoint.reader import context_length
from liger_cli.commands import convert, finetune, merge
from liger_cli.main import app
from liger_cli.system.errors import ModelError, SetupError
from liger_cli.system.manifest import new_manifest, pip_install, write_manifest
from liger_cli.system.wording import without_folders
from liger_cli.training.view import outcome


def liger(*arguments) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            },
            65536,
        ),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": "x"}}, 512),
    ],
)
def test_context_of_a_base(config, length):
    assert context_length(config) == length


def test_convert_ends_with_the_next_command(tiny_base, tmp_path):
    """A plain conversion says that it is no model to use yet, the window alone that it can be measured."""
    base = tiny_base()
    said = liger("convert", base, tmp_path / "plain", "--window", 8)
    assert said.endswith(" ".join(next_step("plain", tmp_path / "plain").split()))
    assert f"liger finetune {tmp_path / 'plain'}" in said and "none to use yet" in said
    said = liger("convert", base, tmp_path / "kept", "--kept", 8)
    assert "which trains it as it is" in said and "calibrates it first" not in said
    assert f"next: liger eval {tmp_path / 'w'}" in liger("convert", base, tmp_path / "w", "--mix", "window-only")
    said = liger("convert", base, tmp_path / "dry", "--dry-run")
    assert said.endswith("was not written; next: the same command without --dry-run")


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["families"], "next: liger convert BASE"),
        (["gates"], "next: liger convert BASE --gate NAME"),
        (["recipes"], "liger finetune --recipe NAME trains with it"),
        (["recipes", "paper"], "next: liger finetune --recipe paper"),
        (["doctor"], "next: liger demo, or liger convert BASE"),
        (["inspect", "BASE"], "next: liger convert BASE"),
        (["inspect", "MODEL"], "next: liger finetune MODEL (which calibrates it first)"),
        (["inspect", "ADAPTER"], "next: liger merge ADAPTER"),
        (["bench", "BASE", "--shapes-only", "--seq-len", "16", "--new-tokens", "2"], "next: liger convert BASE"),
        (["bench", "MODEL", "--seq-len", "16", "--new-tokens", "2"], "next: liger finetune MODEL"),
        (["eval", "MODEL", "--seq-len", "64", "--rows", "1", "--perplexity"], "next: liger bench MODEL"),
        (["eval", "--from", "MODEL"], "next: liger bench MODEL shows what each costs"),
        (["merge", "ADAPTER", "--dry-run"], "next: the same command without --dry-run"),
        (["merge", "ADAPTER", "--output", "MERGED"], "next: liger eval MERGED"),
        (["inspect", "MERGED"], "next: liger eval MERGED"),
        (["bench", "MERGED", "--seq-len", "16", "--new-tokens", "2"], "next: use it: AutoModelForCausalLM"),
        (["convert", "MODEL", "--refresh"], "next: liger eval MODEL"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_every_command_ends_with_the_next(home, monkeypatch, words, end):
    monkeypatch.chdir(home)
    said = liger(*words)
    assert end in said[-len(end) - 100 :], said[-400:]


@pytest.fixture(scope="module")
def home(tiny_base, tmp_path_factory):
    """A base, its conversion and an adapter in one folder."""
    from peft import LoraConfig, get_peft_model

    from liger_cli.checkpoint.model_code import load_model

    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_base(), home / "BASE")
    convert.convert(str(home / "BASE"), str(home / "MODEL"), settings={"window": 8})
    adapter = get_peft_model(load_model(home / "MODEL"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(home / "ADAPTER")
    write_manifest(home / "ADAPTER", new_manifest("adapter", base={"path": str(home / "MODEL")}))
    return home


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "MODEL", "--samples", "1", "--beyond-context"],
        ["finetune", "MODEL", "--data", "long.txt", "--recipe", "paper", "--max-steps", "1", "--output", "lora"],
        ["convert", "BASE", "calibrated", "--calibrate", "--calibration-data", "self", "--window", "8"],
        ["bench", "MODEL", "--seq-len", "1024", "--new-tokens", "2", "--repetitions", "1"],
    ],
    ids=" ".join,
)
def test_transformers_does_not_warn_of_lengths(home, tmp_path, words):
    """Texts beyond the base's context are cut into rows: nothing would result in indexing errors."""
    work = tmp_path / "work"
    shutil.copytree(home, work)
    for folder in (work / "BASE", work / "MODEL"):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 32}))
    (work / "long.txt").write_text("w5 w6 w7 w8 " * 2000)
    done = subprocess.run(
        [sys.executable, "-m", "liger_cli", *words], cwd=work, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "indexing errors" not in said and "predefined maximum length" not in said, said


def test_memory_goes_up_to_the_bases_context(tiny_base, tmp_path):
    said = liger("convert", tiny_base(), tmp_path / "out", "--dry-run", "--json")
    assert [row["tokens"] for row in json.loads(said)["memory"]] == [512]
    long = tiny_base(max_position_embeddings=131072)
    said = liger("convert", long, tmp_path / "out", "--dry-run", "--json")
    assert [row["tokens"] for row in json.loads(said)["memory"]] == [4096, 32768, 131072]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", 0], "--window 0 leaves out the window: a layer is its recurrence alone"),
        (["--window", 600], "--window 600 covers the base's context of 512 tokens"),
        (["--kept", 16], "the scores that choose kept tokens are not fitted: --calibrate fits them"),
    ],
)
def test_settings_that_do_what_nobody_expects_are_named(tiny_base, tmp_path, options, words):
    assert words in liger("convert", tiny_base(), tmp_path / "out", "--dry-run", *options)
    assert words not in liger("convert", tiny_base(), tmp_path / "out", "--dry-run")


def test_a_base_without_a_tokenizer(tiny_base, tmp_path):
    """convert says so; what needs one says where it has to be, and nothing of a library's own."""
    base = shutil.copytree(tiny_base(), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    assert "base has no tokenizer, so the output has none" in liger("convert", base, tmp_path / "out")
    with pytest.raises(ModelError, match="out has no tokenizer; put the base's tokenizer files .* there"):
        finetune.run(tmp_path / "out", data="demo", recipe="paper", output=tmp_path / "lora", dry_run=True)


def test_an_unknown_model_type_is_near_to_nothing(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base(), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for model_type, words in (("gpt2", "'gpt2' is not supported; `liger"), ("qwen33", "(the nearest is qwen3)")):
        (base / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        with pytest.raises(ModelError, match=re.escape(words)):
            convert.convert(str(base), str(tmp_path / "out"))


def test_a_mistyped_command():
    done = CliRunner().invoke(app, ["finetun"])
    assert done.exit_code == 2 and "Did you mean 'finetune'?" in done.output


def test_hints_name_packages_that_are_on_the_index():
    """An extra of `liger-cli` would name a distribution that is not this one."""
    assert pip_install("eval") == "pip install 'lm-eval[longbench,ruler]>=0.4.9'"
    for file in Path(finetune.__file__).parents[1].rglob("*.py"):
        assert "liger-cli[" not in file.read_text("utf-8"), file


def test_the_tokenizer_needs_no_trust(tiny_base, tmp_path, monkeypatch, caplog):
    """As the card loads it: with the model's config no code is asked for, and no model type warned of."""
    from liger_cli.checkpoint.model_code import load_model

    folder = tmp_path / "out"
    convert.convert(str(tiny_base()), str(folder))
    auto = "transformers.models.auto.configuration_auto.resolve_trust_remote_code"
    monkeypatch.setattr(auto, lambda *_, **__: pytest.fail("asked to run code"))
    config = load_model(folder).config
    assert (
        'AutoTokenizer.from_pretrained("path/to/this/folder", config=model.config)'
        in (folder / "README.md").read_text()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config)
    assert tokenizer("w5 w6")["input_ids"] == [5, 6] and not caplog.records


def test_fsdp_on_a_cpu_is_refused_before_anything_is_started(tiny_base, tmp_path, monkeypatch):
    convert.convert(str(tiny_base()), str(tmp_path / "model"))
    monkeypatch.setattr(finetune, "launch", lambda *_: pytest.fail("processes were started"))
    monkeypatch.setattr(finetune, "calibrated_base", lambda *_: pytest.fail("the model was calibrated"))
    with pytest.raises(SetupError, match="--fsdp needs CUDA devices and there are none"):
        finetune.run(tmp_path / "model", data="demo", output=tmp_path / "lora", fsdp=True, processes=2)


def test_rows_within_the_bases_context(tiny_base, tmp_path, capsys):
    convert.convert(str(tiny_base()), str(tmp_path / "model"))
    (tmp_path / "d.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n' * 40)
    options = {"data": str(tmp_path / "d.jsonl"), "recipe": "paper", "output": tmp_path / "lora", "max_steps": 1}
    for asked, beyond, rows in ((None, False, 512), (4096, False, 512), (64, False, 64), (4096, True, 4096)):
        plan = finetune.run(tmp_path / "model", **options, dry_run=True, seq_len=asked, beyond_context=beyond)
        assert plan["seq_len"] == rows
        said = "the base's context is 512 tokens, so rows have that and not" in capsys.readouterr().err
        assert said == (rows == 512)


@pytest.mark.parametrize(
    ("base", "before", "after", "words"),
    [
        (3.2, 5.0, 3.5, None),
        (3.2, 3.201, 3.201, "nothing to win back"),
        (3.2, 5.0, 5.001, "changed next to nothing"),
        (3.2, 5.0, 6.0, "made it worse"),
    ],
)
def test_what_a_training_did(base, before, after, words):
    report = {"held_out_perplexity_base": base, "held_out_perplexity_before": before, "held_out_perplexity": after}
    first, *more = outcome(report)
    assert first == f"held-out perplexity: {before:.3f} before, {after:.3f} after, {base:.3f} the base"
    assert (words is None and not more) or words in more[0]
    assert outcome({**report, "held_out_perplexity": None, "held_out_perplexity_before": None}) == []


def test_names_of_data_without_folders():
    assert without_folders("/home/me/a.jsonl:0.7,data/b.parquet:0.3") == "a.jsonl:0.7,b.parquet:0.3"
    assert without_folders("yahma/alpaca-cleaned") == "yahma/alpaca-cleaned"


def test_the_card_of_a_merged_model(tiny_base, tmp_path):
    """It does not say that no weight was changed, names no folder of this machine, and its figures have units."""
    convert.convert(str(tiny_base()), str(tmp_path / "model"))
    assert "Converting changes no weight" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "d.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n' * 40)
    (tmp_path / "r.yaml").write_text("seq_len: 64\nbatch_size: 2\nheld_out: 2\nschedule: constant\n")
    run = {"data": str(tmp_path / "d.jsonl"), "recipe": str(tmp_path / "r.yaml"), "max_steps": 1, "quiet": True}
    report = finetune.run(tmp_path / "model", output=tmp_path / "lora", **run)
    assert 0 < report["held_out_perplexity_base"] < 1000
    assert "for 1 step." in (tmp_path / "lora" / "README.md").read_text()
    merge.run(tmp_path / "lora", output=tmp_path / "merged", quiet=True)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "changes no weight" not in card and "Converting changed no weight; the fine-tuning below did." in card
    assert "data `d.jsonl`" in card and str(tmp_path) not in card
    assert re.search(r"\| 512 \| [\d.]+ KiB \| [\d.]+ KiB \|", card)
