"""What `auto:N` measured, as bars on the terminal. The plots in the folder: `selection_plots`."""

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from liger_cli.system.console import print_table

WIDTH = 24  # characters of a full bar
SIZES = {"window_sizes": "windows", "kept_sizes": "kept tokens"}


def print_selection(report: dict, console: Console) -> None:
    """Bars of every layer and of every measured head, and what the steps of the choice came to."""
    if "softmax_layers" in report:
        found = report["softmax_layers"]
        print_table(console, _layers(found))
        steps = [(f"auto, step {i + 1}: layer {step['layer']}", step) for i, step in enumerate(found["greedy"])]
        steps += [(f"{one['name']}: layers {', '.join(map(str, one['layers']))}", one) for one in found["spacings"]]
        print_table(console, _together(found, steps, "softmax layers"))
    if "softmax_heads" in report:
        found = report["softmax_heads"]
        print_table(console, _heads(found))
        steps = [(f"auto, + {', '.join(step['heads'])}", step) for step in found["greedy"]]
        print_table(console, _together(found, steps, "softmax heads"))
    for name in SIZES:
        if name in report:
            found = report[name]
            print_table(console, _sizes(found))
            first = max(found["tries"], key=lambda one: one["score"])
            steps = [("the costs added up", first)]
            steps += [(f"after exchange {place + 1}", step) for place, step in enumerate(found["rounds"])]
            none = f"{found['uniform']} in every layer"
            print_table(console, _together(found, steps, SIZES[name], none))


def _layers(found: dict) -> Table:
    table = Table(title="what each layer is worth", title_justify="left")
    for name in ("layer", "gap closed, it alone kept", "", "recall", "KL, it alone linearized", "", "recall", ""):
        table.add_column(name, justify="left" if "," in name else "right")
    most = max(layer["only_linearized"]["kl_hard"] for layer in found["layers"]) or 1.0
    for layer in found["layers"]:
        kept, lost = layer["only_kept"], layer["only_linearized"]
        table.add_row(
            str(layer["layer"]),
            _bar(kept["score"]),
            percent(kept["score"]),
            percent(kept["recall"]),
            _bar(lost["kl_hard"] / most),
            f"{lost['kl_hard']:.3f}",
            percent(lost["recall"]),
            "kept" if layer["layer"] in found["chosen"] else "",
        )
    return table


def _heads(found: dict) -> Table:
    """The shortlist, the farthest reach first."""
    table = Table(title="what each key/value head is worth", title_justify="left")
    for name in ("layer:head", "reach beyond the window", "", "gap closed, it alone kept", "", "recall", ""):
        table.add_column(name, justify="left" if " " in name else "right")
    measured = sorted((entry for entry in found["heads"] if entry["only_kept"]), key=lambda entry: -entry["reach"])
    most = measured[0]["reach"] or 1.0
    for entry in measured:
        name, kept = f"{entry['layer']}:{entry['head']}", entry["only_kept"]
        table.add_row(
            name,
            _bar(entry["reach"] / most),
            percent(entry["reach"]),
            _bar(kept["score"]),
            percent(kept["score"]),
            percent(kept["recall"]),
            "kept" if name in found["chosen"] else "",
        )
    return table


def _sizes(found: dict) -> Table:
    """What was chosen, and what the smallest measured size of each layer costs."""
    table = Table(title=f"{SIZES[found['setting'] + '_sizes']} by layer, in tokens", title_justify="left")
    smallest = found["layers"][0]["sizes"][0]["tokens"]
    for name in ("layer", "chosen", "", f"KL on hard tokens, it alone with {smallest}", "", "recall"):
        table.add_column(name, justify="left" if "c" in name else "right")
    largest = max(layer["tokens"] for layer in found["layers"]) or 1
    most = max(layer["sizes"][0]["kl_hard"] for layer in found["layers"]) or 1.0
    for layer in found["layers"]:
        tokens, lost = layer["tokens"], layer["sizes"][0]
        table.add_row(
            str(layer["layer"]),
            _bar(tokens / largest),
            str(tokens),
            _bar(lost["kl_hard"] / most),
            f"{lost['kl_hard']:.3f}",
            percent(lost["recall"]),
        )
    return table


def _together(found: dict, steps: list[tuple[str, dict]], what: str, none: str = "nothing chosen yet") -> Table:
    lines = [(none, found["references"]["none"]), *steps, ("base", found["references"]["base"])]
    table = Table(title=f"{what} together, untrained", title_justify="left")
    for name in ("", "KL", "KL, hard tokens", "recall", "gap closed"):
        table.add_column(name, justify="right" if name else "left")
    for name, figures in lines:
        closed = percent(figures["score"]) if "score" in figures else ""
        table.add_row(name, f"{figures['kl']:.4f}", f"{figures['kl_hard']:.3f}", percent(figures["recall"]), closed)
    return table


def _bar(share: float) -> Bar:
    return Bar(1.0, 0.0, min(max(share, 0.0), 1.0), width=WIDTH)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
