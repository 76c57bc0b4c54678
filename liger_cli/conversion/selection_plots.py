"""Plots of what `auto` measured, as PNG and SVG beside the model."""

from pathlib import Path

from liger_cli.system.figures import new_figure, save_figure

KEPT, NOT_KEPT = "#009e73", "#999999"


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
    figure, axes = new_figure(1, 2, (max(7.0, 3.0 + 0.4 * len(layers)), 2.8))
    panels = (
        ("only_kept", "score", "gap to the base closed, %", "it alone kept as softmax", 100),
        ("only_linearized", "kl_hard", "KL on hard tokens, nats", "it alone linearized", 1),
    )
    for axis, (which, name, label, title, unit) in zip(axes[0], panels, strict=True):
        axis.bar(places, [unit * layer[which][name] for layer in layers], color=colours)
        axis.set(title=title, xlabel="layer (kept: green)", ylabel=label)
        axis.set_xticks(places, [str(layer["layer"]) for layer in layers], fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    return save_figure(figure, folder, "softmax_layers")


def _heads_plot(found: dict, folder: Path) -> list[str]:
    layers = sorted({entry["layer"] for entry in found["heads"]})
    heads = sorted({entry["head"] for entry in found["heads"]})
    by_place = {(entry["layer"], entry["head"]): entry for entry in found["heads"]}
    figure, axes = new_figure(1, 2, (max(7.0, 3.0 + 0.5 * len(layers)), 1.6 + 0.35 * len(heads)))
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
    return save_figure(figure, folder, "softmax_heads")


def _sizes_plot(found: dict, name: str, folder: Path) -> list[str]:
    """Bars of what each layer got, and the cost of every measured size in one layer alone."""
    layers = found["layers"]
    places = range(len(layers))
    labels = [str(layer["layer"]) for layer in layers]
    sizes = sorted({one["tokens"] for layer in layers for one in layer["sizes"]})
    figure, axes = new_figure(1, 2, (max(7.0, 3.0 + 0.5 * len(layers)), 2.8))
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
    return save_figure(figure, folder, name)


def _frame(x: int, y: int):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="#d55e00", linewidth=2.5)
