"""How much is read to measure layers, heads and sizes: rows of text, and recall probes beyond the window. No torch."""

from liger_cli.conversion.plan import Plan

ROWS, ROW_TOKENS = 8, 512  # of the text
PROBES = 24  # of each distance
PROBE_TOKENS = 80  # about what a probe has beside its distance: the facts before it and the question
DISTANCES = (2, 6)  # of the probes, in windows
RECALL_NEEDED = 0.5  # share of the probes that the base answers, below which they would say nothing
FIRST_PASSES = 3  # the base and both stand-ins


def expected_tokens(plan: Plan) -> int:
    """About how many tokens a pass reads; the text may be shorter, and the base unable to do the probes."""
    return ROWS * ROW_TOKENS + PROBES * sum(distance + PROBE_TOKENS for distance in probe_distances(plan))


def probe_distances(plan: Plan) -> list[int]:
    """Distances beyond the window, in tokens, that the base's positions have room for."""
    window = max(16, max(spec.window for spec in plan.specs if spec.kind == "liger"))
    limit = plan.checkpoint.config.get("max_position_embeddings") or 2 * ROW_TOKENS
    return [times * window for times in DISTANCES if times * window + 2 * PROBE_TOKENS <= limit]
