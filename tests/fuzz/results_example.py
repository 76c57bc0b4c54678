"""A results file with every part that liger writes, in small."""

from liger_cli.evaluation.results import FORMAT

COLUMNS = ("base", "model", "window_only")
SPREAD = {"mean": 4.0, "std": 0.1}
MODEL = {
    "folder": "m", "kind": "converted", "dtype": "float32", "device": "cpu", "fingerprint": {"digest": "a"},
    "base_column": {"label": "base", "source": "the softmax switch"},
}  # fmt: skip
STAMP = {"created": "2026-01-02T03:04:05+00:00", "command": ["liger"], "versions": {"liger": "0.1.0", "torch": None}}
FIGURE = {"token": 2.0, "byte": 1.0, "by_position": {"1-64": 2.0}}
RECALL = {"needle": {"128": {"exact": 0.5, "digits": 0.7}}, "second_reading": 0.3}
AGREEMENT = {"kl": 0.1, "top1": 0.9, "by_position": {"1-64": 0.1}}
TASK = {"piqa": {"acc": {"value": 0.5, "stderr": 0.01, "higher_is_better": True}}}


def _row(which: str) -> dict:
    return {
        "which": which, "position": 1024, "latency_ms": SPREAD, "latency_note": None, "prefill_s": SPREAD,
        "prefill_note": None, "cache_bytes": 4096, "peak_bytes": 8192,
        "peak_bytes_spread": {"mean": 8000.0, "std": 100.0}, "roofline_ms": 1.0, "roofline_fraction": 0.25,
    }  # fmt: skip


RESULTS = {
    "format": FORMAT,
    "eval": {
        **STAMP, "seed": 0, "model": MODEL,
        "perplexity": {
            **dict.fromkeys(COLUMNS, FIGURE), "recovery": FIGURE,
            "text": {"name": "t", "tokens": 1000, "bytes": 4000, "seq_len": 64}, "measured": {**STAMP, "seed": 1},
        },
        "agreement": {
            **dict.fromkeys(COLUMNS, AGREEMENT), "recovery": AGREEMENT, "text": {"name": "t"},
        },
        "recall": {
            **dict.fromkeys(COLUMNS, RECALL), "recovery": {"needle": {"128": 0.5}, "second_reading": 0.9},
            "count": 8, "gap": 300, "base_fails": None, "text": {"name": "t"},
        },
        "tasks": {
            **dict.fromkeys(COLUMNS, TASK), "recovery": {"piqa": {"acc": 1.0}}, "chance": {"piqa": {"acc": 0.5}},
            "settings": {"num_fewshot": None, "limit": None, "metadata": None}, "published": None,
            "details": {"piqa": {"num_fewshot": 0, "version": 1.0, "examples": 10}},
            "harness": {"lm_eval": "0.4.9", "seed": 0},
        },
        "samples": [{"prompt": "p", "base": "b", "model": "m", "window_only": "w"}],
        "plots": ["evaluation.png"],
    },
    "bench": {
        **STAMP, "model": MODEL, "rows": [_row("model"), _row("base")],
        "machine": {"name": "cpu", "threads": 2, "bandwidth_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11},
        "settings": {"seq_len": 1024, "batch_size": 1, "new_tokens": 4, "repetitions": 2},
        "batch_sweep": [
            {
                "which": "model", "batch_size": 4, "at_least": True, "latency_ms": SPREAD, "tokens_per_s": 10.0,
                "note": "memory",
            }
        ],
        "plots": ["bench.png"],
    },
}  # fmt: skip
