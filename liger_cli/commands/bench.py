"""`liger bench`: what a model and its base cost, measured, printed and kept in the model's folder."""

import json

from liger_cli.checkpoint.folders import next_step, resolve_model
from liger_cli.checkpoint.reader import check_dtype
from liger_cli.commands.bench_options import BenchOptions
from liger_cli.commands.options import check_positive
from liger_cli.evaluation.report import bench_notes, bench_tables
from liger_cli.evaluation.subject import open_subject, read_kind
from liger_cli.system.errors import UsageError
from liger_cli.system.tables import FORMATS, print_tables

COUNTS = ("seq_len", "batch_size", "new_tokens", "repetitions")
MEASURED = (*COUNTS, "base_limit", "batch_sweep")  # parameters of `bench`


def run(model: str | None = None, *, as_json: bool = False, quiet: bool = False, **options) -> dict:
    """Measure, print, and put results, plot and model card section into the model's folder.

    Args:
        model, options: fields of `BenchOptions`. quiet: print nothing.
    Returns:
        What `--json` prints; see `benchmark.bench.bench`.
    """
    asked = BenchOptions(model=model, **options)
    shown = "json" if as_json else asked.output_format
    if shown not in FORMATS:
        raise UsageError(f"--format is {shown!r}, but has to be one of {', '.join(FORMATS)}")
    check_positive(asked, *COUNTS)
    if not asked.base_limit > 0:
        raise UsageError(f"--base-limit is {asked.base_limit}, but has to be more than 0 seconds")
    where = {"device": asked.device, "dtype": asked.dtype}
    if asked.shapes_only and asked.model is None:
        raise UsageError("--shapes-only needs a MODEL: a config.json, a folder or a hub id")
    folder = None if asked.shapes_only else resolve_model(asked.model, "bench")
    if folder:
        read_kind(folder)
    check_dtype(asked.dtype, "auto")
    from liger_cli.benchmark.bench import bench
    from liger_cli.benchmark.shapes import shapes_subject

    if asked.shapes_only:
        subject = shapes_subject(asked.model, **where)
    else:
        subject = open_subject(folder, **where, original=False)
    result = bench(subject, **{name: getattr(asked, name) for name in MEASURED})
    subject.check_unchanged()
    notes = bench_notes(result)
    if asked.shapes_only:
        following = next_step("base", asked.model)
    else:
        following = next_step({"adapter": "adapter", "converted": "calibrated"}.get(subject.kind, "timed"), folder)
    if asked.save and not asked.shapes_only:
        from liger_cli.evaluation.results_card import keep_result

        notes += keep_result(subject.folder, "bench", result)
    if quiet:
        return result
    if shown == "json":
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print_tables(bench_tables(result), shown, (*notes, following))
    return result
