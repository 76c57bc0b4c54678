"""Which heads look back: the scores of every key/value head and what each got, as PNG and SVG beside the model."""

import math
from pathlib import Path

from liger_cli.system.figures import new_figure, save_figure

FRAME = "#d55e00"


def head_plots(report: dict, folder: Path) -> list[str]:
    """Two maps of layers by heads, from a report's `heads`; returns the files' names.

    Left the score with the window and sinks alone: what the head loses beyond them and what that costs. Right the
    kept tokens that it got. Heads that stay softmax are framed.
    """
    entries = report.get("heads")
    if not entries:
        return []
    layers, heads = sorted({one["layer"] for one in entries}), sorted({one["head"] for one in entries})
    by_place = {(one["layer"], one["head"]): one for one in entries}
    panels = [
        ("score beyond window and sinks, log 10", lambda one: math.log10(max(one["score"][0], 1e-12))),
        ("kept tokens", lambda one: math.nan if one.get("softmax") else one["kept"]),
    ]
    figure, axes = new_figure(2, 1, (max(6.0, 2.0 + 0.3 * len(layers)), 2.4 + 0.6 * len(heads)))
    for (axis,), (title, value) in zip(axes, panels, strict=True):
        image = axis.imshow(
            [
                [value(by_place[at]) if (at := (layer, head)) in by_place else math.nan for layer in layers]
                for head in heads
            ],
            cmap="viridis",
            aspect="auto",
        )
        axis.set(title=title, xlabel="layer (softmax: framed)", ylabel="key/value head")
        axis.set_xticks(range(len(layers)), map(str, layers), fontsize=7)
        axis.set_yticks(range(len(heads)), map(str, heads), fontsize=7)
        figure.colorbar(image, ax=axis)
        for x, layer in enumerate(layers):
            for y, head in enumerate(heads):
                if by_place.get((layer, head), {}).get("softmax"):
                    axis.add_patch(_frame(x, y))
    return save_figure(figure, folder, "heads")


def _frame(x: int, y: int):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=FRAME, linewidth=2)
