"""What is fuzzed: for each kind of file a valid start, a way to spoil it, and the functions behind the commands."""

import contextlib
import io
import json
import os
import random
import shutil
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mutate import STRINGS, atom, dump, mutate_bytes, mutate_json

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64, "num_experts": 2,
    "num_local_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1,
    "sliding_window": 8, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "layer_types": ["full_attention"] * 2,
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text", "phi3",
            "olmo2", "cohere2", "gpt_oss", "smollm3", "exaone4", "stablelm", "granitemoe")  # fmt: skip
EXTRA_FILES = ("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
ROWS = (
    {"instruction": "w4", "input": "", "output": "w5 w6"},
    {"prompt": "w4 w5", "completion": "w6"},
    {"prompt": [{"role": "user", "content": "w4"}], "completion": [{"role": "assistant", "content": "w5"}]},
    {"text": "w4 w5 w6 w7"},
    {"messages": [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5"}]},
    {"conversations": [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w5"}]},
)


@dataclass
class World:
    """A scratch folder with valid starting points, made once, and a place outside that nothing may read."""

    root: Path
    made: dict = field(default_factory=dict)

    def __post_init__(self):
        self.root = self.root.resolve()
        self.outside = self.root / "outside"
        self.outside.mkdir(parents=True)
        for name in ("secret.json", "config.json", "model.safetensors", "README.md"):
            (self.outside / name).write_text('{"secret": 1}')

    def fresh(self, start: Path) -> Path:
        """A copy of a starting point that may be spoiled."""
        case = self.root / "case" / start.name
        shutil.rmtree(case.parent, ignore_errors=True)
        shutil.copytree(start, case)
        return case

    def base(self, model_type: str, shards: int = 1) -> Path:
        key = f"{model_type}-{shards}"
        if key not in self.made:
            from conftest import write_sparse_base

            folder = write_sparse_base(self.root / "starts" / key, model_type, shards, SIZES)
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
            self._tokenizer(folder)
            self.made[key] = folder
        return self.made[key]

    def warm(self) -> None:
        """Import what is imported on first use, which can take as long as a thousand inputs."""
        import datasets  # noqa: F401

        read_adapter(self, self.adapter)
        converted_readers(self.converted)
        _parquet()

    @cached_property
    def converted(self) -> Path:
        from liger_cli.commands.convert import convert

        target = self.root / "starts" / "converted"
        convert(str(self.base("qwen3")), str(target), softmax_layers="1", link="copy")
        return target

    @cached_property
    def adapter(self) -> Path:
        from conftest import write_shard

        from liger_cli.checkpoint.reader import fingerprint, read_weights
        from liger_cli.system.manifest import new_manifest, write_manifest

        target = self.root / "starts" / "adapter"
        target.mkdir(parents=True)
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
            "base_model_name_or_path": str(self.converted), "rank_pattern": {}, "alpha_pattern": {"q_proj": 8},
            "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
            "modules_to_save": None, "lora_bias": False,
        }  # fmt: skip
        (target / "adapter_config.json").write_text(json.dumps(config))
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        pair = [(f"{module}.lora_A.weight", (2, 16)), (f"{module}.lora_B.weight", (16, 2))]
        write_shard(target / "adapter_model.safetensors", pair, "F32", 4)
        found = fingerprint(read_weights(self.converted))
        base = {"path": str(self.converted), "name": "converted", "model_type": "liger_qwen3"}
        settings = {"recipe": {"name": "paper", "attention": "liger"}, "data": "demo"}
        write_manifest(target, new_manifest("adapter", base=base, fingerprint=found, settings=settings))
        return target

    @cached_property
    def tokenizer(self):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.base("qwen3"))

    def _tokenizer(self, folder: Path) -> None:
        words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, SIZES["vocab_size"])}
        special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        tokenizer = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": word, **special} for word, i in list(words.items())[:4]],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 64,
            "added_tokens_decoder": {str(i): {"content": word, **special} for word, i in list(words.items())[:4]},
            "chat_template": "{% for message in messages %}{{ message.content }} {% endfor %}",
        }  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def spoil(rng: random.Random, path: Path) -> None:
    """Change a JSON file: its values mostly, sometimes its bytes."""
    if rng.random() < 0.08:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:
        path.write_bytes(dump(rng, mutate_json(rng, json.loads(path.read_text()))))


def plan(folder: Path) -> None:
    from liger_cli.checkpoint.reader import read_checkpoint
    from liger_cli.conversion.card import base_licence
    from liger_cli.conversion.plan import make_plan

    checkpoint = read_checkpoint(folder)
    made = make_plan(checkpoint, {}, "none")
    made.layers(), made.memory(), made.parameters(), base_licence(checkpoint)


def config(world: World, rng: random.Random) -> None:
    """config.json of a base; every so often all the way to a converted folder."""
    folder = world.fresh(world.base(rng.choice(FAMILIES)))
    spoil(rng, folder / "config.json")
    plan(folder)
    if rng.random() < 0.02:
        from liger_cli.commands.convert import convert

        convert(str(folder), str(folder.parent / "out"), link="copy")


