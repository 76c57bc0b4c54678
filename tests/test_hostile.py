"""Folders, recipes, data and results that strangers made: one sentence, no code of theirs, nothing outside, no wait."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import write_shard

from liger_cli.checkpoint import adapters
from liger_cli.checkpoint.converted import read_converted
from liger_cli.checkpoint.folders import resolve_model
from liger_cli.checkpoint.model_code import load_model
from liger_cli.checkpoint.reader import inside, read_checkpoint, read_shard
from liger_cli.checkpoint.tokenizer import load_tokenizer
from liger_cli.commands import bench, convert, evaluate, finetune, merge
from liger_cli.commands import inspect as inspection
from liger_cli.evaluation.results_card import refresh_card
from liger_cli.evaluation.scoring import read_texts
from liger_cli.evaluation.subject import open_subject
from liger_cli.system.errors import LigerError, ModelError, UsageError, guarded
from liger_cli.system.escape import code_span, csv_cell, markdown, printable, yaml_string
from liger_cli.system.manifest import read_manifest
from liger_cli.system.tables import Table, print_tables
from liger_cli.training.conversations import conversation_documents, read_conversation
from liger_cli.training.data import load_data, read_rows
from liger_cli.training.recipes import load_recipe
from liger_cli.training.view import write_plot

FUZZ = Path(__file__).parent / "fuzz"
EVIL = "---\nlicense: x\n{{ 7*7 }} <script>`|$\\frac{$ [red]\x1b]0;owned\x07 \u202egpj"


def test_a_thousand_inputs(tmp_path):
    """In a process of its own, which a crash in a library would end. `nox -s hostile` gives many more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(FUZZ / "run.py"), "1000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 findings" in done.stdout and "'refused'" in done.stdout


def edit(path, **changes):
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **changes}))


@pytest.fixture
def converted(tiny_base, tmp_path):
    target = tmp_path / "converted"
    convert.convert(str(tiny_base()), str(target), link="copy")
    return target


# --- found by fuzzing, or by reading for it ---


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"layer_types": 5}),
        ("qwen3", {"architectures": 5}),
        ("qwen3", {"architectures": [{"a": 1}]}),
        ("qwen3", {"max_window_layers": "x", "use_sliding_window": True, "sliding_window": 4}),
        ("qwen3", {"num_attention_heads": 10**9, "num_key_value_heads": 10**9}),
        ("qwen3", {"model_type": "q" * 10**6}),
        ("mixtral", {"num_local_experts": 10**12}),
        ("mixtral", {"num_local_experts": "2"}),
        ("qwen3_moe", {"mlp_only_layers": 3}),
        ("phi3", {"intermediate_size": None}),
        ("smollm3", {"no_rope_layers": [1], "use_sliding_window": True, "sliding_window": 4}),
        ("gemma2", {"sliding_window_pattern": [2]}),
    ],
)
def test_configs_that_made_a_traceback(sparse_base, model_type, changes):
    extra = {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 8}
    from conftest import TINY

    folder = sparse_base(model_type=model_type, config={**TINY, **extra})
    edit(folder / "config.json", **changes)
    began = time.process_time()
    with pytest.raises(ModelError):
        read_checkpoint(folder)
    assert time.process_time() - began < 5


def test_a_shape_whose_product_takes_for_ever(tmp_path):
    raw = b'{"a": {"dtype": "F32", "shape": [' + b",".join([b"9"] * 1_000_000) + b'], "data_offsets": [0, 4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    began = time.process_time()
    with pytest.raises(ModelError, match="dimensions"):
        read_shard(tmp_path.resolve(), "x.safetensors")
    assert time.process_time() - began < 10


def test_names_that_no_path_can_have(tmp_path):
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(ModelError):
            inside(tmp_path.resolve(), name)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nname: *a",
        "max_steps: " + "9" * 5000,
        "epochs: .inf",
        "epochs: 1e999",
        "max_steps: 1000000000000",
        "seq_len: 0xffffffffffff",
        "name: [a]",
        "target_modules: q_proj",
        "stages: {lr: 1}",
        "x: !!float ''",
        "name: !!timestamp 2001-99-14",
        "name: !!python/object/apply:os.system [id]",
        "x: " + "[" * 20_000,
        b"\xff\xfe",
        "#" * 100_000,
    ],
)
def test_recipes(tmp_path, text):
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "r.yaml"))
    assert len(str(caught.value)) < 1000


