"""What a LoRA training step costs as Liger and as softmax attention on this machine, as ratios within one run.

    python tests/benchmarks/train_step.py [--gates gla,gdn] [--tokens 1024] [--repetitions 9] [--profile]

Two layers of Llama-3.2-1B's shapes (hidden 2048, 32 query and 8 key/value heads of 64, MLP 8192) with random float32
weights and LoRA of rank 8 on q, k and v: forward, backward and AdamW on one row of tokens, as `liger finetune` runs it
(cross-entropy in chunks). Softmax is the same model with its layers switched, and torch's causal attention. The two
run in turns, so that what else the machine does meets both; the ratio is that of the medians, the spread the quartiles
of the single turns' ratios. The vocabulary is kept small, since it costs both the same. Memory is the peak of a step
in a fresh process, weights included; glibc is told to give freed memory back (MALLOC_MMAP_THRESHOLD_), so that it is
memory in use and not what its heap keeps in pieces, some 150 MiB more for softmax and up to twice that for Liger. Aims:
time at most 1.15, memory at most 1.1. Takes minutes on a slow CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_speed import cpu_name

SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}
AIMS = {"time": 1.15, "memory": 1.1}


class Step:
    """A model with a LoRA adapter and an optimizer; calling it runs one training step."""

    def __init__(self, gate: str, mode: str, tokens: int, vocabulary: int):
        from peft import LoraConfig, get_peft_model

        from liger_cli.checkpoint.families import FAMILIES
        from liger_cli.checkpoint.model_code import model_classes
        from liger_cli.templates.liger_config import LayerSpec, liger_block
        from liger_cli.training.objectives import TrainedModel
        from liger_cli.training.recipes import Stage

        torch.manual_seed(0)
        config_class, model_class = model_classes(FAMILIES["llama"])
        layers = liger_block([LayerSpec(gate=gate)] * SHAPES["num_hidden_layers"])
        model = model_class(config_class(**SHAPES, vocab_size=vocabulary, liger=layers))
        model.set_attention_mode(mode)
        lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"])
        self.model = get_peft_model(model, lora).train()
        self.model.__class__ = TrainedModel
        self.model.stage = Stage("ce")
        self.optimizer = torch.optim.AdamW([one for one in self.model.parameters() if one.requires_grad], lr=1e-3)
        ids = torch.randint(0, vocabulary, (1, tokens))
        self.batch = {"input_ids": ids, "labels": ids, "lengths": torch.tensor([tokens])}

    def __call__(self) -> None:
        loss = self.model(**self.batch)["loss"] / self.batch["lengths"].sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(step: Step, mode: str) -> float:
    step.model.get_base_model().set_attention_mode(mode)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_ratio(gate: str, tokens: int, vocabulary: int, repetitions: int) -> dict:
    """Medians of both and the ratio of Liger's to softmax's, with quartiles."""
    step = Step(gate, "liger", tokens, vocabulary)
    for mode in ("liger", "softmax"):
        seconds(step, mode)
    turns = [(seconds(step, "liger"), seconds(step, "softmax")) for _ in range(repetitions)]
    ratios = [liger / softmax for liger, softmax in turns]
    liger, softmax = (statistics.median(side) for side in zip(*turns, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"liger_s": liger, "softmax_s": softmax, "ratio": liger / softmax, "quartiles": [quartiles[0], quartiles[2]]}


def memory_ratio(gate: str, tokens: int, vocabulary: int) -> dict:
    """Peak memory of a step beyond the model itself, each in a process of its own, and the ratio of the whole."""
    found = {}
    for mode in ("liger", "softmax"):
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import train_step as bench
from liger_cli.system.memory import PeakMemory
step = bench.Step({gate!r}, {mode!r}, {tokens}, {vocabulary})
weights = sum(p.numel() * p.element_size() for p in step.model.parameters())
step()
meter = PeakMemory("cpu", weights)
meter.start()
step()
print(meter.stop(), weights)
"""
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        peak, weights = done.stdout.split()[-2:]
        if peak == "None":
            return {}
        found[mode] = int(peak)
    return {
        "liger_mib": found["liger"] / 2**20,
        "softmax_mib": found["softmax"] / 2**20,
        "weights_mib": int(weights) / 2**20,
        "ratio": found["liger"] / found["softmax"],
    }


def profile(gate: str, tokens: int, vocabulary: int, rows: int = 15) -> str:
    """The operations of one step of each kind, by their own time on the CPU."""
    parts = []
    step = Step(gate, "liger", tokens, vocabulary)
    for mode in ("liger", "softmax"):
        seconds(step, mode)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            seconds(step, mode)
        averages = profiler.key_averages()
        calls = sum(event.count for event in averages)
        table = averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40)
        parts.append(f"{gate if mode == 'liger' else mode}: {calls} operations\n{table}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", default="gla,gdn")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="print the operations instead")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    gates = options.gates.split(",")
    if options.profile:
        print("\n".join(profile(gate, options.tokens, options.vocabulary) for gate in gates))
        return
    results = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "aims": AIMS}
    for gate in gates:
        results[gate] = {
            "time": time_ratio(gate, options.tokens, options.vocabulary, options.repetitions),
            "memory": memory_ratio(gate, options.tokens, options.vocabulary),
        }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{results['cpu']}, {results['threads']} threads, torch {results['torch']}; {options.tokens} tokens")
    for gate in gates:
        times, memory = results[gate]["time"], results[gate]["memory"]
        low, high = times["quartiles"]
        print(f"{gate}: time {times['ratio']:.2f} of softmax's (quartiles {low:.2f}-{high:.2f}; aim {AIMS['time']}): "
              f"{times['liger_s']:.3f} s and {times['softmax_s']:.3f} s")  # fmt: skip
        if memory:
            print(f"{gate}: peak memory {memory['ratio']:.2f} of softmax's (aim {AIMS['memory']}): "
                  f"{memory['liger_mib']:.0f} and {memory['softmax_mib']:.0f} MiB, {memory['weights_mib']:.0f} of them "
                  "weights")  # fmt: skip


if __name__ == "__main__":
    main()
