"""Single tensors of a shard, for what works on one at a time."""

from liger_cli.checkpoint.reader import DTYPES, Shard
from liger_cli.system.errors import ModelError

FLOATING = {"F64": "float64"} | {stored: name for name, stored in DTYPES.items()}


def read_tensor(shard: Shard, name: str):
    """The tensor `name` in float32, with memory of its own.

    Raises:
        ModelError: it holds no floating-point numbers of 16 bits or more. LigerError: the file was shortened.
    """
    import torch

    tensor = shard.tensors[name]
    if tensor.dtype not in FLOATING:
        raise ModelError(f"{shard.path}: {name} is of dtype {tensor.dtype}; liger merges {', '.join(FLOATING)}")
    dtype = getattr(torch, FLOATING[tensor.dtype])
    if not tensor.nbytes:
        return torch.zeros(tensor.shape)
    return torch.frombuffer(shard.read(name), dtype=dtype).view(tensor.shape).float()