def test_nested_lines_do_not_crash_the_process(tmp_path):
    """The reader in C++ of `datasets` overflowed its stack on such a line."""
    for name, text in (("a.jsonl", '{"a":' * 50_000), ("b.json", "[" * 50_000), ("c.jsonl", '{"text": "x"}\n[]')):
        (tmp_path / name).write_text(text)
        with pytest.raises(LigerError):
            list(read_rows(str(tmp_path / name)))


def test_half_a_surrogate_pair_is_no_text(tmp_path, tiny_base):
    """JSON can write it, and tokenizers take it for a wrong type."""
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "w5 w6 \\ud800 w7"}\n' * 30)
    with pytest.raises(LigerError, match="surrogate"):
        read_texts(file)
    with pytest.raises(LigerError, match="surrogate pair.: 30"):
        load_data(str(file), load_tokenizer(tiny_base()), 64, 2, 0)


def test_pipes_and_devices_are_not_waited_for(tmp_path, converted):
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other" / "liger.json")
    assert resolve_model(None, "finetune", tmp_path) == converted
    for name in ("config.json", "tokenizer.json", "README.md", "liger.json"):
        (converted / name).unlink()
        os.mkfifo(converted / name)
    assert read_manifest(converted) is None
    with pytest.raises(ModelError):
        read_converted(converted)
    with pytest.raises(ModelError):
        load_tokenizer(converted)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "results.json").symlink_to("/dev/zero")
    with pytest.raises(LigerError):
        evaluate.run(compare=(str(tmp_path / "r"),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_implementation": "kernels-community/evil"}, "implementation"),
        ({"quantization_config": {"quant_method": "x"}}, "quantized"),
        ({"num_hidden_layers": 40}, "layers"),
        ({"vocab_size": 10**9}, "fit"),
        ({"rope_scaling": {"rope_type": "evil"}, "rope_parameters": {"rope_type": "evil"}}, "evil"),
        ({"hidden_act": "evil"}, "evil"),
    ],
)
def test_configs_of_converted_folders(converted, changes, words):
    edit(converted / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_model(converted)


def test_an_adapter_in_a_model_leads_elsewhere(converted):
    (converted / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    with pytest.raises(ModelError, match="adapter"):
        load_model(converted)


def test_tokenizers_open_their_own_files_only(converted, tmp_path):
    shutil.copy(converted / "tokenizer.json", tmp_path / "elsewhere.json")
    (converted / "tokenizer.json").unlink()
    edit(converted / "tokenizer_config.json", tokenizer_file=str(tmp_path / "elsewhere.json"))
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(converted)
    (converted / "tekken.json").write_text("{}")  # it does go on to loading, then
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(converted)
    (converted / "tekken.json").unlink()
    (converted / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match="outside"):
        load_tokenizer(converted)


def test_a_path_in_a_tokenizer_config_is_replaced_by_the_folders_own_file(converted):
    """Published tokenizers name paths of their makers' machines; that is no reason to refuse them."""
    edit(converted / "tokenizer_config.json", tokenizer_file="/home/somebody/tokenizer.json", vocab_file="/etc/passwd")
    assert load_tokenizer(converted)("w5 w6")["input_ids"][-2:] == [5, 6]


def test_chat_templates_that_fail():
    template = SimpleNamespace(chat_template="x", apply_chat_template=lambda *_, **__: 1 / 0)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="chat template"):
        conversation_documents(read_conversation(messages, "x"), template)
    with pytest.raises(ValueError, match="turns"):
        read_conversation(messages * 1000, "x")


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "nowhere"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 10**12}, "rank"),
        ({"r": None}, "rank"),
        ({"lora_alpha": "4"}, "lora_alpha"),
        ({"rank_pattern": {"(a+)+$": 3}}, "pattern"),
        ({"rank_pattern": {"[": 3}}, "pattern"),
        ({"alpha_pattern": 3}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": ["x"]}, "only LoRA"),
    ],
)
def test_adapters(tmp_path, changes, words):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    write_shard(
        tmp_path / "adapter_model.safetensors",
        [(f"{module}.lora_A.weight", (2, 64)), (f"{module}.lora_B.weight", (64, 2))],
        "F32",
        4,
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    assert adapters.read_adapter(tmp_path).updates
    edit(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=words):
        adapters.read_adapter(tmp_path)


def test_peft_is_given_nothing_of_the_adapters_config(tmp_path):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    write_shard(
        tmp_path / "adapter_model.safetensors",
        [(f"{module}.lora_A.weight", (2, 64)), (f"{module}.lora_B.weight", (64, 2))],
        "F32",
        4,
    )
    evil = {**ADAPTER, "auto_mapping": {"parent_library": "evil"}, "megatron_core": "evil", "target_modules": "(a+)+$"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(evil))
    config = adapters.peft_config(adapters.read_adapter(tmp_path))
    assert config.auto_mapping is None and config.megatron_core != "evil"
    assert config.target_modules == {"model.layers.0.self_attn.q_proj"}
    assert (config.r, config.lora_alpha) == (2, 4)


def test_a_recipe_in_a_manifest_that_is_none():
    adapter = SimpleNamespace(manifest={"settings": {"recipe": {"attention": [1]}}})
    assert adapters.window_only([adapter]) is False


def test_manifests_of_other_kinds(tmp_path):
    for text in ('{"kind": "adapter", "base": []}', '{"kind": ["adapter"]}', '{"kind": "merged", "settings": 3}', "["):
        (tmp_path / "liger.json").write_text(text)
        assert read_manifest(tmp_path) is None


# --- code ---


def canary(folder: Path, mark: Path) -> None:
    """Python that leaves a mark when it runs, under every name that transformers looks for."""
    code = f"open({str(mark)!r}, 'a').write(__name__ + chr(10))\n"
    names = [path.name for path in folder.glob("*.py")]
    for name in {*names, "evil.py", "modeling_evil.py", "tokenization_evil.py", "custom_generate/generate.py"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        if "liger" not in config:
            edit(folder / "config.json", auto_map=auto_map)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}}
    if (folder / "tokenizer_config.json").exists():
        edit(folder / "tokenizer_config.json", **tokenizer)


