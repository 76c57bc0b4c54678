"""`liger convert --calibrate`: what a linearized layer lacks of the softmax layer, fitted in closed form on some text.

The base runs as it is; each layer is fitted on the hidden states that the base gives it, so no layer waits for another:

1. One pass over the rows to fit on: which tokens each key/value head keeps (`fits.fit_keep_score`), and what the
   state of the evicted ones stands for, for every number of kept tokens (`fits.StateFit`).
2. One pass forward and backward over other rows: what every head lacks with every number of kept tokens, with and
   without a state, and what that costs (`costs`). Exact memory goes where it is worth most (`allotment`).
3. A third text, of another kind and in longer rows, says what came of it; nothing is chosen by it.

No weight of the base changes.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from liger_cli.calibration.allotment import Head, Option, allot, evened
from liger_cli.calibration.base import extra_values, load_base, not_finite
from liger_cli.calibration.branches import fit_branches
from liger_cli.calibration.costs import HeadCosts
from liger_cli.calibration.fits import StateFit, fit_keep_score
from liger_cli.calibration.layerwise import visit, visit_backward
from liger_cli.calibration.memories import draw_queries, parts_of, ranks, sizes_below
from liger_cli.calibration.sizes import FIT_ROWS, QUERIES, SEQ_LEN
from liger_cli.calibration.text import OWN_TEXT, Text, check_data, data_name
from liger_cli.checkpoint.extras import extra_shapes
from liger_cli.checkpoint.reader import context_length
from liger_cli.checkpoint.tokenizer import check_ids
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import constant_bytes, far_layers, liger_layers, with_heads, with_softmax
from liger_cli.conversion.requests import LEAST_SEQ_LEN, OWN, Budget, Request
from liger_cli.evaluation.position import modes, score_positions
from liger_cli.evaluation.scoring import make_rows, read_texts
from liger_cli.evaluation.subject import padding_tokenizer
from liger_cli.shipped import prose
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.wording import duration, size
from liger_cli.templates.liger_kept import keep_scores

CHOICE_ROWS, HELD_OUT_ROWS = 2, 2
LEAST_ROWS = 3  # shorter ones where the text has too few tokens for so many
LONGER = 1.5  # held-out rows, than the others
SCORE_QUERIES, FIT_QUERIES, CHOICE_QUERIES = QUERIES, 128, QUERIES  # of a row that stand for all
FITTED_ON, HELD_OUT = "shipped prose (Moby-Dick)", "shipped prose (Opticks)"
PASSES = 9  # of a row's length through the base, about, that a calibration takes for each row


@dataclass
class Rows:
    """Token ids: to fit on, to choose by, and to judge by; the last with one token more, [N, T] and [N, T + 1]."""

    fit: torch.Tensor
    choice: torch.Tensor
    held_out: torch.Tensor
    text: str


def wanted_tokens() -> int:
    """Tokens that a calibration fits on and chooses by, where the text has as many."""
    return (FIT_ROWS + CHOICE_ROWS) * SEQ_LEN


def calibrate(
    plan: Plan,
    data: str | Text | None = None,
    request: Request | None = None,
    fit: bool = True,
    seq_len: int | None = None,
) -> tuple[Plan, dict, dict]:
    """Fit the extra tensors of a plan, and choose where exact memory stays.

    Args:
        plan: its Liger layers have `kept` tokens, a state of evicted tokens (`rest`), or `branch_scales`.
        data: a text or .jsonl file, token ids, or `self` for text that the base writes; shipped prose by default.
        request: what is to be chosen; heads that it names are softmax in the plan already.
        fit: with False layers and heads are chosen beside the windows alone, and nothing is fitted.
        seq_len: tokens of a row, at most the base's context; `SEQ_LEN` by default.
    Returns:
        The plan with what was chosen; the values of its extra tensors, NumPy arrays by name; and what was measured.
    Raises:
        UsageError: nothing to fit, or more to choose than there is. ModelError: the base cannot be loaded. LigerError:
        too little text, or numbers that are not finite.
    """
    request = request or Request()
    if fit and not any(spec.branch_scales or spec.kept or spec.rest for spec in plan.specs):
        raise UsageError("--calibrate has nothing to fit; add --kept or --branch-scales")
    check_data(data)
    start = time.perf_counter()
    check_request(plan, request)
    # A layer that keeps no token yet may get some.
    opened = replace(plan, specs=tuple(_open(spec, request) for spec in plan.specs)) if fit else plan
    model = load_base(opened)
    rows = text_rows(plan, model, data, seq_len or SEQ_LEN)
    tokens = rows.fit.numel() * fit + rows.choice.numel()
    say(_announcement(model, rows, tokens))
    attentions = [one for one in model.get_decoder().liger_attentions() if one.liger_spec.kind == "liger"]
    far = [one for one in attentions if one.local_window is None and one.liger_window > 0]
    sizes = [0]
    if far and fit:
        length, window = rows.fit.shape[1], min(one.liger_window for one in far)
        own = {_kept_of(plan, head) for head in _free_heads(plan)}
        sizes = sorted({*sizes_below(length, window), *(kept for kept in own if kept < length - window)})
    report = {"text": rows.text, "tokens": tokens, "seq_len": rows.fit.shape[1]}
    states = fit_layers(model, far, rows.fit, sizes) if fit else {}
    if request.chooses or request.kept is not None or any(one.liger_spec.rest for one in far):
        costs = head_costs(model, far, rows.choice, sizes, states, "the calibration" if fit else "the measurement")
        found = choose(plan, costs, request, fit)
        plan = chosen_plan(plan, found, request)
        report |= {"sizes": sizes, "heads": _described(costs, found)}
        _apply(model, plan, costs, found, states)
    if not fit:
        report["seconds"] = time.perf_counter() - start
        return plan, {}, report
    fit_branches(model, rows.fit, rows.choice)
    report |= judge(model, plan, rows)
    report["seconds"] = time.perf_counter() - start
    wanted = extra_shapes(plan.specs, plan.checkpoint.geometry)
    return plan, {name: value for name, value in extra_values(model).items() if name in wanted}, report


def check_request(plan: Plan, request: Request) -> None:
    """Raises UsageError where more is to be chosen than there is."""
    far = far_layers(plan)
    others = len(liger_layers(plan)) > len(far)
    if request.chooses and not far:
        raise UsageError(
            "auto: and --budget choose among layers that have a window and whose base looks beyond one, and of the "
            "linearized layers none has both"
        )
    if request.layers is not None and request.layers >= len(far) + others:
        raise UsageError(
            f"--softmax-layers auto:{request.layers} leaves no layer to linearize; there are {len(far)} to choose from"
        )
    heads, free = softmax_heads(plan, request), len(_free_heads(plan))
    if heads and heads >= free + others:
        raise UsageError(f"--softmax-heads asks for {heads} heads, but there are {free} to choose from; ask for fewer")
    if request.budget and request.budget.nbytes < (least := _least_bytes(plan, request.budget.tokens)):
        raise _too_little(request.budget, least)
    if request.budget and request.budget.nbytes >= plan.base_bytes(request.budget.tokens):
        raise _too_much(plan, request.budget)


def softmax_heads(plan: Plan, request: Request) -> int:
    """How many key/value heads are to be chosen."""
    sizes = plan.checkpoint.geometry
    if request.share is not None:
        return max(1, round(request.share * sizes.num_hidden_layers * sizes.num_key_value_heads))
    return request.heads or 0


def text_rows(plan: Plan, model, data: str | Text | None, seq_len: int) -> Rows:
    """The rows of a calibration; fewer, or shorter ones, where the text or the base's context is short.

    Raises:
        LigerError: too little text.
    """
    tokenizer = padding_tokenizer(plan.checkpoint.folder, model.config)
    context = context_length(plan.checkpoint.config) or seq_len
    length, count = min(seq_len, context), FIT_ROWS + CHOICE_ROWS
    fitted_on, judged_on = prose()
    tokenized = lambda name, texts: Text(name, make_rows(tokenizer, texts, length, 1).stream)  # noqa: E731
    if data == OWN:
        from liger_cli.calibration.own_text import own_text

        model.set_attention_mode("softmax")
        try:
            text = Text(OWN_TEXT, own_text(model, tokenizer, count, length).cpu().flatten())
        except FloatingPointError as error:
            raise not_finite(model, error.args[0], "writing a text to calibrate on") from None
        model.set_attention_mode("liger")
    elif isinstance(data, Text):
        text = data
    else:
        texts, name = ([fitted_on], FITTED_ON) if data is None else (read_texts(Path(data)), data_name(data))
        text = tokenized(name, texts)
    if text.beside_prose:
        text = _in_turn(text, tokenized(FITTED_ON, [fitted_on]).rows(length), count)
    if len(text.ids) < LEAST_ROWS * length:
        length = len(text.ids) // LEAST_ROWS
        if length < LEAST_SEQ_LEN:
            raise LigerError(
                f"{text.name} has {len(text.ids):,} tokens, and a calibration needs {LEAST_ROWS * LEAST_SEQ_LEN:,}"
            )
    whole = _spread(text.rows(length), count).to(model.device)
    choice = max(1, len(whole) * CHOICE_ROWS // count)
    check_ids(int(whole.max()), plan.checkpoint.geometry.vocab_size, plan.checkpoint.folder)
    held_out = make_rows(tokenizer, [judged_on], min(int(LONGER * length), context), HELD_OUT_ROWS + 1)
    longer = int(held_out.lengths.max())  # the whole text, where it is shorter than a row
    held_out = held_out.ids[held_out.lengths == longer][:HELD_OUT_ROWS, : longer + 1]
    return Rows(whole[:-choice], whole[-choice:], held_out, text.name)


def _in_turn(text: Text, prose_rows: torch.Tensor, count: int) -> Text:
    """Rows of a text and of shipped prose in turn, as many of either; more of prose where the text has too few."""
    own = _spread(text.rows(prose_rows.shape[1]), count // 2)
    prose_rows = _spread(prose_rows, count - len(own))
    more = len(prose_rows) - len(own)
    pairs = [row for pair in zip(own, prose_rows[more:], strict=True) for row in pair]
    return Text(f"{text.name} and {FITTED_ON}", torch.cat([*prose_rows[:more], *pairs]))


def _spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """As many rows, or all, from all over them."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


