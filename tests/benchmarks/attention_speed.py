"""How fast Liger attention is on this CPU, as ratios to torch's causal attention within one run.

    python tests/benchmarks/attention_speed.py [--gates gla,gdn] [--lengths 2048,32768] [--kept 128] [--repetitions 7]

Both branches (gated recurrence and window of 64) of one layer, without its projections: float32, batch 1, 4 query and
2 key/value heads of 64. The two are timed in turns, so that what else the machine does meets both; a ratio is the
quotient of medians, and the spread is that of the single turns' ratios (quartiles). Memory is what a forward pass adds.
Two things do not depend on the machine and are asserted: that memory grows linearly with the text, and that a step does
the same operations on the same shapes whatever its position.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from liger_cli.templates import liger_branches, liger_window
from liger_cli.templates.liger_branches import Settings, Tokens, mixed_attention
from liger_cli.templates.liger_cache import LigerCacheLayer
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES
from liger_cli.templates.liger_kept import keep_scores
from liger_cli.templates.liger_window import ROWS_OF_HEAD, Scoring, window_attention

QUERY_HEADS, KV_HEADS, DIM = 4, 2, 64


def inputs(length: int, grad: bool = False):
    """q, k, v as a model has them: [B, heads, T, D] views of [B, T, heads, D]."""
    return [
        torch.randn(1, length, heads, DIM, requires_grad=grad).transpose(1, 2)
        for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)
    ]


def liger(q, k, v, gate: str, cache=None, kept: int = 0):
    spec = LayerSpec(gate=gate, kept=kept)
    pooled = GATES[gate].pool(k, spec)
    scores = keep_scores(k, torch.linspace(-1, 1, DIM).expand(KV_HEADS, -1)) if kept else None
    settings = Settings(spec, window=64, mix=0.5, scoring=Scoring(DIM**-0.5))
    return mixed_attention(Tokens(q, k, v, q, k, pooled, scores), settings, cache=cache)


def softmax(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(slow, fast, repetitions: int) -> dict:
    """Medians of both, timed in turns, and their quotient with quartiles.

    A turn of the fast one is the median of up to five calls, as a model's layers follow one another: the first one
    after seconds of something else pays for memory that the system has taken back meanwhile.
    """
    calls = max(1, min(5, round(timed(slow) / timed(fast) / 4)))
    pairs = [(timed(slow), statistics.median(timed(fast) for _ in range(calls))) for _ in range(repetitions)]
    quotients = sorted(a / b for a, b in pairs)
    first, _, third = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else quotients * 3
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return {
        "softmax_s": medians[0],
        "liger_s": medians[1],
        "ratio": medians[0] / medians[1],
        "quartiles": [first, third],
    }


def operations(length: int) -> float:
    """Floating-point operations of the chunked form's matrix products with per-channel decay, both branches."""
    chunk = 64
    recurrent = QUERY_HEADS * (4 * chunk * DIM + 2 * DIM * DIM) + KV_HEADS * (2 * DIM * DIM + 2 * chunk * DIM)
    return length * (recurrent + QUERY_HEADS * 4 * (ROWS_OF_HEAD + 64) * DIM)