def test_no_command_runs_a_folders_code(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mark, base = tmp_path / "mark", tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    canary(base, mark)
    convert.convert(str(base), "model")
    canary(tmp_path / "model", mark)
    settings = {"seq_len": 64, "batch_size": 2, "held_out": 0, "schedule": "constant"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "d.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n' * 40)
    finetune.run("model", data="d.jsonl", recipe="r.yaml", max_steps=1, quiet=True)
    adapter = tmp_path / "model-lora"
    canary(adapter, mark)
    edit(adapter / "adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    for folder in ("model", "model-lora"):
        result = evaluate.evaluate(open_subject(Path(folder)), texts=["w5 w6 w7 w8 " * 400], samples=1)
        assert result["recall"] and result["samples"]
    merge.run("model-lora", output="merged", quiet=True)
    assert not (tmp_path / "merged" / "evil.py").exists()
    assert "open(" not in (tmp_path / "merged" / "liger_model.py").read_text()[:200]
    canary(tmp_path / "merged", mark)
    open_subject(Path("merged"))
    open_subject(Path("merged"), against=str(base))
    bench.run("merged", seq_len=16, new_tokens=2, repetitions=1, save=False)
    for folder in ("base", "model", "model-lora", "merged"):
        inspection.run(folder)
    assert inspection.run("model") == 1
    convert.refresh("model")
    capsys.readouterr()
    assert not mark.exists(), mark.read_text()
    subprocess.run([sys.executable, str(base / "evil.py")], check=True)
    assert mark.exists()  # the canary sings where it is run


def test_pickles_of_a_checkpoint_are_not_run(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.convert(str(tiny_base()), "model")
    settings = {"seq_len": 64, "batch_size": 2, "held_out": 0, "schedule": "constant", "save_steps": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "d.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n' * 40)
    finetune.run("model", data="d.jsonl", recipe="r.yaml", max_steps=2, quiet=True)
    manifest = read_manifest(tmp_path / "model-lora")
    partial = tmp_path / "model-lora.partial"
    shutil.copytree(tmp_path / "model-lora", partial)
    shutil.rmtree(tmp_path / "model-lora")
    shutil.rmtree(partial / "checkpoints" / "checkpoint-2")
    run = {**manifest["settings"], "fingerprint": manifest["fingerprint"]["digest"]}
    (partial / "run.json").write_text(json.dumps(run))
    checkpoint = partial / "checkpoints" / "checkpoint-1"
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(mark)!r}, 'w')",)

    assert (checkpoint / "optimizer.pt").exists()
    for name in ("training_args.bin", "optimizer.pt"):  # the first is never read, the second as tensors only
        (checkpoint / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(LigerError, match="more than tensors"):
        finetune.run("model", output="model-lora", resume=True, quiet=True)
    assert not mark.exists()


def test_the_base_to_compare_with_is_never_a_pickle(converted, tiny_base, tmp_path):
    import torch

    base = tmp_path / "pickled"
    shutil.copytree(tiny_base(), base)
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        open_subject(converted, against=str(base))


# --- reads and writes outside ---


def test_merge_copies_nothing_from_outside(tiny_base, tmp_path, converted):
    (tmp_path / "secret").write_text("secret")
    (converted / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside"):
        convert.refresh(str(converted))
    (converted / "notes.txt").unlink()
    (converted / "sub").symlink_to(tmp_path)
    with pytest.raises(ModelError, match="link to a folder"):
        convert.refresh(str(converted))


# --- what is shown ---


def test_a_hostile_name_stays_text(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / EVIL.replace("/", "_")
    shutil.copytree(tiny_base(), base)
    convert.run(base=str(base), output="out")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "[red]" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["base_model"] == base.name and fields["license"] == "apache-2.0"
    assert "{{ 7*7 }}" in body and "49 <script>" not in body
    assert "\x1b" not in card and "\u202e" not in card
    assert all(line.count("`") % 2 == 0 for line in body.replace("```", "").splitlines())
    inspection.run("out")
    assert "\x1b" not in capsys.readouterr().out


def test_errors_obey_no_terminal_code(capsys):
    def fail():
        raise UsageError(f"{EVIL} is wrong {'x' * 10_000}")

    assert guarded(fail) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\u202e" not in shown and shown.count("\n") == 1 and len(shown) < 2200
    assert "[red]" in shown


def test_a_panic_is_one_sentence(capsys):
    panic = type("PanicException", (BaseException,), {})

    def fail():
        raise panic("index out of bounds")

    assert guarded(fail) == 1
    assert "PanicException" in capsys.readouterr().err


@pytest.mark.parametrize("output_format", ["table", "md", "csv"])
def test_cells_stay_text(capsys, output_format):
    table = Table(EVIL, ["", EVIL], [[EVIL, "=1+1"], ["+x", "-1.5"], ["@x", "-"], ["-x", "-3 %"]])
    print_tables([table], output_format, (EVIL,))
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out
    if output_format == "csv":
        rows = list(csv.reader(io.StringIO(out)))
        assert [row[0][0] for row in rows[2:]] == ["'", "'", "'"]
        assert rows[1][1] == "'=1+1" and rows[2][1] == "-1.5" and rows[3][1] == "-"
    if output_format == "md":
        assert "<script>" not in out.replace("\\<script\\>", "") or "\\<script\\>" in out


def test_escapes():
    assert printable("a\x1b\u202e\ud800é日 b") == "a\\x1b\\u202e\\ud800é日 b"
    assert yaml.safe_load(yaml_string('a: "b"\n\x85\u2028\\😀')) == 'a: "b"\n\x85\u2028\\😀'
    assert markdown("[a](b)<i>") == "\\[a\\](b)\\<i\\>"
    assert code_span("a`b|c\nd") == "`a'b\\|c\\nd`"
    assert [csv_cell(text) for text in ("=a", "-1", "-1.5 %", "a", "1,000")] == ["'=a", "-1", "-1.5 %", "a", "1,000"]


def test_results_of_a_stranger_in_a_card(tmp_path):
    sys.path.insert(0, str(FUZZ))
    from results_example import RESULTS

    found = json.loads(json.dumps(RESULTS))
    found["eval"]["perplexity"]["text"]["name"] = f"{EVIL} <!-- end of results -->"
    found["eval"]["model"]["base_column"]["source"] = "[x](http://evil)"
    found["eval"]["plots"] = ["../../secret.png", "x.png](http://evil/y.png", "recall.png"]
    found["eval"]["versions"]["liger"] = "<img src=x>"
    (tmp_path / "results.json").write_text(json.dumps(found))
    for _ in range(2):
        refresh_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("<!-- end of results -->") == 1 and card.count("## Results") == 1
    assert "![Evaluation](recall.png)" in card and "secret" not in card
    assert "\\[x\\](http://evil)" in card and not re.search(r"(?<!\\)\]\(http", card)
    assert not re.search(r"(?<!\\)<img", card) and "\x1b" not in card
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="outside"):
        refresh_card(tmp_path)


def test_an_id_far_beyond_the_vocabulary(converted):
    """transformers 5.17 made a list of two thousand million tokens of it."""
    path = converted / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[next(iter(vocabulary))] = 2**31 - 1
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="gives a token the id 2147483647, but holds"):
        load_tokenizer(converted)


def test_a_recipes_name_is_no_formula(tmp_path):
    recipe = SimpleNamespace(name="$\\frac{$", stages=[SimpleNamespace(objective="ce")])
    write_plot([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], tmp_path / "loss.png", recipe)
    assert (tmp_path / "loss.png").stat().st_size > 1000
