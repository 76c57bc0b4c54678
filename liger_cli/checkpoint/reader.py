"""Reading a base model's folder without loading a tensor and without running anything found in it.

What is read: config.json, the safetensors index, and the headers of the shards. Everything is checked before use, since
the folder was written by somebody else.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from liger_cli.checkpoint.experimental import experimental_family
from liger_cli.checkpoint.families import FAMILIES, Family
from liger_cli.checkpoint.family_tensors import decoder_tensors
from liger_cli.checkpoint.paper_folders import as_base
from liger_cli.system.errors import LigerError, ModelError, UsageError
from liger_cli.system.untrusted import read_json, refuse_pointer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXTRAS = "model-liger.safetensors"  # tensors that a conversion added
ADAPTER_CONFIG = "adapter_config.json"
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as torch and as safetensors name them
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
MAX_COUNT = 1 << 14  # heads, experts: what is gone through one by one
MAX_DIMS = 16  # of a tensor
SAMPLES, SAMPLE_BYTES = 64, 64 << 10

TORCH_DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double")
# Fields of config.json that tell a program how to run a model and nothing about the model, with the values that do no
# harm. With others, left behind by training scripts, it cannot be loaded here or returns something unexpected.
RUN_FIELDS = {
    **dict.fromkeys(("_attn_implementation", "attn_implementation"), (None, "eager", "sdpa")),
    **dict.fromkeys(("_experts_implementation", "experts_implementation"), (None,)),
    **dict.fromkeys(("return_dict", "use_return_dict", "use_cache"), (None, True)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "torchscript", "is_encoder_decoder"), (None, False)),
    **dict.fromkeys(("dtype", "torch_dtype"), (None, *TORCH_DTYPES, *(f"torch.{name}" for name in TORCH_DTYPES))),
}
TOKENIZER_NAMES = {
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tekken.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip
SENTENCEPIECE = re.compile(r"[\w.-]+\.model(\.v\d+)?")
LICENCE = re.compile(r"[^/]*(licen[sc]e|notice|copying|use_policy)[^/]*", re.IGNORECASE)
LICENCE_SUFFIXES = ("", ".txt", ".md", ".rst", ".pdf")
LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
ANY_LAYER = re.compile(r"(|[\w.-]{0,200}\.)layers\.\d{1,6}\.")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header. Its data are `nbytes` bytes of the shard, from `begin` behind the header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose header was read and fits the file.

    Attributes:
        name: its name in the base folder; path: the real file, links followed.
        size: bytes of the whole file; header: its raw JSON header.
    """

    name: str
    path: Path
    size: int
    header: bytes
    tensors: dict[str, Tensor]

    def read(self, name: str) -> bytearray:
        """The bytes of one tensor, read and not mapped: a mapped file that others shorten is a bus error.

        Raises LigerError where the file has ended by now.
        """
        content = bytearray(self.tensors[name].nbytes)
        with open(self.path, "rb") as file:
            file.seek(8 + len(self.header) + self.tensors[name].begin)
            if file.readinto(content) < len(content):
                raise LigerError(f"{self.path} was changed while it was read; run the command again")
        return content

    def fingerprint(self) -> dict:
        """Size, hash of the header and hash of 64 samples of 64 KiB, evenly spaced (a small shard is hashed whole)."""
        samples = hashlib.sha256()
        with open(self.path, "rb") as file:
            if self.size <= SAMPLES * SAMPLE_BYTES:
                samples.update(file.read())
            else:
                for index in range(SAMPLES):
                    file.seek(index * (self.size - SAMPLE_BYTES) // (SAMPLES - 1))
                    samples.update(file.read(SAMPLE_BYTES))
        return {
            "file": self.name,
            "size": self.size,
            "header_sha256": hashlib.sha256(self.header).hexdigest(),
            "samples_sha256": samples.hexdigest(),
        }


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide the shapes of tensors and of the state, from config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: dict) -> "Geometry":
        """Raises ModelError where a size is missing, is not a positive whole number, or does not divide."""
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        kv_heads = _positive(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        head_dim = _positive(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
        if heads % kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if heads > MAX_COUNT:
            raise ModelError(f"config.json: num_attention_heads is {heads}, more than {MAX_COUNT}")
        layers, vocab = _positive(config, "num_hidden_layers"), _positive(config, "vocab_size")
        return cls(layers, hidden, heads, kv_heads, head_dim, vocab)


def context_length(config: dict) -> int | None:
    """Tokens that a base was made for: max_position_embeddings, or what its rotary scaling makes of it.

    Args:
        config: of config.json, or `to_dict()` of a config of transformers.
    Returns:
        None where it does not say.
    """
    known = config.get("max_position_embeddings")
    if not (isinstance(known, int) and known > 0):
        return None
    longest = known
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for scaling in (rope, *(rope.values() if isinstance(rope, dict) else ())):
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        if not (isinstance(factor, (int, float)) and 1 <= factor < MAX_COUNT):
            continue
        kind = scaling.get("rope_type") or scaling.get("type")
        original = scaling.get("original_max_position_embeddings")
        if isinstance(original, int) and original > 0:
            longest = max(longest, round(factor * original))
        elif kind in ("linear", "dynamic"):
            longest = max(longest, round(factor * known))
    return longest


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was read and found whole.

    Attributes:
        folder: resolved path.
        config: config.json, every field as it stands there but for those that are `left_out`.
        shards: in the order of their names.
        indexed: whether the shards are named by an index that has to go along.
        support_files: tokenizer, generation config, chat template and licences: relative name -> real file.
        paper_gate: the gate of a folder of the paper's own code, whose `config` is then its base's; else None.
        left_out: names of the fields of config.json that say how to run the model and not what it is.
    """

    folder: Path
    config: dict
    family: Family
    geometry: Geometry
    shards: tuple[Shard, ...]
    indexed: bool
    support_files: dict[str, Path]
    paper_gate: str | None = None
    left_out: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}


def read_checkpoint(folder: Path, experimental: bool = False) -> Checkpoint:
    """Read and check a base model's folder.

    Args:
        experimental: take model types that `FAMILIES` does not have.
    Raises:
        UsageError: no such folder.
        ModelError: an unsupported, converted, quantized, multimodal, incomplete or broken model.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give a model's folder or a hub id such as Qwen/Qwen3-8B")
    folder = folder.resolve()
    found = read_config(folder)
    config, paper_gate = as_base(model_fields(found))
    refuse_adapter(folder, folder)
    checkpoint = read_parts(folder, config, supported_family(config, folder, experimental), paper_gate)
    return replace(checkpoint, left_out=tuple(name for name in found if name not in config))


def model_fields(config: dict) -> dict:
    """config.json without the fields that say how to run the model and not what it is (`RUN_FIELDS`)."""
    return {name: value for name, value in config.items() if name not in RUN_FIELDS or value in RUN_FIELDS[name]}


def refuse_adapter(folder: Path, named) -> None:
    """Raises ModelError where an adapter lies beside a model's config.json: transformers applies it to the weights."""
    if os.path.lexists(folder / ADAPTER_CONFIG):
        raise ModelError(
            f"{named} is a model with an adapter in it ({ADAPTER_CONFIG}), which transformers applies to the weights; "
            "merge it into them with PEFT's merge_and_unload, or move it elsewhere"
        )


def read_parts(folder: Path, config: dict, family: Family, paper_gate: str | None = None) -> Checkpoint:
    """What belongs to a config.json, a base's or a converted folder's: weights and support files, read and checked.

    Args:
        folder: resolved.
    Raises:
        ModelError: the weights are incomplete, broken or not those of the config.
    """
    check_fields(family, config)
    geometry = Geometry.of(family.with_defaults(config))
    names, weight_map = _shard_names(folder)
    shards = tuple(read_shard(folder, name) for name in names)
    checkpoint = Checkpoint(
        folder,
        config,
        family,
        geometry,
        shards,
        weight_map is not None,
        support_files(folder),
        paper_gate,
    )
    if weight_map is not None:
        _check_index(weight_map, checkpoint)
    _check_tensors(checkpoint)
    return checkpoint


def file_sha256(path: Path) -> str:
    """Of a whole file, a block at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read_weights(folder: Path) -> tuple[Shard, ...]:
    """The shards of any model folder, a converted one too. Raises ModelError as `read_checkpoint` does."""
    folder = folder.resolve()
    return tuple(read_shard(folder, name) for name in _shard_names(folder)[0])


def fingerprint(shards: tuple[Shard, ...]) -> dict:
    """Identifies weights, whatever their files are called: a digest over all shards, and each shard's own."""
    entries = [shard.fingerprint() for shard in shards]
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry['size']} {entry['header_sha256']} {entry['samples_sha256']}\n".encode())
    return {"digest": f"sha256:{digest.hexdigest()}", "shards": entries}


def read_config(folder: Path) -> dict:
    """config.json as a dict. Raises ModelError where it is missing or is not a JSON object."""
    if not os.path.lexists(folder / "config.json"):
        if os.path.lexists(folder / ADAPTER_CONFIG):
            raise ModelError(f"{folder} is an adapter, not a model; merge it into its base first")
        found = sorted(folder.glob("*.gguf"))
        hint = f"; convert the file itself: {found[0]}" if found else ""
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder{hint}")
    return read_json(inside(folder, "config.json"))


def supported_family(config: dict, folder: Path, experimental: bool = False) -> Family:
    """The row of `FAMILIES` for this config, or a generic one where `experimental` asks for it.

    Raises:
        ModelError: every kind of model that cannot be converted.
    """
    model_type = config.get("model_type")
    if "liger" in config or str(model_type).startswith("liger_"):
        raise ModelError(f"{folder} is linearized already; give the base model it was made from")
    for field in ("quantization_config", "compression_config"):
        if config.get(field) is not None:
            float8 = isinstance(config[field], dict) and config[field].get("quant_method") == "fp8"
            advice = _whole_of_float8(folder) if float8 else "give the unquantized model"
            raise ModelError(f"{folder} is quantized (config.json has {field}); {advice}")
    for field in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(field), dict):
            inner = str(config[field].get("model_type", "unknown"))[:100]
            raise ModelError(
                f"{folder} is a multimodal model; extract its language model (config.json's {field}, of type "
                f"{inner!r}) as a folder of its own with save_pretrained and convert that"
            )
    if config.get("use_bidirectional_attention"):
        raise ModelError(f"{folder} looks at both sides of a token (use_bidirectional_attention), which liger cannot")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None and experimental:
        family = experimental_family(str(model_type), config)
    if family is None:
        model_type = model_type if model_type is None else str(model_type)[:100]
        near = get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.8)
        nearest = f" (the nearest is {near[0]})" if near else ""
        raise ModelError(
            f"model type {model_type!r} is not supported{nearest}; `liger families` lists what is, and --experimental "
            "tries the generic mechanism"
        )
    architectures = config.get("architectures")
    wanted = f"{family.prefix}ForCausalLM"
    named = architectures if isinstance(architectures, list) else [architectures]
    if architectures and _spelling(wanted) not in map(_spelling, named):
        raise ModelError(f"config.json names the architecture {architectures!r}; only {wanted} can be converted")
    return family


