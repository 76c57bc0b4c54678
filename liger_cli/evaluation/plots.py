"""Plots of results, as PNG and SVG, readable in a paper: matplotlib without a display."""

from pathlib import Path

from liger_cli.evaluation.subject import TITLES
from liger_cli.system.figures import new_figure, save_figure

COLOURS = {
    "model": "#0072b2",
    "base": "#d55e00",
    "window_only": "#999999",
}  # of Okabe and Ito's palette, told apart by colour-blind eyes
LABELS = {"model": "Liger model", "base": "softmax base"}
MARKERS = {"model": "o", "base": "s", "window_only": "x"}


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


def position_plot(result: dict, folder: Path) -> list[str]:
    """KL divergence from the base by position, and needles found by distance, for each column. The files' names."""
    agreement, recall = result.get("agreement"), result.get("recall")
    found = {} if recall is None else recall["model"]["needle"]
    panels = [panel for panel, there in ((_kl_panel, agreement), (_needle_panel, found)) if there]
    if not panels:
        return []
    figure, axes = new_figure(1, len(panels), (4.2 * len(panels), 3.1))
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(result, axis)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, folder, "evaluation")


def _kl_panel(result: dict, axis) -> None:
    values = result["agreement"]
    names = list(values["model"]["by_position"])
    for column, shift in (("model", -0.2), ("window_only", 0.2)):
        kl = [values[column]["by_position"][name] for name in names]
        axis.bar([place + shift for place in range(len(names))], kl, 0.4, label=TITLES[column], color=COLOURS[column])
    axis.set(xlabel="position, tokens", ylabel=f"KL from {result['model']['base_column']['label']}, nats a token")
    axis.set_xticks(range(len(names)), names, fontsize=7)


def _needle_panel(result: dict, axis) -> None:
    values = result["recall"]
    distances = list(values["model"]["needle"])
    for column in ("base", "model", "window_only"):
        title = result["model"]["base_column"]["label"] if column == "base" else TITLES[column]
        shares = [100 * values[column]["needle"][distance]["exact"] for distance in distances]
        axis.plot(distances, shares, label=title, color=COLOURS[column], marker=MARKERS[column], markersize=4)
    axis.set(xlabel="distance, tokens", ylabel="needles found, %", ylim=(-4, 104))


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
