"""Plots of results, as PNG and SVG, readable in a paper: matplotlib without a display."""

from pathlib import Path

from liger_cli.evaluation.subject import TITLES
from liger_cli.system.figures import new_figure, save_figure

COLOURS = {"model": "#0072b2", "base": "#d55e00"}  # of Okabe and Ito's palette, told apart by colour-blind eyes
LABELS = {"model": "Liger model", "base": "softmax base"}
MARKERS = {"model": "o", "base": "s"}


def bench_plot(result: dict, folder: Path) -> list[str]:
    """Decoding latency, prefill time and cache memory against length, both sides. Returns the files' names.

    A cross at the upper edge marks a length at which a run was stopped or not tried.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = new_figure(1, 3, (10.5, 3.1))
    panels = (
        ("latency_ms", "decoding, ms a token", "tokens before", 1),
        ("prefill_s", "prefill, s", "tokens read", 1),
        ("cache_bytes", "cache, MiB", "tokens before", 1 << 20),
    )
    ticks = sorted({row["position"] for row in result["rows"]})
    for axis, (name, label, length, unit) in zip(axes[0], panels, strict=True):
        for which in ("base", "model"):
            rows = [row for row in result["rows"] if row["which"] == which]
            style = {"color": COLOURS[which], "markersize": 4}
            known = [row for row in rows if row[name] is not None]
            values = [row[name]["mean"] if isinstance(row[name], dict) else row[name] / unit for row in known]
            errors = [(row[name]["std"] or 0) if isinstance(row[name], dict) else 0 for row in known]
            places = [row["position"] for row in known]
            axis.errorbar(places, values, errors, label=LABELS[which], marker=MARKERS[which], capsize=2, **style)
            if stopped := [row["position"] for row in rows if row[name] is None]:
                at_the_edge = {"transform": axis.get_xaxis_transform(), "linestyle": ""}
                edge = {"base": 0.96, "model": 0.92}[which]
                label_ = f"{LABELS[which]}: stopped"
                axis.plot(stopped, [edge] * len(stopped), marker="x", label=label_, **at_the_edge, **style)
        axis.set(xlabel=length, ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(ticks, [_tokens(tick) for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    if any(row["prefill_s"] is None for row in result["rows"]):
        axes[0][1].legend(frameon=False, fontsize=8)
    return save_figure(figure, folder, "bench")


def recall_plot(result: dict, folder: Path) -> list[str]:
    """Heat map of recall: kinds and methods by distance, one panel a column. Returns the files' names."""
    if "recall" not in result:
        return []
    from liger_cli.evaluation.report import METHOD_TITLES, RECALL_TITLES

    values = result["recall"]
    lines = [(kind, method) for kind, methods in values["model"].items() for method, cells in methods.items() if cells]
    distances = sorted({distance for kind, method in lines for distance in values["model"][kind][method]}, key=int)
    columns = [name for name in TITLES if name in values]
    figure, axes = new_figure(1, len(columns), (2.2 + 2.6 * len(columns), 0.9 + 0.32 * len(lines)), sharey=True)
    for axis, column in zip(axes[0], columns, strict=True):
        cells = [
            [values[column][kind][method].get(distance, float("nan")) for distance in distances]
            for kind, method in lines
        ]
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        title = result["model"]["base_column"]["label"] if column == "base" else TITLES[column]
        axis.set(title=title, xlabel="distance, tokens")
        axis.set_xticks(range(len(distances)), distances, rotation=45)
        axis.set_yticks(
            range(len(lines)), [f"{RECALL_TITLES[kind]}, {METHOD_TITLES[method]}" for kind, method in lines]
        )
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                if cell == cell:
                    shade = "white" if cell < 0.6 else "black"
                    axis.text(x, y, f"{100 * cell:.0f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, ax=axes[0].tolist(), label="exact answers", format=lambda x, _: f"{100 * x:.0f} %")
    return save_figure(figure, folder, "recall")


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