@torch.no_grad()
def fit_layers(model, attentions: list, rows: torch.Tensor, sizes: list[int]) -> dict[Head, tuple]:
    """Set the scores of these layers, and fit the states of all their heads.

    Returns:
        For each head of a layer with `rest` the weights of its state for every size, see `StateFit.solve`.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    length = rows.shape[1]

    def measure(layer) -> None:
        attention = layer.attention
        sinks, window = attention.liger_spec.sinks, attention.liger_window
        queries = draw_queries(length, 0, SCORE_QUERIES, generator).to(layer.k.device)
        attention.keep_score.copy_(fit_keep_score(layer, queries, sinks))
        if not attention.liger_spec.rest:
            return
        fits = [StateFit() for _ in range(layer.k.shape[1])]
        queries = draw_queries(length, window + sinks, FIT_QUERIES, generator).to(layer.k.device)
        scores = keep_scores(layer.k, attention.keep_score).squeeze(-1)
        for row in range(len(rows)):
            rank = ranks(scores[row], queries, window, sinks)
            for head, one in enumerate(fits):
                one.add(parts_of(layer, row, head, queries, rank[head], sizes))
        found.update({(attention.layer_idx, head): one.solve() for head, one in enumerate(fits)})

    scored = [attention for attention in attentions if hasattr(attention, "keep_score")]
    visit(model, scored, rows, measure, "fitting")
    return found


def head_costs(
    model, attentions: list, rows: torch.Tensor, sizes: list[int], states: dict, what: str
) -> dict[Head, HeadCosts]:
    """What every head of these layers lacks with every number of kept tokens; the scores are those of the model.

    Args:
        what: is measured, for an error.
    Raises:
        LigerError: numbers that are not finite.
    """
    generator, found = torch.Generator().manual_seed(1), {}

    def measure(layer) -> None:
        attention = layer.attention
        sinks, window = attention.liger_spec.sinks, attention.liger_window
        queries = draw_queries(rows.shape[1], window + sinks, CHOICE_QUERIES, generator).to(layer.k.device)
        if hasattr(attention, "keep_score"):
            scores = keep_scores(layer.k, attention.keep_score).squeeze(-1)
        else:
            scores = torch.zeros(layer.k.shape[:3], device=layer.k.device)
        rank = ranks(scores[0], queries, window, sinks)
        for head in range(layer.k.shape[1]):
            key = (attention.layer_idx, head)
            one = found.setdefault(key, HeadCosts.zeros(*key, sizes))
            one.add(layer, 0, queries, parts_of(layer, 0, head, queries, rank[head], sizes), states.get(key))

    visit_backward(model, attentions, rows, measure, "choosing", what=what)
    return dict(sorted(found.items()))


def choose(plan: Plan, costs: dict[Head, HeadCosts], request: Request, fit: bool) -> dict[Head, Option]:
    """What each head gets; heads that the plan keeps as softmax already are left out."""
    free = [head for head in _free_heads(plan) if head in costs]
    tokens = request.budget.tokens if request.budget else 0
    price = partial(_bytes, plan, tokens=tokens) if request.budget else lambda head, kept, rest: kept or 0
    options = {}
    for head in free:
        one, own = costs[head], _kept_of(plan, head)
        score, several = one.score(), []
        for place, kept in enumerate(one.sizes):
            if fit and request.kept is None and request.budget is None and kept != own:
                continue
            for rest in (False, True):
                cost = float(score[place, int(rest)])
                if math.isfinite(cost):
                    several.append(Option(kept, rest, price(head, kept, rest), cost))
        if not several:  # more kept tokens than the rows can tell apart
            several = [Option(own, False, 0, 0.0)]
        several.append(Option(None, False, price(head, None, False), 0.0))
        options[head] = several
    if not options:
        return {}
    if request.budget:
        others, excess = _other_bytes(plan, options, tokens), 0.0
        while True:
            try:
                found = evened(allot(options, request.budget.nbytes - others - excess, None), options)
            except ValueError:
                least = others + excess + sum(min(one.price for one in several) for several in options.values())
                raise _too_little(request.budget, least) from None
            if far_layers(plan) == liger_layers(plan) and all(one.kept is None for one in found.values()):
                raise _too_much(plan, request.budget)
            # A head that keeps nothing takes a little more beside one of its layer that does.
            over = chosen_plan(plan, found, request).cache_bytes(tokens) - request.budget.nbytes
            if over <= 0:
                return found
            excess += over
    count = softmax_heads(plan, request)
    mean = request.kept if request.kept is not None else math.inf
    if request.layers:
        alone = allot(options, mean * len(options) if math.isfinite(mean) else math.inf, 0)
        worth = dict.fromkeys(far_layers(plan), 0.0)
        for (layer, _), one in alone.items():
            worth[layer] += one.cost
        layers = sorted(worth, key=worth.get, reverse=True)[: request.layers]
        kept = {head: several[-1] for head, several in options.items() if head[0] in layers}
        options = {head: several for head, several in options.items() if head[0] not in layers}
        return evened(allot(options, mean * len(options), 0), options) | kept
    return evened(allot(options, mean * (len(options) - count), count), options)


def chosen_plan(plan: Plan, found: dict[Head, Option], request: Request) -> Plan:
    """The plan with what was chosen."""
    count = plan.checkpoint.geometry.num_key_value_heads
    specs = list(plan.specs)
    for layer in sorted({layer for layer, _ in found}):
        spec = specs[layer]
        own = [found.get((layer, head)) for head in range(count)]
        kept = [one.kept or 0 if one else 0 for one in own]
        rest = [bool(one and one.rest) for one in own]
        same = len({(one.kept, one.rest) for one in own if one and one.kept is not None}) < 2
        if same and any(one and one.kept is not None for one in own):
            some = next(one for one in own if one and one.kept is not None)
            kept, rest = some.kept, some.rest
        specs[layer] = replace(spec, kept=_settled(kept), rest=_settled(rest))
    plan = replace(plan, specs=tuple(specs))
    if request.layers:
        layers = sorted({layer for (layer, _), one in found.items() if one.kept is None})
        return with_softmax(plan, layers)
    return with_heads(plan, sorted(head for head, one in found.items() if one.kept is None))


def _settled(values):
    """One value where all heads have the same, else a tuple."""
    if not isinstance(values, list):
        return values
    return values[0] if len(set(values)) == 1 else tuple(values)


def _apply(model, plan: Plan, costs, found: dict[Head, Option], states: dict) -> None:
    """Give the live model the plan's layers, and the states' weights for the sizes that were chosen."""
    for attention in model.get_decoder().liger_attentions():
        attention.liger_spec = plan.specs[attention.layer_idx]
    with torch.no_grad():
        for (layer, head), one in found.items():
            if not one.rest:
                continue
            attention = model.get_decoder().liger_attentions()[layer]
            mass, slope = (weights[costs[layer, head].sizes.index(one.kept)] for weights in states[layer, head])
            own = slice(head * len(slope), (head + 1) * len(slope))
            attention.rest_mass[own], attention.rest_slope[own] = mass, slope


@torch.no_grad()
def judge(model, plan: Plan, rows: Rows) -> dict:
    """KL(base || model) by position, on text that nothing was fitted on or chosen by, beside two controls.

    Returns:
        `held_out` (its name), `held_out_tokens`, `held_out_seq_len`, `kl`, `window_only_kl` and `same_bytes_kl` in nats
        a token, `same_bytes_window` in tokens, and `kl_by_position` (column -> positions -> nats).
    Raises:
        LigerError: numbers that are not finite.
    """
    window = same_bytes_window(plan)
    columns = dict(modes(model))
    columns["same_bytes"] = lambda: _Wider(model, window)
    found = score_positions(columns, rows.held_out.to(model.device))
    model.set_attention_mode("liger")
    kl = {name: found[name].mean("kl") for name in ("model", "window_only", "same_bytes")}
    if not all(map(math.isfinite, kl.values())):
        raise not_finite(model, rows.held_out[:, :-1], "the calibration")
    return {
        "held_out": HELD_OUT,
        "held_out_tokens": rows.held_out[:, 1:].numel(),
        "held_out_seq_len": rows.held_out.shape[1] - 1,
        "kl": kl["model"],
        "window_only_kl": kl["window_only"],
        "same_bytes_kl": kl["same_bytes"],
        "same_bytes_window": window,
        "kl_by_position": {name: found[name].by_bucket("kl") for name in kl},
    }


class _Wider:
    """Within, the model is its windows and sinks alone, the windows as wide as told."""

    def __init__(self, model, window: int):
        self.model, self.window = model, window

    def __enter__(self):
        self.before = {one: one.liger_spec for one in self.model.get_decoder().liger_attentions()}
        for attention, spec in self.before.items():
            if spec.kind == "liger":
                attention.liger_spec = replace(spec, window=max(self.window, spec.window))
        self.model.set_attention_mode("window")
        return self.model

    def __exit__(self, *_error):
        for attention, spec in self.before.items():
            attention.liger_spec = spec
        self.model.set_attention_mode("liger")


def same_bytes_window(plan: Plan) -> int:
    """The window that takes the bytes of the plan's windows, kept tokens and states, in tokens, for every layer."""
    wanted = constant_bytes(plan)

    def taken(window: int) -> int:
        specs = tuple(_bare(spec, window) if spec.kind == "liger" else spec for spec in plan.specs)
        return constant_bytes(replace(plan, specs=specs))

    least, most = 1, 1 << 20
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if taken(middle) <= wanted else (least, middle - 1)
    return least


