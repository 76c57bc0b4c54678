"""Shards with adapters merged in, tensor by tensor: bytes are copied as they are, but for the trained weights."""

import json
from pathlib import Path

from liger_cli.checkpoint.adapters import Adapter, delta, whole_tensor
from liger_cli.checkpoint.reader import EXTRAS, Shard
from liger_cli.checkpoint.tensors import read_tensor
from liger_cli.system.errors import LigerError, ModelError

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
COPIED = 16 << 20  # bytes copied at a time


def is_rewritten(shard: Shard, trained: set[str], dtype: str | None) -> bool:
    """Whether a shard holds something trained, or is of another dtype than asked for; else it is linked."""
    # Extra tensors stay float32: they are few, and the model loads them so.
    converts = dtype is not None and shard.name != EXTRAS
    converts = converts and any(tensor.dtype != DTYPES[dtype] for tensor in shard.tensors.values())
    return converts or bool(trained & set(shard.tensors))


def write_shard(shard: Shard, target: Path, adapters: list[Adapter], dtype: str | None = None) -> None:
    """Write one shard with the adapters merged in; at most one tensor is in memory.

    Args:
        dtype: convert every floating tensor; None keeps each tensor's own.
    """
    layout = json.loads(shard.header)
    metadata = layout.pop("__metadata__", None)
    start = 8 + len(shard.header)
    names = sorted(layout, key=lambda name: layout[name]["data_offsets"])
    header, position = ({"__metadata__": metadata} if metadata else {}), 0
    for name in names:
        tensor = shard.tensors[name]
        kind = DTYPES[dtype] if dtype and tensor.dtype in DTYPES.values() else tensor.dtype
        size = tensor.nbytes if kind == tensor.dtype else tensor.numel * (4 if kind == "F32" else 2)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(shard.path, "rb") as reader, open(target, "xb") as writer:
        writer.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            first, last = layout[name]["data_offsets"]
            touched = [adapter for adapter in adapters if name in adapter.trained]
            if touched or header[name]["dtype"] != shard.tensors[name].dtype:
                _write_merged(shard, name, touched, header[name]["dtype"], writer)
            else:
                reader.seek(start + first)
                _copy(reader, writer, last - first)


def _write_merged(shard: Shard, name: str, adapters: list[Adapter], kind: str, writer) -> None:
    import torch

    names = {value: key for key, value in DTYPES.items()}
    merged = read_tensor(shard, name)
    for adapter in adapters:
        merged = whole_tensor(adapter, name) if name in adapter.replaced else merged + delta(adapter, name)
    if not torch.isfinite(merged).all():
        raise ModelError(f"{name} is not finite once merged; the adapter is broken")
    merged = merged.to(getattr(torch, names[kind])).contiguous()
    writer.write(merged.flatten().view(torch.uint8).numpy().data)


def _copy(reader, writer, count: int) -> None:
    while count:
        block = reader.read(min(count, COPIED))
        if not block:
            raise LigerError(f"{reader.name} was changed while it was read; run the command again")
        writer.write(block)
        count -= len(block)