def index(world: World, rng: random.Random) -> None:
    """model.safetensors.index.json of a base in two shards."""
    folder = world.fresh(world.base("qwen3", 2))
    spoil(rng, folder / "model.safetensors.index.json")
    plan(folder)


def header(world: World, rng: random.Random) -> None:
    """A safetensors file: its JSON header, its length, its bytes."""
    folder = world.fresh(world.base(rng.choice(("qwen3", "qwen3_moe"))))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.3:
        path.write_bytes(mutate_bytes(rng, data[: 8 + length]) + data[8 + length :])
    else:
        raw = dump(rng, mutate_json(rng, json.loads(data[8 : 8 + length])))
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    plan(folder)


def tree(world: World, rng: random.Random) -> None:
    """A file of a folder becomes a link, a pipe, a device, a folder, or gets an odd name."""
    start = rng.choice((world.base("qwen3", 2), world.converted, world.adapter))
    folder = world.fresh(start)
    for path in rng.sample(sorted(folder.iterdir()), rng.choice((1, 1, 2))):
        path.unlink()
        way = rng.randrange(8)
        if way == 0:
            path.symlink_to(world.outside / rng.choice(("secret.json", "config.json", path.name)))
        elif way == 1:
            path.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/etc/passwd", "..", ".", path.name, "/")))
        elif way == 2:
            os.mkfifo(path)
        elif way == 3:
            path.mkdir()
        elif way == 4:
            path.write_bytes(b"")
        elif way == 5:
            path.symlink_to(Path("..") / ".." / "outside" / path.name)
        elif way == 6:
            with contextlib.suppress(OSError, ValueError):
                (folder / rng.choice(STRINGS).replace("/", "_")).write_text("x")
    inspect(folder)
    if start == world.adapter:
        read_adapter(world, folder)
    elif start == world.converted:
        converted_readers(folder)
    else:
        plan(folder)


def inspect(folder: Path) -> None:
    from liger_cli.commands.inspect import run
    from liger_cli.system.errors import LigerError

    with contextlib.suppress(LigerError), contextlib.redirect_stdout(io.StringIO()):
        run(str(folder))


def converted_readers(folder: Path) -> None:
    from liger_cli.checkpoint.converted import read_converted
    from liger_cli.checkpoint.model_code import load_config
    from liger_cli.checkpoint.tokenizer import load_tokenizer

    found = read_converted(folder)
    load_tokenizer(folder, load_config(folder, found.family))


def converted(world: World, rng: random.Random) -> None:
    """config.json of a converted folder, its liger block above all."""
    folder = world.fresh(world.converted)
    path = folder / "config.json"
    found = json.loads(path.read_text())
    if rng.random() < 0.6:
        found["liger"] = mutate_json(rng, found["liger"])
    else:
        found = mutate_json(rng, found)
    path.write_bytes(dump(rng, found))
    inspect(folder)
    converted_readers(folder)


def manifest(world: World, rng: random.Random) -> None:
    """liger.json of what liger made, read to find the newest folder, by inspect, merge and eval."""
    from liger_cli.checkpoint.folders import resolve_model
    from liger_cli.evaluation.subject import adapter_base, named_base
    from liger_cli.system.manifest import read_manifest

    start = rng.choice((world.converted, world.adapter))
    folder = world.fresh(start)
    spoil(rng, folder / "liger.json")
    inspect(folder)
    found = read_manifest(folder)
    if found is not None:
        named_base(found)
        if start == world.adapter:
            read_adapter(world, folder)
            adapter_base(folder, found)
    with contextlib.redirect_stderr(io.StringIO()):
        resolve_model(None, rng.choice(("finetune", "merge", "eval", "bench")), folder.parent)


def adapter(world: World, rng: random.Random) -> None:
    """adapter_config.json and the header of the adapter's weights."""
    folder = world.fresh(world.adapter)
    if rng.random() < 0.7:
        spoil(rng, folder / "adapter_config.json")
    else:
        path = folder / "adapter_model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        raw = dump(rng, mutate_json(rng, json.loads(data[8 : 8 + length])))
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    read_adapter(world, folder)


def read_adapter(world: World, folder: Path) -> None:
    from liger_cli.checkpoint import adapters
    from liger_cli.checkpoint.reader import read_weights

    found = adapters.read_adapter(folder)
    model = adapters.base_of_adapter(found, None)
    adapters.check_shapes(found, model, read_weights(model))
    adapters.peft_config(found)
    adapters.window_only([found])