def _whole_of_float8(folder) -> str:
    """How to make whole weights of float8 ones, in words."""
    return (
        "make whole weights of it and convert those, with names from transformers: `AutoModelForCausalLM."
        f"from_pretrained({str(folder)!r}, dtype='bfloat16', quantization_config=FineGrainedFP8Config(dequantize=True))"
        ".save_pretrained('whole', save_original_format=False)`"
    )


def _spelling(architecture) -> str:
    """Of a class's name what is left in all its spellings: LLaMAForCausalLM, Ernie4_5_ForCausalLM."""
    return str(architecture).replace("_", "").casefold()


def inside(folder: Path, name: str) -> Path:
    """The real file behind `folder/name`; links may lead within the folder or to the blobs of its hub cache only.

    Raises:
        ModelError: not a plain file, missing, or outside.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL in the name
        raise ModelError(f"{path} is missing or is a broken link; download the model again") from None
    allowed = [folder]
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelError(f"{path} leads outside the model's folder, to {real}; copy the file into the folder")
    if not regular:
        raise ModelError(f"{path} is not a plain file")
    return real


def own_files(folder: Path) -> list[Path]:
    """Every file below a folder. Raises ModelError for links that lead outside, links to folders, pipes and devices."""
    found = []
    for root, folders, names in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        if linked:
            raise ModelError(f"{os.path.join(root, linked[0])} is a link to a folder; put the folder itself there")
        for name in names:
            inside(folder, os.path.relpath(os.path.join(root, name), folder))
            found.append(Path(root, name))
    return found


def read_shard(folder: Path, name: str) -> Shard:
    """Read one safetensors header and check it against the file. Raises ModelError for a missing or broken shard."""
    path = inside(folder, name)
    size = path.stat().st_size
    broken = f"{folder / name} is not a whole safetensors file"
    with open(path, "rb") as file:
        refuse_pointer(file.read(100), folder / name)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ModelError(f"{broken}: its header of {length} bytes does not fit; download the shard again")
        header = file.read(length)
    try:
        entries = json.loads(header.decode("utf-8"))
        entries.pop("__metadata__", None)
        tensors, end = _tensors(entries)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error)[:300]
        raise ModelError(f"{broken}: its header is broken ({reason}); download the shard again") from None
    if size != 8 + length + end:
        raise ModelError(
            f"{broken}: it has {size} bytes where its header asks for {8 + length + end}; download it again"
        )
    return Shard(name, path, size, header, tensors)


def _tensors(entries: dict) -> tuple[dict[str, Tensor], int]:
    """Header entries -> tensors, and where the data end. Raises ValueError unless they lie one behind the other."""
    spans, tensors = [], {}
    for name, entry in entries.items():
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPE_BITS:
            raise ValueError(f"{name} has the unknown dtype {dtype!r}")
        if len(shape) > MAX_DIMS:  # the product of many numbers takes longer than reading them
            raise ValueError(f"{name} has {len(shape)} dimensions")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has a shape or an offset that is not a whole number")
        if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
            raise ValueError(f"{name} has {end - begin} bytes, which is not {dtype} {list(shape)}")
        spans.append((begin, end, name))
        tensors[name] = Tensor(dtype, shape, end - begin, begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(f"{name} starts at byte {begin} and not at {position}")
        position = end
    return tensors, position


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the shards, and the index's map from tensor to shard where there is an index.

    transformers takes `model.safetensors` where both are there, and so does this.
    """
    if os.path.lexists(folder / WEIGHTS):
        return [WEIGHTS], None
    if not os.path.lexists(folder / INDEX):
        pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
        if pickles:
            raise ModelError(
                f"{folder} has its weights as pickles only ({pickles[0]}), which liger never opens; load it with "
                "transformers and write it with save_pretrained, which makes safetensors"
            )
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}; download the weights")
    weight_map = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX} has no weight_map; download the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name) or name.startswith("."):
            raise ModelError(f"{folder / INDEX} names {name!r}, which is not a safetensors file of that folder")
    return sorted(set(weight_map.values())), weight_map


