"""A model beside its controls: the base, the model itself and the window alone, with one copy of the weights.

A converted folder or an adapter holds the base's weights, so the base is the softmax switch with LoRA off. A merge
changes the weights: then the base is the checkpoint that `liger.json` names, if its fingerprint still matches.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liger_cli.checkpoint.adapters import check_shapes, overwritten, peft_config, read_adapter
from liger_cli.checkpoint.extras import base_shards
from liger_cli.checkpoint.reader import (
    ADAPTER_CONFIG,
    check_dtype,
    fingerprint,
    read_checkpoint,
    read_config,
    read_weights,
)
from liger_cli.checkpoint.tokenizer import load_tokenizer
from liger_cli.evaluation.other_weights import OtherWeights, other_weights
from liger_cli.system.errors import LigerError, ModelError, SetupError, UsageError
from liger_cli.system.manifest import MANIFEST, read_manifest
from liger_cli.system.outputs import check_unchanged, file_versions
from liger_cli.system.untrusted import read_json

COLUMNS = ("base", "model", "window_only")
TITLES = {"base": "base", "model": "model", "window_only": "window only"}
BASE, TUNED = "base", "softmax, tuned weights"
SWITCH = "the same weights run as softmax attention"


@dataclass
class Subject:
    """An opened model.

    Attributes:
        folder: what was opened.
        kind: `converted`, `adapter` or `merged`.
        model: the Liger model, wrapped by PEFT for an adapter.
        tokenizer: its tokenizer.
        original: the base as a model of its own, where nothing less can give it back, else None.
        other: the weights that a merged model's base has in place of its own, or None.
        base_label: `base`, or `softmax, tuned weights` where the original is not at hand; then there is no recovery.
        base_source: where the base column comes from, in words.
        fingerprint: of the weights that the folder holds, or, of an adapter, of the model it belongs to.
        adapter: fingerprint of the adapter's own weights, else None.
        versions: of the files that the weights were read from, and may still be read from.
    """

    folder: Path
    kind: str
    model: Any
    tokenizer: Any
    original: Any = None
    other: OtherWeights | None = None
    base_label: str = BASE
    base_source: str = SWITCH
    fingerprint: dict = field(default_factory=dict)
    adapter: dict | None = None
    versions: dict = field(default_factory=dict)

    @property
    def liger_model(self):
        """The Liger model without PEFT's wrapper."""
        return self.model.get_base_model() if self.kind == "adapter" else self.model

    @property
    def has_recovery(self) -> bool:
        return self.base_label == BASE

    @contextmanager
    def column(self, name: str) -> Iterator[Any]:
        """The model to run for a column of `COLUMNS`; the attention mode is set back to `liger` afterwards."""
        if name == "base" and self.original is not None:
            yield self.original
            return
        with ExitStack() as stack:
            if name == "base" and self.kind == "adapter":
                stack.enter_context(self.model.disable_adapter())
            if name == "base" and self.other is not None:
                stack.enter_context(self.other.in_place())
            stack.callback(self.liger_model.set_attention_mode, "liger")
            self.liger_model.set_attention_mode({"base": "softmax", "model": "liger", "window_only": "window"}[name])
            yield self.model

    def check_unchanged(self) -> None:
        """Raises LigerError where the weights were written to since the model was opened."""
        check_unchanged(self.versions)

    def describe(self) -> dict:
        """The part of a results file that says what was measured."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            **({} if self.adapter is None else {"adapter": self.adapter}),
            "dtype": str(self.liger_model.dtype).removeprefix("torch."),
            "device": str(self.liger_model.device),
            "base_column": {"label": self.base_label, "source": self.base_source},
        }


def open_subject(
    folder: Path, *, against: str | None = None, device: str = "auto", dtype: str = "auto", original: bool = True
) -> Subject:
    """Open a folder that liger made, in evaluation mode.

    Args:
        folder: a converted, an adapter or a merged folder.
        against: the base to compare with, a folder or a hub id; by default the folder's own.
        device: `auto` (CUDA where there is one), or a torch device.
        dtype: `auto` (the checkpoint's; float32 on a CPU), or one of `reader.DTYPES`.
        original: look for the base of a merged folder. Without it the base column is the softmax switch.
    Raises:
        UsageError: not such a folder. ModelError: it is broken. SetupError: no such device.
    """
    from transformers.utils import logging

    manifest = read_kind(folder)
    device = pick_device(device)
    torch_dtype = pick_dtype(device, dtype)
    logging.disable_progress_bar()
    kind = manifest["kind"]
    adapter = read_adapter(folder) if kind == "adapter" else None
    weights = adapter_base(folder, manifest) if kind == "adapter" else folder
    files = [shard.path for shard in read_weights(weights)]
    versions = file_versions([*files, adapter.weights.path] if adapter else files)
    model = _load_liger(weights, torch_dtype, device)
    tokenizer = padding_tokenizer(folder if (folder / "tokenizer_config.json").exists() else weights, model.config)
    if kind == "adapter":
        from peft import PeftModel

        check_shapes(adapter, weights, read_weights(weights))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT does
            model = PeftModel.from_pretrained(model, str(folder.resolve()), config=peft_config(adapter))
    subject = Subject(folder, kind, model.eval(), tokenizer, fingerprint=_fingerprint(weights), versions=versions)
    if kind == "adapter":
        subject.adapter = fingerprint((adapter.weights,))
        subject.base_source = f"{SWITCH}, LoRA off"
        if changed := overwritten(adapter, read_weights(weights)):
            subject.base_label, subject.base_source = TUNED, f"{SWITCH}, LoRA off; {changed} is the adapter's"
    if kind != "merged" and _base_digest(weights) != (read_manifest(weights) or {}).get("fingerprint", {}).get(
        "digest"
    ):
        subject.base_label = TUNED
        subject.base_source = f"{SWITCH}; the weights in {weights.name} are not the ones that were converted"
    if against is not None:
        base = base_folder(against)
        subject.original = _load_original(base, torch_dtype, device)
        _check_same_tokens(subject, base, against)
        subject.base_label, subject.base_source = BASE, base.name if Path(against).exists() else against
    elif kind == "merged" and original:
        base = named_base(manifest)
        if base is None:
            subject.base_label = TUNED
            why = "the base that liger.json names is not there or has changed"
            subject.base_source = f"{SWITCH}; {why if 'created' in manifest else 'no liger.json names the base'}"
        else:
            subject.other = other_weights(model, read_checkpoint(base, experimental=True))
            if subject.other is None:
                subject.original = _load_original(base, torch_dtype, device)
            subject.base_source = base.name
    elif kind == "merged":
        subject.base_label, subject.base_source = TUNED, SWITCH
    return subject


def read_kind(folder: Path) -> dict:
    """A folder's liger.json; its kind alone for a Liger model or an adapter that transformers or PEFT saved.

    Raises:
        UsageError: it is neither.
    """
    if (manifest := read_manifest(folder)) is not None:
        return manifest
    if not os.path.lexists(folder / MANIFEST):
        if os.path.lexists(folder / "config.json") and "liger" in read_config(folder.resolve()):
            return {"kind": "merged"}
        if os.path.lexists(folder / ADAPTER_CONFIG):
            return {"kind": "adapter"}
    raise UsageError(f"{folder} has no liger.json; name a folder that liger made, or convert a base first")


def _check_same_tokens(subject: Subject, base: Path, name: str) -> None:
    """Raises UsageError where token ids mean something else to the base: nothing could be compared."""
    ours, theirs = (model.config.get_text_config().vocab_size for model in (subject.liger_model, subject.original))
    if ours != theirs:
        raise UsageError(f"--against {name} knows {theirs:,} tokens, {subject.folder} {ours:,}; name its own base")
    if (base / "tokenizer_config.json").exists():
        known = subject.tokenizer.get_vocab()
        ids = load_tokenizer(base, subject.original.config).get_vocab()
        if any(known.get(token) != number for token, number in ids.items()):
            raise UsageError(f"--against {name} has another tokenizer than {subject.folder}; name its own base")


def adapter_base(folder: Path, manifest: dict) -> Path:
    """The converted folder an adapter belongs to: as `liger.json` names it, else as PEFT's own config does.

    Raises:
        ModelError: neither is there; the sentence names both.
    """
    named = [manifest.get("base", {}).get("path")]
    config = folder / ADAPTER_CONFIG
    if config.exists():
        named.append(read_json(config).get("base_model_name_or_path"))
    named = [name for name in named if isinstance(name, str) and 0 < len(name) < 4096 and "\0" not in name]
    for name in named:
        for candidate in (Path(name), folder / name, folder.parent / name, folder.parent / Path(name).name):
            if os.path.isfile(candidate / "config.json") and "liger" in read_config(candidate.resolve()):
                return candidate
    raise ModelError(
        f"{folder}: the converted model it was trained on is not at {' or '.join(named) or 'any known place'}"
    )


def named_base(manifest: dict) -> Path | None:
    """The original checkpoint of a merged folder, or None where it is gone or its weights are others by now."""
    base = manifest.get("base") or {}
    wanted = base.get("fingerprint") or manifest.get("base_fingerprint")
    path = base.get("path")
    if not wanted or not isinstance(path, str) or not Path(path).is_dir():
        return None
    try:
        return Path(path) if fingerprint(read_weights(Path(path))) == wanted else None
    except (LigerError, OSError):
        return None


def padding_tokenizer(folder: Path, config):
    """The tokenizer of a folder with a padding token in any case."""
    tokenizer = load_tokenizer(folder, config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def pick_device(device: str) -> str:
    """`auto` becomes `cuda` where there is one, else `cpu`. Raises SetupError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sentence = str(error).strip().splitlines()[0]
        raise SetupError(f"--device {device} cannot be used: {sentence}") from None
    return device


def pick_dtype(device: str, dtype: str):
    """The dtype to load in: `auto` is the checkpoint's own, but float32 on a CPU, where half precision is slow."""
    import torch

    check_dtype(dtype, "auto")
    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    return getattr(torch, dtype)


def _load_liger(folder: Path, dtype, device: str):
    from liger_cli.checkpoint.model_code import generate_plainly, load_model

    return generate_plainly(load_model(folder, device, dtype=dtype)).eval()


def _load_original(folder: Path, dtype, device: str):
    import torch
    import transformers

    from liger_cli.checkpoint.converted import refuse_detours
    from liger_cli.checkpoint.model_code import generate_plainly, read_onto

    base = read_checkpoint(folder, experimental=True)
    refuse_detours(base.folder, folder, base.config)
    try:
        config = getattr(transformers, base.family.config_class).from_dict(base.config)
        model_class = getattr(transformers, f"{base.family.prefix}ForCausalLM")
        model = read_onto(device, model_class, base.folder, config=config, dtype=dtype, trust_remote_code=False)
    except (LigerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a value in config.json that the family's classes refuse
        raise ModelError(f"the base {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return generate_plainly(model).eval()


def base_folder(name: str) -> Path:
    """The folder that `--against` names. Raises as `hub.find_base`."""
    from liger_cli.checkpoint.hub import find_base

    return Path(find_base(name).folder)


def _fingerprint(folder: Path) -> dict:
    return fingerprint(read_weights(folder))


def _base_digest(folder: Path) -> str:
    """Of the base's tensors alone: what a conversion added is not the base's."""
    return fingerprint(base_shards(read_weights(folder)))["digest"]
