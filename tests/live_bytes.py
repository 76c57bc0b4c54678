"""Bytes of the tensors that a piece of work holds at once, counted from their shapes as operations make them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Within, `most` is the greatest sum of what was made and not yet freed; what one operation needs is not seen.

    Args:
        modules: whose parameters and buffers were there before, and do not count.
    """

    def __init__(self, *modules):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self.known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map_only(torch.Tensor, self._count, function(*args, **(kwargs or {})))

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            nbytes = self.known[storage] = storage.nbytes()
            self.now += nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, nbytes)
        return tensor

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes
