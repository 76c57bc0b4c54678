"""Everything that waits for a GPU, in one command of less than eight minutes; each result is written as it comes.

    python tests/benchmarks/gpu.py [--out gpu.jsonl] [--minutes 7.5] [--parts decode,lora] [--device cpu --tiny]

Parts: `versions`; `machine` (bandwidth, matrix product); `decode` and `prefill` of Llama-3-8B's shapes with random
weights, plain and as a calibration makes them, beside softmax attention with SDPA and with flash-attn, at 1K to 32K
tokens, batch 1 and 16, with the launches of a step and the share of the card's bandwidth that it reaches; `lora`, a
training step of both; `calibration` of the base that liger ships; `parity` of every gate's kernels, and of flash-attn's
window, with the definitions. A part that fails, or that is out of time, is a line that says so; the others go on.

`--tiny` is the same on shapes of nothing, for a CPU: whether the script runs, not how fast anything is.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from recurrence_examples import example, relative_rms, tuple_of
from recurrence_examples import run as exactly

from liger_cli.benchmark.contest import Decoding, OutOfTime, Side, cache_bytes, cache_shapes, mask_is_given
from liger_cli.benchmark.roofline import measure_machine, processor_name, step_cost
from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import model_classes
from liger_cli.system.memory import PeakMemory
from liger_cli.templates.liger_config import LayerSpec, liger_block
from liger_cli.templates.liger_gates import GATES

LLAMA_8B = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072},
}
TINY = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096},
}
PLAIN = LayerSpec()
CALIBRATED = LayerSpec(gate="none", mix=0.0, sinks=4, kept=128, rest=True)
PACKAGES = ("torch", "transformers", "triton", "flash-linear-attention", "fla-core", "flash-attn", "peft", "accelerate")
STEPS = 12  # whose median is one figure
PREFILLS = 3
LIMIT = 20.0  # seconds of one prefill


@dataclass
class Run:
    """What is measured where, and what has been found.

    Attributes:
        shapes: of the models. lengths, batches: that are measured.
        ends: on the clock of `time.monotonic`.
        speeds: of the machine, once measured.
    """

    device: str
    dtype: torch.dtype
    shapes: dict
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    tiny: bool
    out: Path
    ends: float
    speeds: dict = field(default_factory=dict)

    def write(self, row: dict) -> None:
        line = json.dumps(row)
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def late(self) -> bool:
        return time.monotonic() > self.ends

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


def versions(run: Run) -> Iterator[dict]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    row = {"python": platform.python_version(), "packages": found, "cuda": torch.version.cuda, "cpu": processor_name()}
    if run.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(run.device)
        row |= {"card": card.name, "memory_bytes": card.total_memory, "capability": [card.major, card.minor]}
    yield row


def machine(run: Run) -> Iterator[dict]:
    run.speeds = measure_machine(run.device, run.dtype)
    yield dict(run.speeds)


@contextmanager
def built(run: Run, spec: LayerSpec):
    """A model of random weights whose layers are all as told; its memory is free again behind."""
    config_class, model_class = model_classes(FAMILIES["llama"])
    config = config_class(**run.shapes, liger=liger_block([spec] * run.shapes["num_hidden_layers"]))
    torch.manual_seed(0)
    with torch.device(run.device):
        model = model_class._from_config(config, dtype=run.dtype).eval()
    try:
        yield model
    finally:
        model.to("meta")
        release(run)


def release(run: Run) -> None:
    if run.device.startswith("cuda"):
        torch.cuda.empty_cache()


def sides(run: Run) -> Iterator[tuple[str, object, Callable]]:
    """(name, model, context that sets the model up) of everything that is timed; one model is there at a time."""
    for name, spec in (("liger gla", PLAIN), ("liger calibrated", CALIBRATED)):
        with built(run, spec) as model:
            yield name, model, lambda model=model: mode(model, "liger")
            if spec is CALIBRATED:
                continue
            yield "softmax sdpa", model, lambda model=model: mode(model, "softmax")
            if run.device.startswith("cuda") and find_spec("flash_attn"):
                yield "softmax flash-attn", model, lambda model=model: mode(model, "softmax", "flash_attention_2")


@contextmanager
def mode(model, name: str, implementation: str = "sdpa"):
    model.set_attn_implementation(implementation)
    model.set_attention_mode(name)
    try:
        yield model
    finally:
        model.set_attention_mode("liger")
        model.set_attn_implementation("sdpa")


def each_side(run: Run, measure: Callable) -> Iterator[dict]:
    """`measure(side, model, length)` for every side, batch and length; what does not fit or takes too long, said so."""
    for name, model, activate in sides(run):
        masked = mask_is_given(model)
        for batch in run.batches:
            side = Side(name, activate, run.shapes["vocab_size"], run.device, batch, masked)
            for length in run.lengths:
                row = {"side": name, "batch": batch, "tokens": length}
                if run.late():
                    yield {**row, "skipped": "out of time"}
                    continue
                try:
                    yield {**row, **measure(side, model, length)}
                except (OutOfTime, torch.OutOfMemoryError) as error:
                    reason = f"more than {LIMIT:g} s" if isinstance(error, OutOfTime) else "out of memory"
                    yield {**row, "skipped": reason}
                    release(run)
                    break
                except Exception as error:  # of one side's kernels: the others go on
                    yield {**row, "failed": sentence(error)}
                    break


def decode(run: Run) -> Iterator[dict]:
    def measure(side: Side, model, length: int) -> dict:
        decoding = Decoding(side, length, side.filled_cache(length))
        for _ in range(2):
            decoding.step()
        seconds = statistics.median(decoding.step() for _ in range(STEPS))
        cost = step_cost(model, cache_shapes(decoding.cache), side.batch_size, softmax=side.which.startswith("softmax"))
        return {
            "step_ms": 1e3 * seconds,
            "tokens_per_s": side.batch_size / seconds,
            "cache_bytes": cache_bytes(decoding.cache),
            "launches": launches(run, decoding.step),
            "bandwidth_share": cost["bytes"] / seconds / run.speeds["bandwidth_bytes_per_s"],
        }

    yield from each_side(run, measure)


def prefill(run: Run) -> Iterator[dict]:
    def measure(side: Side, model, length: int) -> dict:
        side.prefill(min(length, 256), float("inf"))
        peak = PeakMemory(run.device, sum(x.numel() * x.element_size() for x in model.parameters()))
        peak.start()
        seconds = [side.prefill(length, LIMIT)[0]]
        while len(seconds) < PREFILLS and sum(seconds) < 2:
            seconds.append(side.prefill(length, LIMIT)[0])
        best = min(seconds)
        return {"prefill_s": best, "tokens_per_s": side.batch_size * length / best, "peak_bytes": peak.stop()}

    yield from each_side(run, measure)


class Operations(TorchDispatchMode):
    """How many operations are dispatched."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def launches(run: Run, call: Callable) -> int:
    """Kernels that a call starts; on a CPU the operations that are dispatched, without views."""
    if not run.device.startswith("cuda"):
        with Operations() as operations:
            call()
        return operations.count
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        run.synchronize()
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemcpyAsync")
    return sum(event.count for event in profiler.key_averages() if event.key in names)


def lora(run: Run) -> Iterator[dict]:
    """One micro-batch of the recipe `paper`: forward, backward and AdamW, with gradient checkpointing."""
    from peft import LoraConfig, get_peft_model

    from liger_cli.training.objectives import TrainedModel
    from liger_cli.training.recipes import Stage

    tokens = 64 if run.tiny else 1024
    for name, spec in (("liger gla", PLAIN), ("liger calibrated", CALIBRATED)):
        with built(run, spec) as base:
            model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]))
            model.__class__ = TrainedModel
            model.stage = Stage("ce")
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.config.use_cache = False
            model.train()
            trained = [one for one in model.parameters() if one.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-3)
            ids = torch.randint(run.shapes["vocab_size"], (1, tokens), device=run.device)
            batch = {"input_ids": ids, "labels": ids, "lengths": torch.tensor([tokens], device=run.device)}

            def step(model=model, batch=batch, optimizer=optimizer):
                (model(**batch)["loss"] / tokens).backward()
                optimizer.step()
                optimizer.zero_grad()

            for kind in ("liger", "softmax") if spec is PLAIN else ("liger",):
                base.set_attention_mode(kind)
                step()
                peak = PeakMemory(run.device, sum(x.numel() * x.element_size() for x in model.parameters()))
                peak.start()
                seconds = min(run.seconds(step) for _ in range(3))
                side = name if kind == "liger" else "softmax sdpa"
                yield {"side": side, "tokens": tokens, "step_s": seconds, "peak_bytes": peak.stop()}


def calibration(run: Run) -> Iterator[dict]:
    from liger_cli.commands.convert import convert
    from liger_cli.shipped import BASE_DIR, prose

    with tempfile.TemporaryDirectory() as folder:
        base, given = BASE_DIR, {}
        if run.tiny:
            base, text = small_base(Path(folder, "base")), Path(folder, "text.txt")
            text.write_text(prose()[1][:6000], encoding="utf-8")
            given = {"calibration_data": str(text), "settings": {"window": 8}}
        seconds = run.seconds(lambda: convert(str(base), str(Path(folder, "out")), calibrate=True, **given))
        report = json.loads(Path(folder, "out", "liger.json").read_text(encoding="utf-8"))["calibration"]
        yield {"seconds": seconds, **{name: report[name] for name in ("tokens", "kl", "window_only_kl")}}


