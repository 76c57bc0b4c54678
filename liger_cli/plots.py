"""Plots of results, as PNG and SVG, readable in a paper: matplotlib without a display."""

import io
from pathlib import Path

from liger_cli.columns import TITLES
from liger_cli.outputs import write_whole

COLOURS = {"model": "#0072b2", "base": "#d55e00"}  # of Okabe and Ito's palette, told apart by colour-blind eyes
KEPT, NOT_KEPT = "#009e73", "#999999"
LABELS = {"model": "Liger model", "base": "softmax base"}
MARKERS = {"model": "o", "base": "s"}


def bench_plot(result: dict, folder: Path) -> list[str]:
    """Decoding latency, prefill time and cache memory against length, both sides. Returns the files' names.

    A cross at the upper edge marks a length at which a run was stopped or not tried.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(1, 3, (10.5, 3.1))
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
    return _save(figure, folder, "bench")


def recall_plot(result: dict, folder: Path) -> list[str]:
    """Heat map of recall: kinds and methods by distance, one panel a column. Returns the files' names."""
    if "recall" not in result:
        return []
    from liger_cli.report import METHOD_TITLES, RECALL_TITLES

    values = result["recall"]
    lines = [(kind, method) for kind, methods in values["model"].items() for method, cells in methods.items() if cells]
    distances = sorted({distance for kind, method in lines for distance in values["model"][kind][method]}, key=int)
    columns = [name for name in TITLES if name in values]
    figure, axes = _figure(1, len(columns), (2.2 + 2.6 * len(columns), 0.9 + 0.32 * len(lines)), sharey=True)
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
    return _save(figure, folder, "recall")


def selection_plots(selection: dict, folder: Path) -> list[str]:
    """What `auto` measured: bars over layers, heat maps of layers by heads and sizes. Returns the files' names."""
    names = []
    if "softmax_layers" in selection:
        names += _layers_plot(selection["softmax_layers"], folder)
    if "softmax_heads" in selection:
        names += _heads_plot(selection["softmax_heads"], folder)
    for name in ("window_sizes", "kept_sizes"):
        if name in selection:
            names += _sizes_plot(selection[name], name, folder)
    return names


def _layers_plot(found: dict, folder: Path) -> list[str]:
    layers = found["layers"]
    places = range(len(layers))
    colours = [KEPT if layer["layer"] in found["chosen"] else NOT_KEPT for layer in layers]
    figure, axes = _figure(1, 2, (max(7.0, 3.0 + 0.4 * len(layers)), 2.8))
    panels = (
        ("only_kept", "score", "gap to the base closed, %", "it alone kept as softmax", 100),
        ("only_linearized", "kl_hard", "KL on hard tokens, nats", "it alone linearized", 1),
    )
    for axis, (which, name, label, title, unit) in zip(axes[0], panels, strict=True):
        axis.bar(places, [unit * layer[which][name] for layer in layers], color=colours)
        axis.set(title=title, xlabel="layer (kept: green)", ylabel=label)
        axis.set_xticks(places, [str(layer["layer"]) for layer in layers], fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    return _save(figure, folder, "softmax_layers")


def _heads_plot(found: dict, folder: Path) -> list[str]:
    layers = sorted({entry["layer"] for entry in found["heads"]})
    heads = sorted({entry["head"] for entry in found["heads"]})
    by_place = {(entry["layer"], entry["head"]): entry for entry in found["heads"]}
    figure, axes = _figure(1, 2, (max(7.0, 3.0 + 0.5 * len(layers)), 1.6 + 0.35 * len(heads)))
    panels = (
        ("reach beyond the window, %", lambda entry: 100 * entry["reach"]),
        ("gap closed, it alone kept, %", lambda entry: 100 * entry["only_kept"]["score"]),
    )
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        known = [
            [
                value(by_place[layer, head]) if by_place[layer, head]["only_kept"] or "reach" in title else float("nan")
                for layer in layers
            ]
            for head in heads
        ]
        image = axis.imshow(known, cmap="viridis", aspect="auto")
        axis.set(title=title, xlabel="layer (kept: framed)", ylabel="key/value head")
        axis.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        axis.set_yticks(range(len(heads)), [str(head) for head in heads], fontsize=7)
        figure.colorbar(image, ax=axis, shrink=0.9)
        for x, layer in enumerate(layers):
            for y, head in enumerate(heads):
                if f"{layer}:{head}" in found["chosen"]:
                    axis.add_patch(_frame(x, y))
    return _save(figure, folder, "softmax_heads")


def _sizes_plot(found: dict, name: str, folder: Path) -> list[str]:
    """Bars of what each layer got, and the cost of every measured size in one layer alone."""
    layers = found["layers"]
    places = range(len(layers))
    labels = [str(layer["layer"]) for layer in layers]
    sizes = sorted({one["tokens"] for layer in layers for one in layer["sizes"]})
    figure, axes = _figure(1, 2, (max(7.0, 3.0 + 0.5 * len(layers)), 2.8))
    bars, costs = axes[0]
    what = {"window": "window, tokens", "kept": "kept tokens"}[found["setting"]]
    bars.bar(places, [layer["tokens"] for layer in layers], color=KEPT)
    bars.axhline(found["uniform"], color=NOT_KEPT, linestyle="--")
    bars.set(title="chosen (dashed: uniform)", xlabel="layer", ylabel=what)
    bars.set_xticks(places, labels, fontsize=7)
    bars.grid(axis="y", alpha=0.3)
    measured = [{one["tokens"]: one["kl_hard"] for one in layer["sizes"]} for layer in layers]
    image = costs.imshow([[one.get(tokens, float("nan")) for one in measured] for tokens in sizes], aspect="auto")
    costs.set(title="KL on hard tokens, it alone so small", xlabel="layer", ylabel=what)
    costs.set_xticks(places, labels, fontsize=7)
    costs.set_yticks(range(len(sizes)), [str(tokens) for tokens in sizes], fontsize=7)
    figure.colorbar(image, ax=costs, shrink=0.9)
    return _save(figure, folder, name)


def _frame(x: int, y: int):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="#d55e00", linewidth=2.5)


def _figure(rows: int, columns: int, inches: tuple[float, float], **options):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "liger"  # the same figures give the same file
    figure = Figure(figsize=inches, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure, folder: Path, name: str) -> list[str]:
    names = []
    for suffix, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, **options)
        write_whole(folder / f"{name}.{suffix}", content.getvalue())
        names.append(f"{name}.{suffix}")
    return names


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
