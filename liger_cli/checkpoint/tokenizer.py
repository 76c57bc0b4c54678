"""Loading the tokenizer of a folder: its own plain files only, and none of its code."""

import json
import re
from pathlib import Path

from liger_cli.checkpoint.reader import SENTENCEPIECE, Checkpoint, support_files
from liger_cli.system.errors import ModelError, is_panic
from liger_cli.system.untrusted import read_json

CONFIG = "tokenizer_config.json"
VOCABULARY = "tokenizer.json"
VOCABULARIES = (VOCABULARY, "vocab.json", "vocab.txt", "tekken.json")
SPARE_IDS = 1 << 20  # that a vocabulary may leave out
BACKEND = "TokenizersBackend"  # of transformers: tokenizer.json as it stands
# transformers takes these classes for a model type whatever tokenizer_config.json names ...
TAKEN = {
    "qwen2": "Qwen2Tokenizer",
    **dict.fromkeys(
        (
            "mistral", "ministral", "ministral3", "mixtral", "phi3", "olmo2", "olmo3", "granite", "granitemoe", "glm",
            "glm4", "ernie4_5", "nemotron", "stablelm",
        ),
        BACKEND,
    ),
}  # fmt: skip
# ... and these where it names none.
UNNAMED = {
    **dict.fromkeys(("qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("starcoder2", "phi"), "GPT2Tokenizer"),
}
FILE_FIELD = re.compile(r"\w+_file(_name)?")


def has_tokenizer(names) -> bool:
    """Whether a vocabulary is among a folder's files."""
    return any(name in VOCABULARIES or SENTENCEPIECE.fullmatch(name) for name in names)


def load_tokenizer(folder: Path, config=None):
    """The tokenizer of a folder, as transformers makes it.

    Args:
        folder: its tokenizer files are plain files of its own.
        config: the model's, of a class of transformers or of liger's; told from config.json by default.
    Raises:
        ModelError: it cannot be loaded, needs code of its own, or leads outside the folder.
    """
    from transformers import AutoTokenizer

    folder = Path(folder).resolve()
    names = support_files(folder)
    if not has_tokenizer(names):
        raise ModelError(f"{folder} has no tokenizer; put the base's tokenizer files (tokenizer.json, ...) there")
    if VOCABULARY in names:
        _check_vocabulary(names[VOCABULARY])
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, **_own_files(folder, names)
        )
        _try(tokenizer)
    except (KeyboardInterrupt, MemoryError, ModelError):
        raise
    except BaseException as error:  # each library has classes of its own; a panic in Rust is not even an Exception
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {reason})") from None
    return tokenizer


def token_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def put_before(tokenizer) -> list[int]:
    """The token that the tokenizer puts before every text, if it does so."""
    start = tokenizer("a")["input_ids"][:1]
    return start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []


def separator(tokenizer) -> int | None:
    """The token that a text begins with where texts stand one behind another: BOS, else EOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def converted_tokenizer_config(base: Checkpoint) -> str | None:
    """The text of a converted folder's tokenizer_config.json; None where what the base has, or has not, will do.

    A converted folder has a model type of its own, for which transformers takes the class that the file names: that has
    to be the one it takes for the base (`AutoTokenizer.from_pretrained` of transformers 5), or texts get other ids and
    special tokens are lost. A base may name it in config.json, or be told by its model type alone.

    Raises:
        ModelError: it is not JSON.
    """
    model_type, files = base.family.model_type, base.support_files
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    named = config.get("tokenizer_class") or base.config.get("tokenizer_class")
    if "auto_map" in config or not (named is None or isinstance(named, str)):
        return None
    taken = TAKEN.get(model_type) or (UNNAMED.get(model_type) if named is None else None)
    if taken is None or (named or "").removesuffix("Fast") == taken:
        return None
    if not has_tokenizer(files):
        return None
    return json.dumps({**config, "tokenizer_class": taken}, indent=2, ensure_ascii=False) + "\n"


def check_ids(largest: int, vocab_size: int, folder) -> None:
    """Raises ModelError where the tokenizer makes ids that the model has no embedding for."""
    if largest >= vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer gives the id {largest}, but the model has {vocab_size} embeddings; they do not "
            "belong together"
        )


def _check_vocabulary(path: Path) -> None:
    """Raises ModelError where an id is far beyond the number of tokens: transformers 5.17 makes a list that long."""
    try:
        vocabulary = json.loads(path.read_bytes())["model"]["vocab"]
        largest = max(vocabulary.values())
        absurd = largest > SPARE_IDS + 4 * len(vocabulary)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # no such table, or broken: what reads it says so
    if absurd:
        raise ModelError(f"{path} gives a token the id {largest}, but holds {len(vocabulary):,} tokens; it is broken")


def _own_files(folder: Path, names) -> dict:
    """For each file that tokenizer_config.json names: the folder's own of that name, or none.

    transformers before 5.23 opened whatever path stands there.
    """
    if CONFIG not in names:
        return {}
    config = read_json(names[CONFIG])
    own = {}
    for field, value in config.items():
        if FILE_FIELD.fullmatch(field) and isinstance(value, str):
            name = Path(value).name
            own[field] = str(folder / name) if name in names else None
    models = config.get("sp_model_kwargs")
    if isinstance(models, dict) and "model_file" in models:
        raise ModelError(f"{folder / CONFIG} names a model_file, which is not read; remove it from sp_model_kwargs")
    return own


def _try(tokenizer) -> None:
    """Whether it works at all: ids are whole numbers, its special tokens have some."""
    ids = [*tokenizer("a b")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    if any(number is not None and (type(number) is not int or number < 0) for number in ids):
        raise ValueError("it gives ids that are no whole numbers")