def small_base(folder: Path) -> Path:
    """Random weights of two small layers with the shipped base's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from liger_cli.shipped import BASE_DIR

    shutil.copytree(BASE_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(BASE_DIR)
    for name, value in {**TINY, "max_position_embeddings": 256, "vocab_size": config.vocab_size}.items():
        setattr(config, name, value)
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def parity(run: Run) -> Iterator[dict]:
    """Relative RMS errors against the definitions in float64, by gate: outputs and states over a text, and a step."""
    from liger_cli.templates.liger_backend import choose

    on_cuda = run.device.startswith("cuda")
    length, dim = (40, 16) if run.tiny else (150, 64)
    for name in sorted(GATES):
        for dtype in (torch.float32, torch.bfloat16) if on_cuda else (torch.float32,):
            row = {"gate": name, "dtype": str(dtype).removeprefix("torch.")}
            if run.late():
                yield {**row, "skipped": "out of time"}
                continue
            spec = LayerSpec(gate=name, slots=64)
            sizes = {"query_heads": 4, "kv_heads": 2, "dim": dim, "spec": spec}
            try:
                rule, inputs, state = example(name, length, 2.0, **sizes)
                wanted = exactly("naive", rule, inputs, state, torch.float64)
                leaves = [x.float().to(run.device) for x in inputs]
                states = tuple(x.float().to(run.device) for x in tuple_of(state))
                choice = choose(rule, *rule.kind(leaves[0], leaves[3]), on_cuda, "auto", dtype)
                row |= {"backend": choice.backend, "why": choice.why}
                with torch.no_grad():
                    output, final = choice.chunk(*leaves, rule.initial(states))
                    found = [output, *tuple_of(final)]
                    row["chunk"] = max(relative_rms(x.cpu(), y) for x, y in zip(found, wanted, strict=True))
                    one = [x[:, :, -1:] for x in leaves]
                    output, final = choice.step(*one, rule.initial(states))
                    last = exactly("naive", rule, [x[:, :, -1:] for x in inputs], state, torch.float64)
                    found = [output, *tuple_of(final)]
                    row["step"] = max(relative_rms(x.cpu(), y) for x, y in zip(found, last, strict=True))
                yield row
            except Exception as error:
                yield {**row, "failed": sentence(error)}
    yield from window_parity(run)


def window_parity(run: Run) -> Iterator[dict]:
    from liger_cli.templates.liger_backend import describe_window
    from liger_cli.templates.liger_window import Scoring, window_attention

    backend, why = describe_window(run.device.startswith("cuda"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 64, generator=generator) for heads, n in ((8, 200), (2, 263), (2, 263)))
    found = window_attention(*(x.to(run.device, run.dtype) for x in (q, k, v)), 64, Scoring(0.125), backend="auto")[0]
    exact = [x.to(run.dtype).double() for x in (q, k, v)]
    wanted = window_attention(*exact, 64, Scoring(0.125), backend="torch")[0]
    yield {"window": backend, "why": why, "dtype": str(run.dtype), "error": relative_rms(found.cpu(), wanted)}


def sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


PARTS = {
    part.__name__: part for part in (versions, machine, decode, prefill, lora, calibration, parity)
}  # in this order


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="lines are added to it")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing is begun")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--layers", type=int, help="of the model of 8B's shapes; all 32 by default")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the script")
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(unknown))}, but there are {', '.join(PARTS)}")
    shapes = dict(TINY if options.tiny else LLAMA_8B)
    if options.layers:
        shapes["num_hidden_layers"] = options.layers
    half = options.device.startswith("cuda")
    work = Run(
        device=options.device,
        dtype=torch.bfloat16 if half else torch.float32,
        shapes=shapes,
        lengths=(64, 256) if options.tiny else tuple(1024 << n for n in range(6)),
        batches=(1, 2) if options.tiny else (1, 16),
        tiny=options.tiny,
        out=options.out,
        ends=time.monotonic() + 60 * options.minutes,
    )
    # What a step's share of the bandwidth is taken of.
    wanted = ["machine", *wanted] if "decode" in wanted and "machine" not in wanted else wanted
    for name in (name for name in PARTS if name in wanted):
        began = time.perf_counter()
        if work.late():
            work.write({"part": name, "skipped": "out of time"})
            continue
        try:
            for row in PARTS[name](work):
                work.write({"part": name, **row})
        except Exception as error:
            work.write({"part": name, "failed": sentence(error)})
        work.write({"part": name, "took_s": round(time.perf_counter() - began, 1)})


if __name__ == "__main__":
    main()
