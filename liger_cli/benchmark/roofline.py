"""The least time a decoding step can take: bytes and operations counted from shapes, on the machine as measured."""

import os
import platform
import time
from pathlib import Path

from liger_cli.system.wording import counted

BYTES = 256 << 20  # of the tensor whose reading is timed: more than caches hold
MATRIX = {"cpu": 1024, "cuda": 8192}
RUNS = 5


def processor_name() -> str:
    """The CPU's name and number of cores, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {counted(os.cpu_count() or 1, 'core')}"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure_machine(device: str, dtype) -> dict:
    """`{bandwidth_bytes_per_s, matmul_flops_per_s}`, the best of a few runs: reading a big tensor, a matrix product.

    The product is taken in `dtype` and in float32, which is faster on processors that only emulate half precision.
    """
    import torch

    big = torch.ones(BYTES // 4, device=device)
    size = MATRIX["cuda" if device.startswith("cuda") else "cpu"]
    rates = []
    for kind in {dtype, torch.float32}:
        a = torch.randn(size, size, device=device).to(kind)
        rates.append(2 * size**3 / _best(lambda a=a: a @ a, device))
    return {"bandwidth_bytes_per_s": BYTES / _best(big.sum, device), "matmul_flops_per_s": max(rates)}


def step_cost(model, cache_shapes: list[dict], batch_size: int, softmax: bool = False) -> dict:
    """`{bytes, flops}` of one decoding step.

    Bytes: every weight but the embedding table once (with tied embeddings the table is the output head), the cache
    once, and the states once more, which are written back. Operations: two a weight and sequence; for each layer the
    scores and sums over its keys, kept tokens' among them, and reading and updating its states, for the heads that do
    so. Scoring a key to keep it takes a product with `keep_score`, a weight like others; of what is kept one token
    changes, which is not counted.

    Args:
        cache_shapes: as in a row of `bench`.
        softmax: the base's step, which reads none of the tensors that the conversion added.
    """
    from liger_cli.templates.liger_extras import NAMES

    config = model.config
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = [
        x
        for name, x in model.named_parameters()
        if (tied or x is not embedding) and not (softmax and name.rpartition(".")[2] in NAMES)
    ]
    nbytes = sum(x.numel() * x.element_size() for x in weights)
    flops = 2 * batch_size * sum(x.numel() for x in weights)
    groups = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    for entry in cache_shapes:
        for name, (*shape, dtype) in entry["tensors"].items():
            count = entry["layers"]
            for number in shape:
                count *= number
            state = name.startswith("state_")
            nbytes += count * _width(dtype) * (2 if state else 1)
            if len(shape) >= 4:
                flops += 2 * count * groups  # scores, sums, or reading a state: once a query head
                flops += 3 * count if state else 0  # decay, outer product and sum: once a key/value head
    return {"bytes": nbytes, "flops": flops}


def limit_ms(cost: dict, speeds: dict) -> float:
    """Milliseconds below which neither the memory nor the arithmetic lets the step come."""
    slowest = max(cost["bytes"] / speeds["bandwidth_bytes_per_s"], cost["flops"] / speeds["matmul_flops_per_s"])
    return 1e3 * slowest


def _width(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize


def _best(call, device: str) -> float:
    import torch

    times = []
    for _ in range(RUNS + 1):
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
