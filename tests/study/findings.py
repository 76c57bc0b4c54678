"""What the study's table says, in sentences that are made of it: prose about figures cannot contradict them."""

from study.rows import DOCUMENTS, WINDOW_ONLY, show_tokens

PUBLISHED = ("paper", "lolcats", "supra")
SIZES = (("window-auto", WINDOW_ONLY), ("kept-share64", "kept-alone64"), ("kept-auto64", "kept-alone64"))


def findings(rows: list[dict]) -> list[str]:
    """Sentences; each is left out where the rows that it needs are not there.

    Args:
        rows: of `report.summarize`.
    """
    rows = [row for row in rows if row["mixture"] == DOCUMENTS]
    places = {(row["row"], row["budget"], row["base"]): row for row in rows}
    bases = list(dict.fromkeys(row["base"] for row in rows))

    def kl(name: str, base: str, budget: int = 0) -> float | None:
        row = places.get((name, budget, base))
        return row and row["kl"]["mean"]

    def recall(name: str, base: str, budget: int = 0) -> float | None:
        row = places.get((name, budget, base))
        return row and row["recall_beyond"]["mean"]

    def change(name: str, reference: str, budget: int = 0, of: int = 0) -> str:
        """How much higher or lower the KL of a row is than that of another, base by base."""
        pairs = {base: (kl(name, base, budget), kl(reference, base, of)) for base in bases}
        return _listed({base: f"{100 * (a / b - 1):+.0f} %" for base, (a, b) in pairs.items() if a and b})

    said = []
    for name, what in (
        ("calibrated", "Calibrated, nothing trained"),
        ("kept-alone", "The same without any recurrence"),
        ("calibrated-kept0", "Calibrated without kept tokens"),
        ("calibrated-heads-auto1", "Calibrated, with one key/value head of all kept as softmax"),
    ):
        if closer := change(name, WINDOW_ONLY):
            shares = _listed(
                {
                    base: f"{100 * recall(name, base) / recall('base', base):.0f} %"
                    for base in bases
                    if recall(name, base) is not None and recall("base", base)
                }
            )
            said.append(
                f"{what} (`{name}`): the KL is {closer} of the window's; recall, as a share of the base's, {shares}."
            )
    if shared := change("calibrated", "calibrated-uniform"):
        said.append(f"Kept tokens shared out, against as many in every layer, at the same bytes: KL {shared}.")
    for name, reference in SIZES:
        if found := change(name, reference):
            said.append(f"At the same bytes `{name}` against `{reference}`: KL {found}.")
    budgets = sorted({row["budget"] for row in rows if row["budget"]})
    for budget in budgets:
        tokens = show_tokens(budget)
        for name in PUBLISHED:
            if against := change(name, "window-only-trained", budget, budget):
                most = max(recall(name, base, budget) or 0 for base in bases)
                said.append(
                    f"`{name}`, {tokens} tokens: KL against the window trained identically {against}; recall "
                    f"{100 * most:.0f} % at most."
                )
        if trained := change("best", "calibrated", budget):
            said.append(f"`best`, {tokens} tokens: KL against calibration alone {trained}.")
    ratios = [
        (kl(name, base, budget) / kl("best", base, budget), name, base, budget)
        for budget in budgets
        for base in bases
        for name in (*PUBLISHED, "window-only-trained", "window-only-best")
        if kl(name, base, budget) and kl("best", base, budget)
    ]
    if ratios:
        factor, name, base, budget = min(ratios)
        said.append(
            f"The nearest that another trained row comes to `best`: {factor:.1f} times its KL (`{name}`, {base}, "
            f"{show_tokens(budget)} tokens)."
        )
    return said


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{value} ({base})" for base, value in values.items())
