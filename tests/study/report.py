"""The study's table, as Markdown and as data, and its plot, from whatever results there are."""

import math
import statistics
from pathlib import Path

from liger_cli.evaluation.report import Table, number, percent
from liger_cli.system.outputs import write_whole
from study.base_folders import BASES
from study.rows import DOCUMENTS, WINDOW_ONLY, show_tokens
from study.runner import DONE, keep, results_of
from study.summary import VARIED, summary

LOWEST = -50  # percent: what is further behind the window than that stands at the lower edge of the plot
HIGHEST = 110  # percent, of the plot
# Two-sided 95 % points of Student's t with 1, 2 ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
HEADER = (
    "row", "tokens", "seeds", "perplexity", "KL, nats", "same top token", "gap closed, KL", "gap closed, hard tokens",
    "recall inside", "recall beyond", "parameters trained", "minutes", "state",
)  # fmt: skip


def write(home: Path) -> list[Path]:
    """Write each base's results, `table.md`, `summary.md` and, where anything was trained, the plot; return them."""
    results = load(home)
    rows = summarize(results)
    write_whole(home / "table.md", markdown(rows, results))
    write_whole(home / "summary.md", summary(rows))
    names = ("table.md", "summary.md", *plot(rows, home))
    return [*keep(home), *(home / name for name in names)]


def load(home: Path) -> list[dict]:
    """Every result that the folder holds, the frozen bases in their order."""
    known = [result for _, result in results_of(home).items() if "status" in result]
    order = list(BASES)
    return sorted(known, key=lambda result: order.index(result["base"]) if result["base"] in order else len(order))


def summarize(results: list[dict]) -> list[dict]:
    """A dictionary for each base, row, budget and mixture, each figure as `{mean, interval, values}`.

    `interval` is the half-width of the 95 % interval of the mean over seeds (Student's t), None for one seed. `gap_kl`
    is 1 - KL / KL of the control, `gap_hard` the same share of the loss on hard tokens that the control is above the
    base; the control is the row trained identically, with the same seed, whose recurrent branch is off.
    """
    done = [result for result in results if result["status"] == DONE]
    by_place = {(x["base"], x["row"], x["budget"], x["mixture"], x["seed"]): x for x in done}

    def control(of: dict) -> dict | None:
        seed = of["seed"] if of["budget"] else 0  # an untrained control measures nothing: it has one seed
        return by_place.get((of["base"], of["control"], of["budget"], of["mixture"], seed))

    groups: dict[tuple, list[dict]] = {}
    for result in done:
        groups.setdefault(tuple(result[name] for name in ("base", "row", "budget", "mixture")), []).append(result)
    rows = []
    for (base, name, budget, mixture), members in groups.items():
        controls = [control(x) for x in members]
        untrained = by_place.get((base, WINDOW_ONLY, 0, DOCUMENTS, 0))
        rows.append(
            {
                "base": base,
                "row": name,
                "group": members[0]["group"],
                "control": members[0]["control"],
                "budget": budget,
                "mixture": mixture,
                "seeds": len(members),
                "chosen": members[0].get("chosen"),
                "state_bytes": members[0]["state_bytes"],
                "commands": members[0]["commands"],
                "perplexity": spread([x["perplexity"] for x in members]),
                "kl": spread([x["kl"] for x in members]),
                "top1": spread([x["top1"] for x in members]),
                "gap_kl": spread([_gap_kl(x, y) for x, y in zip(members, controls, strict=True)]),
                "gap_hard": spread([_gap_hard(x, y) for x, y in zip(members, controls, strict=True)]),
                "recovery_kl": spread([_gap_kl(x, untrained) for x in members]),
                "recall_inside": spread([_recall(x, "inside") for x in members]),
                "recall_beyond": spread([_recall(x, "beyond") for x in members]),
                "parameters": _training(members, "parameters"),
                "tokens": _training(members, "tokens"),
                "minutes": _training(members, "minutes"),
                "held_out": _training(members, "held_out_perplexity"),
            }
        )
    return rows