def support_files(folder: Path) -> dict[str, Path]:
    """Tokenizer, generation config, chat templates and licences of a folder: relative name -> real file.

    Raises:
        ModelError: one of them is no plain file, leads outside, or is a pointer to a file that was not fetched.
    """
    found = dict(_support_files(folder))
    for name, path in found.items():
        with open(path, "rb") as file:
            refuse_pointer(file.read(100), folder / name)
    return found


def _support_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        name = path.name
        wanted = (
            name in TOKENIZER_NAMES
            or SENTENCEPIECE.fullmatch(name)
            or (LICENCE.fullmatch(name) and path.suffix.lower() in LICENCE_SUFFIXES)
        )
        if wanted and not path.is_dir():
            yield name, inside(folder, name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        for path in sorted(templates.glob("*.jinja")):
            name = f"{templates.name}/{path.name}"
            yield name, inside(folder, name)


def _check_index(weight_map: dict[str, str], checkpoint: Checkpoint) -> None:
    held = {shard.name: shard.tensors for shard in checkpoint.shards}
    for tensor, shard in weight_map.items():
        if tensor not in held[shard]:
            raise ModelError(f"{checkpoint.folder / INDEX} says that {tensor} is in {shard}, but it is not there")


def check_fields(family: Family, config: dict) -> None:
    """The fields of config.json that decide layers and shapes are of their kinds. Raises ModelError naming the first.

    None means that a field is left out. Nothing is counted up to a number that was not looked at.
    """
    values = family.with_defaults(config)
    for names, fits, wanted in FIELDS:
        for name in names:
            if values.get(name) is not None and not fits(values[name]):
                raise ModelError(f"config.json: {name} is {_shown(values[name])}, but has to be {wanted}")
    layers = values.get("num_hidden_layers")
    for name in ("layer_types", "no_rope_layers"):
        if values.get(name) and type(layers) is int and len(values[name]) != layers:
            raise ModelError(f"config.json: {name} has {len(values[name])} entries for {layers} layers")


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor that the config promises is there, in a dtype that can be trained, and no layer is left over."""
    folder, layers = checkpoint.folder, checkpoint.geometry.num_hidden_layers
    _check_prefix(checkpoint)
    held = {int(match[1]) for name in checkpoint.tensors if (match := layer_index(name))}
    if held != set(range(len(held))) or len(held) != layers:
        raise ModelError(
            f"{folder} has the weights of {len(held)} layers where config.json's num_hidden_layers is {layers}"
        )
    for name, shape in _expected(checkpoint):
        tensor = checkpoint.tensors.get(name)
        if tensor is None and name.replace(".weight", ".base_layer.weight") in checkpoint.tensors:
            raise ModelError(f"{folder} holds PEFT's layers, not merged; run merge_and_unload, then save_pretrained")
        if tensor is None:
            raise ModelError(f"{folder} lacks the tensor {name}, so its weights do not fit its config.json")
        if tensor.shape != shape:
            raise ModelError(
                f"{folder}: {name} is {list(tensor.shape)} where config.json asks for {list(shape)}; they do not fit"
            )
        if tensor.dtype.startswith("F8") and f"{name}_scale_inv" in checkpoint.tensors:
            raise ModelError(
                f"{folder}: {name} is {tensor.dtype} with scales, and config.json lacks its quantization_config; put "
                f"it back (quant_method fp8, weight_block_size), then {_whole_of_float8(folder)}"
            )
        if tensor.dtype not in DTYPES.values():
            raise ModelError(f"{folder}: {name} is {tensor.dtype}; give a model in {', '.join(DTYPES.values())}")


def _check_prefix(checkpoint: Checkpoint) -> None:
    """Raises ModelError where the names of the layers' tensors begin as a wrapper or another class wrote them."""
    found = {match[1] for name in checkpoint.tensors if (match := ANY_LAYER.match(name))}
    if "model." in found or not found:
        return
    prefix, right = min(found), f"{checkpoint.family.prefix}ForCausalLM"
    if not prefix:
        raise ModelError(
            f"the names of {checkpoint.folder}'s tensors lack the prefix 'model.' that {right} gives them (a model "
            "without its head was saved); load it with AutoModelForCausalLM and write it with save_pretrained"
        )
    what = f"{prefix.removesuffix('model.')!r}" if prefix.endswith(".model.") else f"{prefix!r} in place of 'model.'"
    raise ModelError(
        f"the names of {checkpoint.folder}'s tensors begin with {what}, which {right} does not know; save them without "
        "it (safetensors.torch's load_file and save_file)"
    )


def _expected(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes by config.json, layer by layer: what does not fit is found before the next one is listed."""
    family, config = checkpoint.family, checkpoint.config
    return decoder_tensors(family, family.with_defaults(config), checkpoint.geometry)


def layer_index(tensor_name: str) -> re.Match | None:
    """Match whose group 1 is the layer that a tensor belongs to, None for embeddings and the like."""
    return LAYER.match(tensor_name)


def _positive(config: dict, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value <= 0:
        raise ModelError(f"config.json: {name} is {_shown(value)}, but has to be a positive whole number")
    return value


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _whole(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _list_of(*kinds: type):
    return lambda value: isinstance(value, list) and all(type(one) in kinds for one in value)


FIELDS = (
    (
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window",
         "max_window_layers", "no_rope_layer_interval", "decoder_sparse_step"),
        _whole,
        "a whole number, 0 or more",
    ),
    (
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "pool_size"),
        lambda value: _whole(value) and value <= MAX_COUNT,
        f"a whole number of at most {MAX_COUNT}",
    ),
    (
        ("sliding_window_pattern",),
        lambda value: _whole(value) or (isinstance(value, str) and 0 < len(value) <= 100),
        "a whole number, or a pattern such as LLLG",
    ),
    (("mlp_only_layers", "no_rope_layers"), _list_of(int, bool), "a list of whole numbers"),
    (("layer_types",), _list_of(str), "a list of layer types"),
)  # fmt: skip


def check_dtype(name: str, *others: str) -> None:
    """Raises UsageError where the value of `--dtype` is none of `DTYPES`, nor of `others`."""
    known = (*others, *DTYPES)
    if name not in known:
        raise UsageError(f"--dtype is {name!r}, but has to be one of {', '.join(known)}")
