"""Figures as PNG and SVG, readable in a paper: matplotlib without a display."""

import io
from pathlib import Path

from liger_cli.system.outputs import write_whole


def new_figure(rows: int, columns: int, inches: tuple[float, float], **options):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "liger"  # the same figures give the same file
    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure, folder: Path, name: str) -> list[str]:
    names = []
    for suffix, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, **options)
        write_whole(folder / f"{name}.{suffix}", content.getvalue())
        names.append(f"{name}.{suffix}")
    return names
