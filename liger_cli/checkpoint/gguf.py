"""GGUF files as bases: whole weights of one as a plain checkpoint folder, made once by transformers' own reader."""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.reader import DTYPE_BITS, DTYPES, check_dtype
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.system.memory import available
from liger_cli.system.outputs import atomic_folder
from liger_cli.system.untrusted import read_bytes, refuse_pointer
from liger_cli.system.wording import size

SUFFIX, MAGIC = ".gguf", b"GGUF"
DEFAULT_DTYPE = "bfloat16"
SOURCE = "gguf.txt"  # in the folder of whole weights: which file they are of
READ_BYTES = 4  # a value while the file is read: transformers makes float32 of every tensor


def is_gguf(base: str) -> bool:
    """Whether a base is named like a GGUF file."""
    return base.lower().endswith(SUFFIX)


def whole_folder(path: Path, beside: Path, dtype: str) -> Path:
    """Where the whole weights of a file are: beside the output, named after the file and the dtype."""
    return beside.parent / f"{path.stem}-{dtype}"


def whole_weights(path: Path, target: Path, dtype: str = DEFAULT_DTYPE, dry_run: bool = False) -> bool:
    """Write a GGUF file's model as a checkpoint folder: weights, config, tokenizer.

    Args:
        path: the file.
        target: the folder; taken as it is where an earlier call made it of the same file.
        dtype: of the weights, a key of `reader.DTYPES`.
        dry_run: write nothing, which then cannot be told from what is not there.
    Returns:
        Whether it was written now.
    Raises:
        UsageError: no such file, another folder in the way. SetupError: the reader is not installed. ModelError: a
            broken file, or one of a family that transformers or liger does not read. LigerError: too little memory.
    """
    check_dtype(dtype)
    source = _source(path, dtype)
    if os.path.lexists(target):
        with suppress(LigerError):
            if read_bytes(target / SOURCE).decode("utf-8", "replace") == source:
                return False
        raise UsageError(f"{target} is in the way of the whole weights of {path} and is of something else; move it")
    names, values = _header(path)
    if dry_run:
        raise UsageError(f"{path} has no whole weights yet in {target}, which --dry-run does not make; make them first")
    whole = values * DTYPE_BITS[DTYPES[dtype]] // 8
    needed = values * READ_BYTES + whole
    free = available("cpu")
    if free is not None and needed > free:
        raise LigerError(
            f"reading {path} takes some {size(needed)} of memory ({values:,} values), and {size(free)} are free; take "
            "a machine with more, or the checkpoint folder that the file was made of"
        )
    say(
        f"making whole weights ({dtype}, {size(whole)}) of {path} in {target}, "
        f"once; that takes some {size(needed)} of memory"
    )
    with _alone(path) as folder:
        _read(path, folder, names, target, dtype, source)
    return True


def _source(path: Path, dtype: str) -> str:
    """What tells a file from another one, and the dtype. Raises UsageError, ModelError."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a GGUF file, a model's folder or a hub id")
    if "-of-0" in path.stem:
        raise ModelError(f"{path} is a part of a model; join the parts first (llama-gguf-split --merge)")
    with open(path, "rb") as file:
        head = file.read(100)
    refuse_pointer(head, path)
    if not head.startswith(MAGIC):
        raise ModelError(f"{path} is not a GGUF file; download it again")
    found = path.stat()
    return f"{path.resolve()}\n{found.st_size} bytes, {found.st_mtime_ns}\n{dtype}\n"


def _header(path: Path) -> tuple[set[str], int]:
    """Names of the tensors, and how many values they hold. Raises SetupError, ModelError."""
    if find_spec("gguf") is None:
        raise SetupError("GGUF files need the package gguf; pip install gguf (or liger-cli with its extra [gguf])")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        fields = set(reader.fields)
    except Exception as error:  # the reader checks little, and stumbles over what is not there
        raise ModelError(f"{path} is broken ({_reason(error)}); download it again") from None
    scaled = "rope_freqs.weight" in tensors or any(field.endswith(".rope.scaling.type") for field in fields)
    if scaled:
        raise ModelError(
            f"{path} has scaled rotary frequencies, which transformers' reader leaves out, so that the model would be "
            "another one; take the checkpoint folder that the file was made of"
        )
    return set(tensors), sum(tensors.values())


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder with nothing but a link to the file: transformers looks for adapters and configs beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield Path(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar of transformers' reader, which has no switch, where nobody watches it move."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield


def _read(path: Path, folder: Path, names: set[str], target: Path, dtype: str, source: str) -> None:
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    except Exception as error:
        raise ModelError(f"transformers cannot read the family of {path} from GGUF ({_reason(error)})") from None
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(f"{path} is of the model type {config.model_type!r}, which liger does not convert")
    model_class = getattr(transformers, f"{family.prefix}ForCausalLM")
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _quiet():
            read, about = model_class.from_pretrained(folder, gguf_file="model.gguf", **options)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be read by transformers ({_reason(error)})") from None
    lacking = sorted(set(about["missing_keys"]) - set(read._tied_weights_keys or ()))
    if lacking:
        raise ModelError(f"{path} has no {lacking[0]}; transformers would make it up")
    fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    fields["tie_word_embeddings"] = "output.weight" not in names
    plain_config = type(read.config).from_dict({k: v for k, v in fields.items() if not k.startswith("_")})
    plain_config.architectures = [model_class.__name__]
    plain_config.dtype = getattr(torch, dtype)
    with torch.device("meta"):
        plain = model_class(plain_config)
    values = {name: tensor.to(getattr(torch, dtype)) for name, tensor in read.state_dict().items()}
    broken = next((name for name, tensor in values.items() if not torch.isfinite(tensor).all()), None)
    if broken:
        raise ModelError(f"{path}: {broken} is not finite as {dtype}; try --dtype bfloat16 or float32")
    plain.load_state_dict(values, assign=True, strict=False)
    plain.tie_weights()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    except Exception as error:
        raise ModelError(f"the tokenizer of {path} cannot be read by transformers ({_reason(error)})") from None
    with atomic_folder(target) as made:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / SOURCE).write_text(source, encoding="utf-8")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
