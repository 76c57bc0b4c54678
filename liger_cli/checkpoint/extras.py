"""The shard of a converted folder's own tensors: branch coefficients, learned gates, feature maps. Without torch.

The base's shards stay linked and untouched; a folder without such tensors has no such shard.
"""

import json
import math
from pathlib import Path

from liger_cli.checkpoint.reader import EXTRAS, INDEX, Checkpoint, Geometry, Shard
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_extras import Extra, extra_tensors

SINGLE = "model-base.safetensors"  # transformers reads no index where there is a model.safetensors


def extra_shapes(specs: tuple[LayerSpec, ...], sizes: Geometry) -> dict[str, Extra]:
    """Every extra tensor of a model by its name in the checkpoint."""
    widths = (sizes.hidden_size, sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim)
    return {
        f"model.layers.{index}.self_attn.{name}": extra
        for index, spec in enumerate(specs)
        for name, extra in extra_tensors(spec, *widths).items()
    }


def count(specs: tuple[LayerSpec, ...], sizes: Geometry) -> int:
    """Parameters added to the base's."""
    return sum(math.prod(extra.shape) for extra in extra_shapes(specs, sizes).values())


def initial_values(extras: dict[str, Extra], seed: int = 0) -> dict:
    """float32 NumPy arrays by name; the random ones depend on the seed alone."""
    import numpy

    generator = numpy.random.default_rng(seed)
    values = {}
    for name, extra in extras.items():
        value = numpy.zeros(extra.shape, dtype=numpy.float32)
        if extra.init == "normal":
            value[...] = generator.normal(0.0, extra.width, extra.shape)
        elif extra.init == "uniform":
            value[...] = generator.uniform(-extra.width, extra.width, extra.shape)
        elif isinstance(extra.init, str):
            value[...] = values[f"{name.rpartition('.')[0]}.{extra.init}"]
        else:
            value[...] = extra.init
        values[name] = value
    return values


def shard_names(checkpoint: Checkpoint, has_extras: bool) -> dict[str, str]:
    """Name in the base -> name in the converted folder, for each of the base's shards."""
    names = [shard.name for shard in checkpoint.shards]
    if has_extras and not checkpoint.indexed:
        return {names[0]: SINGLE}
    return {name: name for name in names}


def write_extras(folder: Path, checkpoint: Checkpoint, values: dict) -> None:
    """Write the shard of extra tensors and an index of all shards into a folder that holds the base's."""
    from safetensors.numpy import save

    (folder / EXTRAS).write_bytes(save(values, metadata={"format": "pt"}))
    names = shard_names(checkpoint, True)
    owner = {tensor: names[shard.name] for shard in checkpoint.shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    total += sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": owner | dict.fromkeys(values, EXTRAS)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def base_shards(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    """The shards of a converted folder that are the base's."""
    return tuple(shard for shard in shards if shard.name != EXTRAS)
