"""A converted folder's AutoTokenizer gives the base's ids, whatever class its tokenizer_config.json names."""

import json
import shutil

import pytest

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.reader import Checkpoint, support_files
from liger_cli.checkpoint.tokenizer import CONFIG, VOCABULARY, converted_tokenizer_config, load_tokenizer
from liger_cli.commands.convert import convert
from liger_cli.shipped import BASE_DIR

TEXT = "Heron owes 42 crowns\n\n  don't 1234"
NAMED = (*(f"{name}TokenizerFast" for name in ("PreTrained", "Llama", "GPT2", "GPTNeoX")), "Qwen2Tokenizer", None)


def write_tokenizer(folder, model_type, named):
    """The shipped base's tokenizer, its digits split off one by one: no class of transformers does just that."""
    folder.mkdir(parents=True)
    vocabulary = json.loads((BASE_DIR / VOCABULARY).read_text())
    digits = {"type": "Digits", "individual_digits": True}
    vocabulary["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, vocabulary["pre_tokenizer"]]}
    (folder / VOCABULARY).write_text(json.dumps(vocabulary))
    config = json.loads((BASE_DIR / CONFIG).read_text())
    del config["tokenizer_class"], config["backend"]
    (folder / CONFIG).write_text(json.dumps(config | ({"tokenizer_class": named} if named else {})))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def as_checkpoint(folder):
    """What of a checkpoint decides the class."""
    config = json.loads((folder / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    return Checkpoint(folder, config, family, None, (), False, support_files(folder))


def read(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return type(tokenizer).__name__, tokenizer(TEXT)["input_ids"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_class_is_the_bases(tmp_path, model_type):
    compared = 0
    for named in NAMED:
        base, converted = (tmp_path / kind / str(named) for kind in ("base", "converted"))
        write_tokenizer(base, model_type, named)
        write_tokenizer(converted, f"liger_{model_type}", named)
        text = converted_tokenizer_config(as_checkpoint(base))
        if text is not None:
            (converted / CONFIG).write_text(text)
        try:
            wanted = read(base)
        except Exception:  # a class that this vocabulary does not fit: the base cannot be loaded either
            continue
        assert read(converted) == wanted, named
        compared += 1
    assert compared >= len(NAMED) - 1


def test_convert_names_the_bases_class(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base("qwen2"), base)
    config = json.loads((base / CONFIG).read_text()) | {"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 77}
    (base / CONFIG).write_text(json.dumps(config))
    convert(str(base), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == config | {"tokenizer_class": "Qwen2Tokenizer"}
    assert read(tmp_path / "out") == read(base)
    assert json.loads((base / CONFIG).read_text()) == config


LAYOUTS = {
    "tokenizer.json alone": {},
    "vocab.json and merges.txt alone": {"split": True},
    "with special_tokens_map.json": {"special": {"eos_token": "<|padding|>", "bos_token": "<|endoftext|>"}},
    "named by config.json": {"named": "GPT2Tokenizer"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "starcoder2", "phi", "olmo", "cohere"])
def test_without_a_tokenizer_config(tmp_path, sparse_base, model_type, layout):
    """Ids and special tokens are the base's."""
    from transformers import AutoTokenizer

    base, given = sparse_base(model_type=model_type), LAYOUTS[layout]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tokenizer_class": given.get("named")}))
    if "split" in given:
        model = json.loads((BASE_DIR / VOCABULARY).read_text())["model"]
        (base / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(one if isinstance(one, str) else " ".join(one) for one in model["merges"])
        (base / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    else:
        shutil.copy(BASE_DIR / VOCABULARY, base)
    if "special" in given:
        (base / "special_tokens_map.json").write_text(json.dumps(given["special"]))
    convert(str(base), str(tmp_path / "out"))

    def found(load, folder):
        tokenizer = load(folder)
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        return type(tokenizer).__name__, tokenizer(TEXT).input_ids, *(getattr(tokenizer, name) for name in names)

    try:
        wanted = found(AutoTokenizer.from_pretrained, base)
    except Exception:
        assert "split" in given  # every other layout says enough
        return
    assert found(load_tokenizer, tmp_path / "out") == wanted
    assert (
        found(lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=True), tmp_path / "out") == wanted
    )