def _bare(spec, window: int):
    """The layer as its window and sinks alone."""
    return replace(spec, window=window, kept=0, rest=False, mix=0.0, normalizer="none", branch_scales=False)


def _open(spec, request: Request):
    """A layer as it is loaded: with scores, where it may come to keep tokens."""
    if spec.kind != "liger" or spec.window == 0:
        return spec
    if request.kept is not None or request.budget is not None or (spec.rest and not spec.kept):
        return replace(spec, kept=max(1, spec.kept if isinstance(spec.kept, int) else max(spec.kept)))
    return spec


def _free_heads(plan: Plan) -> list[Head]:
    """Those of which some may be chosen to stay softmax."""
    count = plan.checkpoint.geometry.num_key_value_heads
    return [
        (layer, head)
        for layer in far_layers(plan)
        for head in range(count)
        if head not in plan.specs[layer].softmax_kv_heads
    ]


def _kept_of(plan: Plan, head: Head) -> int:
    kept = plan.specs[head[0]].kept
    return kept[head[1]] if isinstance(kept, tuple) else kept


def _bytes(plan: Plan, head: Head, kept: int | None, rest: bool, tokens: int) -> float:
    """Of one head's cache after `tokens` tokens, `kept` None where it stays softmax."""
    layer, count = head[0], plan.checkpoint.geometry.num_key_value_heads
    if kept is None:
        return plan.base_cache(layer, tokens) / count
    spec = replace(plan.specs[layer], softmax_kv_heads=(), kept=kept, rest=rest)
    return plan.constant_bytes(layer, spec) / count