def tokenizer(world: World, rng: random.Random) -> None:
    """The files of a tokenizer, then the tokenizer on a conversation."""
    from liger_cli.checkpoint.model_code import load_config
    from liger_cli.checkpoint.tokenizer import load_tokenizer
    from liger_cli.system.errors import LigerError
    from liger_cli.training.conversations import conversation_documents, read_conversation, template_of
    from liger_cli.training.data import encode

    folder = world.fresh(world.converted)
    name = rng.choice((*TOKENIZER_FILES, *TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "extra"))
    if name in TOKENIZER_FILES:
        spoil(rng, folder / name)
    elif name == "extra":
        (
            folder / rng.choice(("chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json"))
        ).write_bytes(
            rng.choice((rng.choice(STRINGS).encode("utf-8", "surrogatepass"), dump(rng, atom(rng)), rng.randbytes(64)))
        )
    else:
        (folder / name).write_bytes(
            dump(rng, mutate_json(rng, {"pad_token": "<pad>", "w": 3, "x": {"content": "<x>"}}))
        )
    found = load_tokenizer(folder, load_config(folder))
    try:
        documents = conversation_documents(read_conversation(ROWS[4]["messages"], template_of(found)), found)
    except ValueError as error:  # what layouts.documents counts
        raise LigerError(str(error)) from None
    list(encode(documents, found, 16))


def recipe(world: World, rng: random.Random) -> None:
    """A recipe: YAML of changed values, changed text, and bytes."""
    import yaml

    from liger_cli.training.recipes import load_recipe, override, recipe_names

    shipped = load_recipe(rng.choice(recipe_names())).to_dict()
    case = world.root / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    if rng.random() < 0.6:
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            shipped = yaml.safe_dump(mutate_json(rng, shipped), allow_unicode=rng.random() < 0.5)
    text = shipped if isinstance(shipped, str) else yaml.safe_dump(shipped)
    if rng.random() < 0.5:
        lines = text.splitlines()
        extra = (
            "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "epochs: 1e999", "epochs: .inf", "seed: 0x" + "f" * 3000,
            "lr: 1:2:3:4:5:6:7", "name: !!python/object/apply:os.system [id]", "? [a, b]\n: c", "<<: {epochs: 3}",
            "epochs: 2026-13-45", "max_steps: " + "9" * 5000, "x: !!float ''", "x: !!binary '='", "%YAML 9.9",
            "--- ---",
            "name: !!timestamp 2001-99-14", "stages: " + "[" * 500, "\t- a", "name: \"\\ud800\"", "*x", "epochs: ~",
        )  # fmt: skip
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(extra))
        text = "\n".join(lines)
    raw = text.encode("utf-8", "surrogatepass")
    path = case / "r.yaml"
    path.write_bytes(mutate_bytes(rng, raw) if rng.random() < 0.2 else raw)
    found = load_recipe(str(path))
    override(found, epochs=1.5).stage_ends(100)


def data(world: World, rng: random.Random) -> None:
    """Training data in every layout and kind of file."""
    from liger_cli.training.data import load_data

    case = world.root / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    rows = [dict(rng.choice(ROWS)) for _ in range(1)] * rng.choice((1, 3))
    rows = mutate_json(rng, rows)
    suffix = rng.choice((".jsonl", ".jsonl", ".json", ".csv", ".txt", ".parquet"))
    path = case / f"data{suffix}"
    if suffix == ".jsonl":
        lines = rows if isinstance(rows, list) else [rows]
        raw = b"\n".join(dump(rng, row) for row in lines)
    elif suffix == ".json":
        raw = dump(rng, rows)
    elif suffix == ".csv":
        raw = b"instruction,input,output\n" + b"\n".join(
            f'"{one}",w4,"w5"'.encode("utf-8", "replace") for one in STRINGS[:9]
        )
        raw = mutate_bytes(rng, raw)
    elif suffix == ".txt":
        raw = mutate_bytes(rng, b"w4 w5 w6\n<|endoftext|>\nw7 w8")
    else:
        raw = mutate_bytes(rng, world.made.setdefault("parquet", _parquet()))
    path.write_bytes(raw)
    load_data(str(path), world.tokenizer, 16, 1)


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["w4 w5", "w6 w7"] * 20}), out)
    return out.getvalue()


def texts(world: World, rng: random.Random) -> None:
    """The texts that eval measures perplexity on."""
    from liger_cli.evaluation.scoring import make_rows, read_texts

    case = world.root / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    path = case / rng.choice(("t.jsonl", "t.txt"))
    lines = [dump(rng, mutate_json(rng, {"text": "w4 w5 w6"})) for _ in range(3)]
    path.write_bytes(mutate_bytes(rng, b"\n".join(lines)) if rng.random() < 0.5 else b"\n".join(lines))
    make_rows(world.tokenizer, read_texts(path), 8)


def results(world: World, rng: random.Random) -> None:
    """results.json, shown by `eval --from` in every format, and made a section of a card."""
    from results_example import RESULTS

    from liger_cli.commands.evaluate import run
    from liger_cli.evaluation.results_card import refresh_card
    from liger_cli.system.tables import FORMATS

    case = world.root / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    (case / "results.json").write_bytes(dump(rng, mutate_json(rng, RESULTS)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(compare=(str(case),), output_format=rng.choice(FORMATS))
    refresh_card(case)


TARGETS = {
    one.__name__: one
    for one in (config, index, header, tree, converted, manifest, adapter, tokenizer, recipe, data, texts, results)
}