def matrix_rate() -> float:
    """Operations a second of a large float32 matrix product, the best of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(5))


def forward(length: int, gate: str, repetitions: int, kept: int = 0) -> dict:
    q, k, v = inputs(length)
    with torch.no_grad():
        return ratio(lambda: softmax(q, k, v), lambda: liger(q, k, v, gate, kept=kept), repetitions)


def portable(function, repetitions: int) -> dict:
    """How much longer the form takes that a GPU and gradients get, which has no code of its own for a CPU."""

    def general():
        never = lambda x: False  # noqa: E731
        with patch.object(liger_branches, "by_heads", never), patch.object(liger_window, "by_heads", never):
            function()

    with torch.no_grad():
        found = ratio(general, function, repetitions)
    return {"ratio": found["ratio"], "quartiles": found["quartiles"]}


def training(length: int, gate: str, repetitions: int) -> dict:
    q, k, v = inputs(length, grad=True)
    return ratio(
        lambda: softmax(q, k, v).square().sum().backward(),
        lambda: liger(q, k, v, gate).square().sum().backward(),
        repetitions,
    )


class Operations(TorchDispatchMode):
    """Every operation with the shapes it takes, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append((str(function), [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


def decoding(gate: str, tokens: int = 400) -> dict:
    """One-token steps at positions 1K and 32K, in turns: time ratio, operations a step, bytes of the cache."""
    caches = {}
    with torch.no_grad():
        for position in (1024, 32768):
            caches[position] = LigerCacheLayer(64)
            liger(*inputs(position), gate, caches[position])
        shapes = {p: {n: list(x.shape) for n, x in c.tensors().items()} for p, c in caches.items()}
        step, done = inputs(1), {}
        for position, cache in caches.items():
            liger(*step, gate, cache)  # masks are made once
            with Operations() as operations:
                liger(*step, gate, cache)
            done[position] = operations.found
        times = {position: [] for position in caches}
        for _ in range(tokens):
            for position, cache in caches.items():
                times[position].append(timed(lambda cache=cache: liger(*step, gate, cache)))
    medians = {position: statistics.median(side) for position, side in times.items()}
    assert shapes[1024] == shapes[32768], "the cache has grown"
    assert done[1024] == done[32768], "a step at 32K does other operations than one at 1K"
    return {
        "step_1k_s": medians[1024],
        "step_32k_s": medians[32768],
        "ratio": medians[32768] / medians[1024],
        "operations": len(done[1024]),
        "cache_bytes": sum(x.numel() * x.element_size() for x in caches[32768].tensors().values()),
    }


def peak_memory(length: int, gate: str) -> int:
    """Bytes that one forward pass adds to a fresh process at its peak (Linux: the peak is reset before)."""
    code = f"""
import torch, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import attention_speed as bench
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
with torch.no_grad():
    bench.liger(*bench.inputs(256), {gate!r})
    q, k, v = bench.inputs({length})
    open("/proc/self/clear_refs", "w").write("5")
    before = held("VmRSS")
    bench.liger(q, k, v, {gate!r})
    print(held("VmHWM") - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024


def memory(gate: str, lengths=(8192, 32768, 131072)) -> dict:
    """MiB that a forward pass adds, by length; asserts that they grow no faster than the text."""
    peaks = [peak_memory(length, gate) / 2**20 for length in lengths]
    for (short, less), (long, more) in zip(
        zip(lengths, peaks, strict=True), zip(lengths[1:], peaks[1:], strict=True), strict=False
    ):
        # A tenth for what the allocator keeps.
        grown = f"{less:.0f} MiB for {short} tokens, {more:.0f} MiB for {long}"
        assert more / less <= 1.1 * long / short, f"memory grows faster than the text: {grown}"
    return dict(zip(map(str, lengths), peaks, strict=True))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", default="gla,gdn,kda")
    parser.add_argument("--lengths", default="2048,32768")
    parser.add_argument("--kept", type=int, default=0, help="also time the forward pass with so many kept tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    rate = matrix_rate()
    results = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "gflops": rate / 1e9}
    for gate in options.gates.split(","):
        if gate not in GATES:
            parser.error(f"unknown gate {gate}")
        rows = results[gate] = {}
        for length in map(int, options.lengths.split(",")):
            repetitions = options.repetitions * (8 if length <= 4096 else 1)
            row = rows[f"forward {length}"] = forward(length, gate, repetitions)
            row["matrix_rate_fraction"] = operations(length) / row["liger_s"] / rate
            if options.kept:
                rows[f"forward {length}, {options.kept} kept"] = forward(length, gate, repetitions, options.kept)
            q, k, v = inputs(length)
            forms = {"window": lambda qkv=(q, k, v): window_attention(*qkv, 64, Scoring(DIM**-0.5))}
            for kept in dict.fromkeys((0, options.kept)):
                forms[f"{kept} kept"] = lambda qkv=(q, k, v), gate=gate, kept=kept: liger(*qkv, gate, kept=kept)
            for name, function in forms.items():
                rows[f"portable form {length}, {name}"] = portable(function, options.repetitions)
        rows["forward + backward 4096"] = training(4096, gate, options.repetitions * 2)
        rows["step at 32K over step at 1K"] = decoding(gate)
        rows["peak MiB"] = memory(gate)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}, {rate / 1e9:.0f} GFLOP/s")
    for gate in options.gates.split(","):
        for name, row in results[gate].items():
            print(f"{gate:10} {name:32} " + "  ".join(f"{key} {_show(value)}" for key, value in row.items()))


def _show(value) -> str:
    return "-".join(f"{x:.2f}" for x in value) if isinstance(value, list) else f"{value:.4g}"


if __name__ == "__main__":
    main()
