"""What `auto:N` measured, as bars on the terminal. The plots in the folder: `plots.layers_plot`."""

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

WIDTH = 24  # characters of a full bar


def print_selection(report: dict, console: Console) -> None:
    """Bars of every layer: what is lost without it and what is won back by it alone; then the steps and spacings."""
    table = Table(title="what each layer is worth", title_justify="left")
    for name in ("layer", "gap closed, it alone kept", "", "recall", "KL, it alone linearized", "", "recall", ""):
        table.add_column(name, justify="left" if "," in name else "right")
    most = max(layer["only_linearized"]["kl_hard"] for layer in report["layers"]) or 1.0
    for layer in report["layers"]:
        kept, lost = layer["only_kept"], layer["only_linearized"]
        table.add_row(
            str(layer["layer"]),
            Bar(1.0, 0.0, min(max(kept["score"], 0.0), 1.0), width=WIDTH),
            percent(kept["score"]),
            percent(kept["recall"]),
            Bar(most, 0.0, lost["kl_hard"], width=WIDTH),
            f"{lost['kl_hard']:.3f}",
            percent(lost["recall"]),
            "kept" if layer["layer"] in report["chosen"] else "",
        )
    console.print(table)
    lines = [("none kept", report["references"]["none"])]
    lines += [(f"auto, step {i + 1}: layer {step['layer']}", step) for i, step in enumerate(report["greedy"])]
    lines += [(f"{one['name']}: layers {', '.join(map(str, one['layers']))}", one) for one in report["spacings"]]
    lines.append(("base", report["references"]["base"]))
    steps = Table(title="together, untrained", title_justify="left")
    for name in ("softmax kept", "KL", "KL, hard tokens", "recall", "gap closed"):
        steps.add_column(name, justify="left" if name == "softmax kept" else "right")
    for name, figures in lines:
        closed = percent(figures["score"]) if "score" in figures else ""
        steps.add_row(name, f"{figures['kl']:.4f}", f"{figures['kl_hard']:.3f}", percent(figures["recall"]), closed)
    console.print(steps)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
