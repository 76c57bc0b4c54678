"""Shards with adapters merged in, tensor by tensor: bytes are copied as they are, but for the trained weights."""

import json
from pathlib import Path

from liger_cli.checkpoint.adapters import Adapter
from liger_cli.checkpoint.adapters import merged as merged_by
from liger_cli.checkpoint.reader import DTYPES, EXTRAS, Shard
from liger_cli.checkpoint.tensors import FLOATING, read_tensor
from liger_cli.system.errors import LigerError, ModelError

COPIED = 16 << 20  # bytes copied at a time


def is_rewritten(shard: Shard, trained: set[str], dtype: str | None, added: dict[str, str]) -> bool:
    """Whether a shard holds something trained or added, or is of another dtype than asked for; else it is linked.

    Args:
        added: of `adapters.untied`: each is written beside the tensor that stood for it.
    """
    # Extra tensors stay float32: they are few, and the model loads them so.
    converts = dtype is not None and shard.name != EXTRAS
    converts = converts and any(tensor.dtype != DTYPES[dtype] for tensor in shard.tensors.values())
    return converts or bool((trained | set(added.values())) & set(shard.tensors))


def write_shard(
    shard: Shard, target: Path, adapters: list[Adapter], dtype: str | None = None, added: dict[str, str] | None = None
) -> None:
    """Write one shard with the adapters merged in; at most one tensor is in memory.

    Args:
        dtype: convert every floating tensor; None keeps each tensor's own.
        added: as for `is_rewritten`.
    Raises:
        ModelError: a value that the dtype cannot hold, or that is not finite. LigerError: the file was changed.
    """
    layout = json.loads(shard.header)
    metadata = layout.pop("__metadata__", None)
    start = 8 + len(shard.header)
    sources = {name: name for name in sorted(layout, key=lambda name: layout[name]["data_offsets"])}
    sources |= {name: source for name, source in (added or {}).items() if source in layout}
    header, position = ({"__metadata__": metadata} if metadata else {}), 0
    for name, source in sources.items():
        tensor = shard.tensors[source]
        kind = DTYPES[dtype] if dtype and tensor.dtype in DTYPES.values() else tensor.dtype
        size = tensor.nbytes if kind == tensor.dtype else tensor.numel * (4 if kind == "F32" else 2)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(shard.path, "rb") as reader, open(target, "xb") as writer:
        writer.write(len(raw).to_bytes(8, "little") + raw)
        for name, source in sources.items():
            first, last = layout[source]["data_offsets"]
            touched = [adapter for adapter in adapters if name in adapter.trained]
            if touched or header[name]["dtype"] != shard.tensors[source].dtype:
                _write_merged(shard, name, source, touched, header[name]["dtype"], writer)
            else:
                reader.seek(start + first)
                _copy(reader, writer, last - first)


def _write_merged(shard: Shard, name: str, source: str, adapters: list[Adapter], kind: str, writer) -> None:
    import torch

    merged = read_tensor(shard, source)
    for adapter in adapters:
        merged = merged_by(adapter, name, merged)
    if not torch.isfinite(merged).all():
        why = "once merged; the adapter is broken" if adapters else f"in {shard.path}; the model is broken"
        raise ModelError(f"{name} is not finite {why}")
    largest = merged.abs().max().item() if merged.numel() else 0.0
    merged = merged.to(getattr(torch, FLOATING[kind])).contiguous()
    if not torch.isfinite(merged).all():
        raise ModelError(f"{name} has a value of {largest:g}, too large for {FLOATING[kind]}; use --dtype bfloat16")
    writer.write(merged.flatten().view(torch.uint8).numpy().data)


def _copy(reader, writer, count: int) -> None:
    while count:
        block = reader.read(min(count, COPIED))
        if not block:
            raise LigerError(f"{reader.name} was changed while it was read; run the command again")
        writer.write(block)
        count -= len(block)
