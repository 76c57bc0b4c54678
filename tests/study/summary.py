"""The study's summary, which the guide shows: a column for each base, what it says, and what single changes do."""

from liger_cli.evaluation.report import Table
from study.findings import findings
from study.rows import DOCUMENTS, EQUAL, RATED, WINDOW_ONLY, show_tokens

ROWS = (
    "base", WINDOW_ONLY, "window-only-192", "gla", "gla-running", "calibrated-kept0", "calibrated-uniform",
    "calibrated", "kept-alone", "heads-auto1", "layers-auto1", "calibrated-heads-auto1", "window-only-trained", "paper",
    "lolcats", "supra", *(f"{name}, best rate" for name in RATED), *(f"window-only-as-{name}" for name in EQUAL),
    *(f"window-only-as-{name}-trained" for name in EQUAL), "window-only-best", "best",
)  # fmt: skip
# For each group of single runs the row that they vary.
VARIED = {"variants": "best", "gates": "paper"}


def summary(rows: list[dict]) -> str:
    """The rows that tell most, a column for each base; then what one change at a time does, on one seed."""
    rows = [row for row in rows if row["mixture"] == DOCUMENTS]
    bases = list(dict.fromkeys(row["base"] for row in rows))
    places = {(row["row"], row["budget"], row["base"]): row for row in (*rows, *best_rates(rows))}
    table = Table("KL to the base; recall beyond the window; state", ["row", "tokens", *bases, "state"])
    budgets = sorted({row["budget"] for row in rows})
    for name, budget in ((name, budget) for name in ROWS for budget in budgets):
        cells = [places.get((name, budget, base)) for base in bases]
        if any(cells):
            tokens = show_tokens(budget) if budget else "0"
            states = dict.fromkeys(f"{cell['state_bytes'] / 1024:.0f}" for cell in cells if cell)
            shown = ("-" if cell is None else f"{_nats(cell['kl'])}; {_share(cell['recall_beyond'])}" for cell in cells)
            table.rows.append([name, tokens, *shown, f"{' / '.join(states)} KiB"])
    varied = [pair for pair in VARIED.items() if any(row["group"] == pair[0] for row in rows)]
    said = "\n".join(f"- {sentence}" for sentence in findings(rows))
    parts = [table.markdown(), *([said] if said else []), *(_varied(rows, *pair) for pair in varied)]
    return "\n\n".join(parts) + "\n"


def best_rates(rows: list[dict]) -> list[dict]:
    """Of every published method the best of its row and of those at other learning rates, by the held-out perplexity of
    training, on each base with each budget; none where no other rate was tried."""
    found = []
    for name in RATED:
        tried = [row for row in rows if row["row"] == name or row["row"].startswith(f"{name}-lr")]
        for place in dict.fromkeys((row["base"], row["budget"]) for row in tried if row["group"] == "rates"):
            here = [row for row in tried if (row["base"], row["budget"]) == place and row["held_out"]]
            best = min(here, key=lambda row: row["held_out"]["values"][0])
            found.append({**best, "row": f"{name}, best rate"})
    return found


def _varied(rows: list[dict], group: str, reference: str) -> str:
    """A table of the group's rows and of the row that they vary, by the KL divergence of the first seed."""
    members = [row for row in rows if row["group"] == group]
    budgets = {row["budget"] for row in members}
    bases = list(dict.fromkeys(row["base"] for row in members))
    beside = [row for row in rows if row["row"] == reference and row["budget"] in budgets and row["base"] in bases]
    table = Table(f"{reference} and one change at a time, seed 0: KL to the base", ["row", *bases])
    for name in dict.fromkeys(row["row"] for row in (*beside, *members)):
        found = {row["base"]: row["kl"]["values"][0] for row in (*beside, *members) if row["row"] == name}
        table.rows.append([name, *(_few(found[base]) if base in found else "-" for base in bases)])
    return table.markdown()


def _nats(figure: dict) -> str:
    interval = "" if figure["interval"] is None else f" ± {_few(figure['interval'], figure['mean'])}"
    return f"{_few(figure['mean'])}{interval}"


def _few(nats: float, size: float | None = None) -> str:
    """Nats in as many decimals as a figure of that size needs."""
    return f"{nats:.4f}" if abs(nats if size is None else size) < 0.1 else f"{nats:.3f}"


def _share(figure: dict) -> str:
    """Percent, with an interval that is not nothing."""
    interval = 0 if figure["interval"] is None else 100 * figure["interval"]
    return f"{100 * figure['mean']:.0f}{f' ± {interval:.0f}' if interval >= 0.5 else ''} %"