def _too_little(budget: Budget, least: float) -> UsageError:
    return UsageError(
        f"--budget {size(budget.nbytes)} is below the least that this model's cache takes after {budget.tokens:,} "
        f"tokens, {size(least)}"
    )


def _too_much(plan: Plan, budget: Budget) -> UsageError:
    return UsageError(
        f"--budget {size(budget.nbytes)} after {budget.tokens:,} tokens leaves every head softmax, since the base's "
        f"whole cache takes {size(plan.base_bytes(budget.tokens))} then; name fewer bytes, or a longer text"
    )


def _other_bytes(plan: Plan, heads: Iterable[Head], tokens: int) -> float:
    """Of the cache beside these heads."""
    own = (_bytes(plan, head, _kept_of(plan, head), bool(plan.specs[head[0]].rest), tokens) for head in heads)
    return plan.cache_bytes(tokens) - sum(own)


def _least_bytes(plan: Plan, tokens: int) -> float:
    """The least that a cache takes: each head softmax, or without kept tokens and a state."""
    heads = _free_heads(plan)
    least = (min(_bytes(plan, head, kept, False, tokens) for kept in (None, 0)) for head in heads)
    return _other_bytes(plan, heads, tokens) + sum(least)


def _described(costs: dict[Head, HeadCosts], found: dict[Head, Option]) -> list[dict]:
    """Every head's score at every size, and what it got: for liger.json and the plots."""
    described = []
    for (layer, head), one in costs.items():
        score, option = one.score(), found.get((layer, head))
        column = lambda place: [x if math.isfinite(x) else None for x in score[:, place].tolist()]  # noqa: E731, B023
        entry = {"layer": layer, "head": head, "score": column(0)}
        if any(x is not None for x in column(1)):
            entry["score_with_state"] = column(1)
        if option is None or option.kept is None:
            entry["softmax"] = True
        else:
            entry |= {"kept": option.kept, "rest": option.rest}
        described.append(entry)
    return described


def _announcement(model, rows: Rows, tokens: int) -> str:
    """What will be read and about how long that takes, from one row's measured pass."""
    row = rows.fit[:1]
    model.set_attention_mode("softmax")
    with torch.no_grad():
        model.get_decoder()(row[:, :16], use_cache=False)  # the first pass of a process is no measure
        start = time.perf_counter()
        model.get_decoder()(row, use_cache=False)
    seconds = PASSES * (time.perf_counter() - start) * tokens / row.numel() / 2
    model.set_attention_mode("liger")
    return f"calibrating on {tokens:,} tokens of {rows.text}, about {duration(seconds)}"
