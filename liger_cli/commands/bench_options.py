"""The options of `liger bench`, and of its Python function."""

from dataclasses import dataclass

from liger_cli.commands.options import EXPERT, device, dtype, measured, option, output_format, save


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Time and memory of MODEL and of its softmax base at growing lengths, in the same run."""

    model: str | None = measured()
    seq_len: int = option(32768, "Longest text in tokens; 1024, 2048 ... are measured on the way.")
    batch_size: int = option(1, "Sequences at once.")
    batch_sweep: bool = option(False, "Find the largest batch that fits at --seq-len, too.")
    shapes_only: bool = option(False, "MODEL is a config.json, folder or hub id: random weights, no download.")
    device: str = device()
    dtype: str = dtype()
    new_tokens: int = option(16, "Decoding steps of a repetition, whose median counts.", panel=EXPERT)
    repetitions: int = option(5, "Repetitions that mean and spread are taken from.", panel=EXPERT)
    base_limit: float = option(60.0, "Seconds after which a run is stopped and shown as such.", panel=EXPERT)
    output_format: str = output_format()
    save: bool = save()
