"""`liger bench`: prefill, decoding at growing positions, cache and memory of a model and of its softmax base."""

import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from liger_cli.benchmark.backends import model_backends
from liger_cli.benchmark.contest import Decoding, OutOfTime, Side, cache_bytes, cache_shapes, mask_is_given
from liger_cli.benchmark.roofline import limit_ms, measure_machine, processor_name, step_cost
from liger_cli.evaluation.results import stamp
from liger_cli.evaluation.subject import Subject
from liger_cli.system.errors import is_out_of_memory
from liger_cli.system.memory import PeakMemory, available
from liger_cli.system.progress import progress

SIDES = ("model", "base")
FIRST_POSITION = 1024
SWEEP_END = 1024  # sequences
SWEEP_STEPS = 3
MAX_PREFILLS = 3  # runs of one prefill at most
PREFILL_SECONDS = 10.0  # a prefill is repeated only while it took less in all
MEMORY_SHARE = 0.8  # of the free memory that caches may take


def bench(
    subject: Subject,
    *,
    seq_len: int = 32768,
    batch_size: int = 1,
    new_tokens: int = 16,
    repetitions: int = 5,
    base_limit: float = 60.0,
    beside: dict[str, Subject] | None = None,
    batch_sweep: bool = False,
) -> dict:
    """Measure the model and, with the same weights, its softmax base, both as `generate` runs them.

    Args:
        seq_len: the longest position; the others are 1024, 2048, 4096 ... below it.
        batch_size: sequences at once.
        new_tokens: steps of each repetition, whose median is one figure.
        repetitions: figures that mean and spread are taken from.
        base_limit: seconds after which a prefill is stopped; longer ones are then not tried.
        beside: other models by what their rows are called, timed in turn with these two.
        batch_sweep: find the largest batch of `seq_len` tokens that fits, too.
    Returns:
        What `--json` prints: `rows`, one for each side and position, with times as means with their spread,
        `cache_bytes`, which are counted, and `peak_bytes`, the most of several runs; `flatness`, of each side the
        latency at the longest position over that at the shortest, a ratio for each repetition, its steps taken in turn;
        `prefill_speedup`, the base's time over the model's at the longest position that both have read; `backend`,
        what the kernels run on.
    """
    model = subject.liger_model
    device = str(model.device)
    backend = model_backends(model)
    weights = sum(x.numel() * x.element_size() for x in subject.model.parameters())
    masked = mask_is_given(model)
    run = {
        **{which: (subject, which) for which in SIDES},
        **{name: (one, "model") for name, one in (beside or {}).items()},
    }
    contestants = [
        Side(name, _activation(*which), which[0].liger_model.config.vocab_size, device, batch_size, masked)
        for name, which in run.items()
    ]
    positions = grown_positions(seq_len)
    rows: dict[tuple[str, int], dict] = {}
    with progress("prefill", len(run) * len(positions)) as step:
        for side in contestants:
            _prefills(side, positions, base_limit, PeakMemory(device, weights), rows, step)
    ready = [contestant for side in contestants for contestant in _decodings(side, positions, rows, device)]
    flatness = _race(ready, new_tokens, repetitions, base_limit, rows)
    speeds = measure_machine(device, model.dtype)
    for row in rows.values():
        if row["latency_ms"] is not None:
            own = run[row["which"]][0].liger_model
            cost = step_cost(own, row["cache_shapes"], batch_size, softmax=row["which"] == "base")
            row["roofline_ms"] = limit_ms(cost, speeds)
            row["roofline_fraction"] = row["roofline_ms"] / row["latency_ms"]["mean"]
    sweep = [largest_batch(side, seq_len, base_limit) for side in contestants] if batch_sweep else []
    return {
        **stamp(),
        "model": {**subject.describe(), "weight_bytes": weights},
        "settings": {
            "seq_len": seq_len,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            "repetitions": repetitions,
            "base_limit_s": base_limit,
        },
        "machine": {**machine(device), **speeds},
        "backend": backend,
        "rows": list(rows.values()),
        "flatness": flatness,
        "prefill_speedup": _prefill_speedup(rows),
        **({"batch_sweep": sweep} if batch_sweep else {}),
    }