def spread(values: list[float | None]) -> dict | None:
    """`{mean, interval, values}`; None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    interval = None
    if len(known) > 1:
        point = STUDENT[min(len(known) - 1, len(STUDENT)) - 1]
        interval = point * statistics.stdev(known) / math.sqrt(len(known))
    return {"mean": statistics.mean(known), "interval": interval, "values": known}


def _gap_kl(result: dict, control: dict | None) -> float | None:
    return None if control is None or not control["kl"] else 1 - result["kl"] / control["kl"]


def _gap_hard(result: dict, control: dict | None) -> float | None:
    hard = result["hard"]
    if control is None or hard["loss"] is None:
        return None
    gap = control["hard"]["loss"] - hard["base"]
    return (control["hard"]["loss"] - hard["loss"]) / gap if gap > 0 else None


def _recall(result: dict, where: str) -> float:
    return statistics.mean(result["recall"][where].values())


def _training(members: list[dict], name: str) -> dict | None:
    return spread([x["training"].get(name) if x["training"] else None for x in members])


def markdown(rows: list[dict], results: list[dict]) -> str:
    """A table for each base and kind of training data, then what could not be computed."""
    places = dict.fromkeys((row["base"], row["mixture"]) for row in rows)
    parts = ["# The study's table"]
    for base, mixture in places:
        title = f"base {base}" + ("" if mixture == DOCUMENTS else f", trained on {mixture}")
        table = Table(title, list(HEADER))
        chosen = [row for row in rows if (row["base"], row["mixture"]) == (base, mixture)]
        for row in sorted(chosen, key=_order):
            table.rows.append(_cells(row))
        parts.append(table.markdown())
    parts += [
        "Mean over seeds (of the training, and of the text that a conversion measures), ± half the 95 % interval where "
        "there are several. Gap closed: of the KL divergence from the base, and of the loss on the tokens where base "
        "and untrained window differ by more than 0.5 nat, against the row trained identically with its recurrent "
        "branch off. Recall: share of held-out probes answered exactly by generation, the answer stated inside the "
        "window or beyond it. State: cache of a sequence after 1,024 tokens.",
    ]
    failed = [result for result in results if result["status"] != DONE]
    if failed:
        parts.append("Not computed:")
        parts.append("\n".join(f"- {_label(result)} ({result['status']}): {result['sentence']}" for result in failed))
    return "\n\n".join(parts) + "\n"


def _label(result: dict) -> str:
    tokens = f", {show_tokens(result['budget'])} tokens, seed {result['seed']}" if result["budget"] else ""
    return f"{result['base']}, {result['row']}{tokens}"


def _order(row: dict) -> tuple:
    groups = ("control", "untrained", "softmax kept", "trained control", "trained", "gates", "variants")
    group = groups.index(row["group"]) if row["group"] in groups else len(groups)
    return row["budget"], group, row["kl"]["mean"]


def _cells(row: dict) -> list[str]:
    from liger_cli.system.wording import size

    parameters, minutes = row["parameters"], row["minutes"]
    return [
        row["row"],
        show_tokens(row["budget"]) if row["budget"] else "0",
        str(row["seeds"]),
        _shown(row["perplexity"], number),
        _shown(row["kl"], number),
        *(_shown(row[name], percent) for name in ("top1", "gap_kl", "gap_hard", "recall_inside", "recall_beyond")),
        "0" if parameters is None else f"{parameters['mean']:,.0f}",
        "0" if minutes is None else f"{minutes['mean']:.1f}",
        size(row["state_bytes"]),
    ]


def _shown(figure: dict | None, show) -> str:
    if figure is None:
        return "-"
    interval = "" if figure["interval"] is None else f" ± {show(figure['interval'])}"
    return f"{show(figure['mean'])}{interval}"


def plot(rows: list[dict], home: Path) -> list[str]:
    """Recovery and recall beyond the window against training tokens, a row of panels for each base; PNG and SVG."""
    from liger_cli.system.figures import new_figure, save_figure

    # Groups of single changes have one budget.
    trained = [row for row in rows if row["budget"] and row["mixture"] == DOCUMENTS and row["group"] not in VARIED]
    bases = list(dict.fromkeys(row["base"] for row in trained))
    if not bases:
        return []
    names = list(dict.fromkeys(row["row"] for row in sorted(trained, key=lambda row: row["row"])))
    figure, axes = new_figure(len(bases), 2, (9.5, 0.9 + 2.9 * len(bases)))
    panels = (
        ("recovery_kl", "KL to the base, share of the\nuntrained window's closed, %"),
        ("recall_beyond", "recall beyond the window, %"),
    )
    for line, base in zip(axes, bases, strict=True):
        for axis, (figure_name, label) in zip(line, panels, strict=True):
            for index, name in enumerate(names):
                points = [x for x in trained if (x["base"], x["row"]) == (base, name) and x[figure_name] is not None]
                points.sort(key=lambda row: row["budget"])
                if points:
                    axis.errorbar(
                        [point["budget"] for point in points],
                        *zip(*(_shown_point(point[figure_name]) for point in points), strict=True),
                        **_style(index, name),
                    )
            kept = [x for x in rows if x["base"] == base and not x["budget"] and x["row"] in ("base", WINDOW_ONLY)]
            for row in kept:
                if row[figure_name] is not None:
                    style = ":" if row["row"] == WINDOW_ONLY else "--"
                    axis.axhline(100 * row[figure_name]["mean"], color="black", linewidth=0.8, linestyle=style)
            axis.set(xlabel="training tokens", ylabel=label, title=base, xscale="log")
            bottom, top = axis.get_ylim()
            axis.set_ylim(max(bottom, LOWEST - 5), min(top, HIGHEST))
            ticks = sorted({row["budget"] for row in trained if row["base"] == base})
            axis.set_xticks(ticks, [show_tokens(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    handles, labels = _all_labels(axes)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel(f"dashed: the base; dotted: the window alone, untrained; at {LOWEST} %: that or less", fontsize=8)
    return save_figure(figure, home, "recovery")


def _shown_point(figure: dict) -> tuple[float, float]:
    """A point and half its interval, in percent; none where the point itself is out of sight."""
    place = 100 * figure["mean"]
    return (LOWEST, 0.0) if place < LOWEST else (place, 100 * (figure["interval"] or 0))


def _style(index: int, name: str) -> dict:
    """Eight colours that colour-blind eyes tell apart (Okabe and Ito), then markers; controls are drawn thin."""
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
    control = name.startswith(WINDOW_ONLY)
    return {
        "color": colours[index % len(colours)],
        "marker": "osD^vP*X"[(index // len(colours) + index) % 8],
        "markersize": 4,
        "capsize": 2,
        "linewidth": 1.0 if control else 1.6,
        "linestyle": "--" if control else "-",
        "label": name,
    }


def _all_labels(axes) -> tuple[list, list]:
    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
