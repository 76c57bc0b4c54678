"""The base of a merged model as the tensors in which the two differ: a second copy of the weights would not fit beside
the first where one barely does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from liger_cli.checkpoint.reader import Checkpoint, layer_index


@dataclass(frozen=True)
class OtherWeights:
    """Parameters of a model and what the base has in their place, on the same devices and in the same dtype."""

    pairs: tuple[tuple[Any, Any], ...]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the base's weights."""
        own = [parameter.data for parameter, _ in self.pairs]
        try:
            for parameter, tensor in self.pairs:
                parameter.data = tensor
            yield
        finally:
            for (parameter, _), tensor in zip(self.pairs, own, strict=True):
                parameter.data = tensor


def other_weights(model, base: Checkpoint) -> OtherWeights | None:
    """What `base` has in place of the model's own weights, read a tensor at a time.

    None where it cannot be told by the tensors' names, or where more than the layers differs: embeddings, the final
    norm and the head make logits of hidden states long after those were computed.
    """
    import torch
    from safetensors import safe_open

    if base.family.renames_weights:
        return None
    parameters = dict(model.named_parameters())
    found = []
    for shard in base.shards:
        with safe_open(shard.path, "pt") as file:
            for name in shard.tensors:
                parameter = parameters.get(name)
                if parameter is None:
                    return None
                tensor = file.get_tensor(name).to(parameter.device, parameter.dtype)
                if torch.equal(tensor, parameter):
                    continue
                if layer_index(name) is None:
                    return None
                found.append((parameter, tensor))
    return OtherWeights(tuple(found))