def grown_positions(seq_len: int) -> list[int]:
    """1024, 2048, 4096 ... and the last one; a shorter length stands alone."""
    positions = [seq_len]
    position = FIRST_POSITION
    while position < seq_len:
        positions.append(position)
        position *= 2
    return sorted(positions)


def machine(device: str) -> dict:
    """What the figures were measured on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "system": platform.platform()}


def _activation(subject: Subject, which: str) -> Callable:
    return lambda: subject.column(which)


def _prefills(side: Side, positions: list[int], limit: float, peak: PeakMemory, rows: dict, step) -> None:
    """Fill in a row for each position: prefill time, and the cache and the peak memory that came of it."""
    side.prefill(min(positions[0], 256), float("inf"))  # warm-up
    stopped, read = None, None
    for position in positions:
        if stopped is None and read is not None:
            before, took = read
            if took * position / before > limit:  # time grows at least as fast as the length
                stopped = f"not tried: {before} tokens took {took:.3g} s, so {position} take more than {limit:g} s"
        row = rows[side.which, position] = {
            "which": side.which,
            "position": position,
            "latency_ms": None,
            "latency_note": None,
            "prefill_s": None,
            "prefill_note": stopped,
            "prefill_tokens_per_s": None,
            "cache_bytes": None,
            "cache_shapes": None,
            "peak_bytes": None,
            "peak_bytes_spread": None,
            "roofline_ms": None,
            "roofline_fraction": None,
            "cache": None,
        }
        seconds: list[float] = []
        peaks: list[int | None] = []
        try:
            while stopped is None and len(seconds) < MAX_PREFILLS and sum(seconds) < PREFILL_SECONDS:
                row["cache"] = None
                peak.start()
                taken, row["cache"] = side.prefill(position, limit)
                seconds.append(taken)
                row["cache_bytes"], row["cache_shapes"] = cache_bytes(row["cache"]), cache_shapes(row["cache"])
                side.step(row["cache"], position)
                peaks.append(peak.stop())
        except OutOfTime:
            row["prefill_note"] = f"stopped after {limit:g} s"
            stopped = f"not tried: {position} tokens took more than {limit:g} s"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            row["cache"] = None
            row["prefill_note"] = "out of memory"
            stopped = f"not tried: {position} tokens were out of memory"
        if seconds:
            read = position, min(seconds)
            row["prefill_s"] = spread(seconds)
            if held := [nbytes for nbytes in peaks if nbytes is not None]:
                row["peak_bytes"], row["peak_bytes_spread"] = max(held), spread(held)
            row["prefill_tokens_per_s"] = side.batch_size * position / statistics.mean(seconds)
        if side.which == "base":
            row["cache"] = None  # grows with the text; decoding makes one for all positions
        step()


def _decodings(side: Side, positions: list[int], rows: dict, device: str) -> list[Decoding]:
    """A cache at every position that fits into memory.

    The model's are those that prefill left. The base's are parts of one that holds random keys and values: a step takes
    as long whatever their values are.
    """
    ready: list[Decoding] = []
    longest = None
    for position in reversed(positions):
        row = rows[side.which, position]
        cache = row.pop("cache")
        if cache is None:
            free = available(device)
            if longest is None and free is not None and 2 * side.needed_bytes(position) > MEMORY_SHARE * free:
                row["latency_note"] = "its cache does not fit into memory"
                continue
            longest = longest or side.filled_cache(position)
            cache = side.shortened(longest, position)
            row["cache_bytes"], row["cache_shapes"] = cache_bytes(cache), cache_shapes(cache)
        ready.append(Decoding(side, position, cache))
    return ready[::-1]


def _race(ready: list[Decoding], new_tokens: int, repetitions: int, limit: float, rows: dict) -> dict:
    """Take the steps of all contestants in turn, so that a busy moment of the machine meets them all alike.

    Returns:
        The flatness of each side that was measured at two positions or more.
    """
    running = []
    for contestant in ready:
        contestant.step()  # warm-up
        if contestant.step() * new_tokens * repetitions > limit:
            row = rows[contestant.side.which, contestant.position]
            row["latency_note"] = f"not measured: {new_tokens * repetitions} steps take more than {limit:g} s"
        else:
            running.append(contestant)
    figures: dict[int, list[float]] = {index: [] for index in range(len(running))}
    order = list(figures)
    shuffle = random.Random(0).shuffle
    with progress("decoding", repetitions * new_tokens) as step:
        for _ in range(repetitions):
            taken: dict[int, list[float]] = {index: [] for index in order}
            for _ in range(new_tokens):
                shuffle(order)
                for index in order:
                    taken[index].append(1e3 * running[index].step())
                step()
            for index, milliseconds in taken.items():
                figures[index].append(statistics.median(milliseconds))
    for index, contestant in enumerate(running):
        rows[contestant.side.which, contestant.position]["latency_ms"] = spread(figures[index])
    flatness = {}
    for which in dict.fromkeys(contestant.side.which for contestant in running):
        of_side = {x.position: figures[index] for index, x in enumerate(running) if x.side.which == which}
        first, last = min(of_side), max(of_side)
        if first < last:
            ratios = [long / short for long, short in zip(of_side[last], of_side[first], strict=True)]
            flatness[which] = {"from": first, "to": last, "ratio": spread(ratios)}
    return flatness


def _prefill_speedup(rows: dict) -> dict | None:
    """`{position, ratio}` of the mean times at the longest position that both sides have read."""
    both = {position for _, position in rows if all(rows.get((side, position), {}).get("prefill_s") for side in SIDES)}
    if not both:
        return None
    longest = max(both)
    model, base = (rows[side, longest]["prefill_s"]["mean"] for side in SIDES)
    return {"position": longest, "ratio": base / model}


def largest_batch(side: Side, tokens: int, limit: float) -> dict:
    """The largest batch, by doubling and then halving the gap, whose caches of `tokens` tokens fit and take a step.

    Returns:
        `{which, position, batch_size, at_least, latency_ms, tokens_per_s, note}`; the note says why it ended,
        `at_least` whether that was before anything did not fit.
    """
    began = time.perf_counter()
    good, bad, latency, note, at_least = 0, None, None, "", False
    while bad is None or bad - good > max(1, good // 8):
        batch = (2 * good or 1) if bad is None else (good + bad) // 2
        if batch > SWEEP_END:
            note, at_least = f"the sweep ends at {SWEEP_END}", True
            break
        if time.perf_counter() - began > limit:
            note, at_least = f"the sweep ends after {limit:g} s", True
            break
        milliseconds, reason = _try_batch(replace(side, batch_size=batch), tokens)
        if milliseconds is None or milliseconds["mean"] > 1e3 * limit:
            bad, note = batch, reason or f"a step of {batch} takes more than {limit:g} s"
        else:
            good, latency = batch, milliseconds
    return {
        "which": side.which,
        "position": tokens,
        "batch_size": good,
        "at_least": at_least,
        "latency_ms": latency,
        "tokens_per_s": None if latency is None else 1e3 * good / latency["mean"],
        "note": note,
    }


def _try_batch(side: Side, tokens: int) -> tuple[dict | None, str]:
    """Milliseconds of a step with their spread, or None and why there are none."""
    free, needed = available(side.device), 2 * side.needed_bytes(tokens)
    if free is not None and needed > MEMORY_SHARE * free:
        return None, "the caches of more do not fit into memory"
    try:
        contestant = Decoding(side, tokens, side.filled_cache(tokens))
        contestant.step()
        return spread([1e3 * contestant.step() for _ in range(SWEEP_STEPS)]), ""
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None, "more is out of memory"


def spread(values: list[float]) -> dict:
    """`{mean, std, median, runs}`; the standard deviation of a single run is None."""
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "runs": len(values),
    }
