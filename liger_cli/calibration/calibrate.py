"""`liger convert --calibrate`: what a linearized layer lacks of the softmax layer, fitted in closed form on some text.

The base runs as it is; each layer is fitted on the hidden states that the base gives it, so no layer waits for another:

1. `keep_score`: logistic regression, on a key before its rotary embedding, of how much later queries attend to it from
   beyond the window.
2. Where asked for, the kept tokens are shared out between the layers (see `kept_shares`).
3. `grm_scale`, `swa_scale`: ridge regression of the softmax layer's output, after the output projection, on the output
   of each head's two branches. The penalty draws towards the window alone (0 and 1). With the joint normaliser only the
   odds of the two branches count, and those are searched for each head.

No weight of the base changes. Rows that took no part decide whether a layer keeps its recurrent branch, and whether the
whole model is nearer to the base than its window; where it is not, the window and the kept tokens run alone.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from liger_cli.calibration.kept_shares import shared_out
from liger_cli.calibration.meter import Meter, distances, load_base, not_finite, open_meter
from liger_cli.calibration.text import Text
from liger_cli.checkpoint.extras import extra_shapes
from liger_cli.conversion.card import share_note
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import resized, without_recurrence
from liger_cli.system.console import say
from liger_cli.system.errors import LigerError, UsageError
from liger_cli.system.progress import progress
from liger_cli.templates.liger_transformers import CACHE

ROWS, SHARED_BY, HELD_OUT, ROW_TOKENS = 24, 8, 8, 512
TEXT_KINDS = ("story", "facts", "recall", "drill", "chat")
RIDGE = 1e-3  # of the mean diagonal of the Gram matrix
NEWTON_STEPS = 12
PENALTY = 1.0  # of the logistic regression, on weights of standardised channels
SCORED = "window attention with kept tokens, scores fitted, without a recurrence"
ODDS = [2.0**power for power in range(-8, 13)]  # of the recurrence against the window, for the joint normaliser


@dataclass
class Statistics:
    """What one layer's fit needs, summed over the rows.

    Attributes:
        keys: per batch [Hkv, N, D], before the rotary embedding; weights [Hkv, N] in [0, 1]: how much each is attended
            to from beyond the window.
        gram: [2 Hq, 2 Hq] products of the branches' outputs, the recurrences first; target: [2 Hq], with the softmax
            layer's output; power: of the softmax layer's output.
    """

    keys: list
    weights: list
    gram: torch.Tensor | None = None
    target: torch.Tensor | None = None
    power: float = 0.0


def calibrate(plan: Plan, data: str | Text | None = None, share: bool = False) -> tuple[Plan, dict, dict]:
    """Fit the extra tensors of a plan.

    Args:
        plan: its Liger layers have `branch_scales` or `kept` tokens.
        data: a text or .jsonl file, or token ids; a shipped text by default.
        share: share the kept tokens out between the layers; see `kept_shares`.
    Returns:
        The plan, with the kept tokens shared out, or without any where even they made the window worse; the values of
        its extra tensors, NumPy arrays by name; and what was measured: the section `calibration` of liger.json.
    Raises:
        UsageError: nothing to fit. ModelError: the base cannot be loaded. LigerError: too little text, or numbers that
        are not finite.
    """
    if not any(spec.branch_scales or spec.kept for spec in plan.specs):
        raise UsageError("--calibrate has nothing to fit; add --branch-scales or --kept")
    start = time.perf_counter()
    model = load_base(plan)
    rows, shared_by, held_out = text_rows(plan, model, data)
    tokens = rows.numel() + share * shared_by.numel()
    say(f"calibrating on {tokens:,} tokens, held out {held_out.numel():,}")
    name = data.name if isinstance(data, Text) else data or "the shipped text"
    report = {"text": name, "tokens": tokens, "held_out_tokens": held_out.numel()}
    fit_keep_scores(model, rows)
    if share:
        plan, shares = shared_out(plan, model, shared_by)
        report |= {"kept_shares": shares} if shares else {}
    fit_branches(model, rows, held_out)
    report |= judge(model, held_out)
    if not math.isfinite(report["kl"] + report["window_only_kl"]):
        raise not_finite(model, held_out, "the calibration")
    if report["kl"] > report["window_only_kl"]:
        plan = replace(plan, specs=tuple(replace(spec, kept=0) for spec in plan.specs))
        report |= {"dropped_kl": report["kl"], "kl": report["window_only_kl"]}
        report.pop("kept_shares", None)
    report["seconds"] = time.perf_counter() - start
    wanted = extra_shapes(plan.specs, plan.checkpoint.geometry)
    return plan, {name: value for name, value in extra_values(model).items() if name in wanted}, report


def wanted_tokens() -> int:
    """Tokens that a calibration reads where the text has as many."""
    return (ROWS + SHARED_BY + HELD_OUT) * ROW_TOKENS


def text_rows(plan: Plan, model, data: str | Text | None):
    """Rows to fit on [ROWS, T], to share kept tokens out by [SHARED_BY, T], where a score must not have seen them, and
    to judge by [HELD_OUT, T]; fewer where the text is short."""
    from pathlib import Path

    from liger_cli.evaluation.scoring import make_rows, read_texts
    from liger_cli.evaluation.subject import load_tokenizer
    from liger_cli.shipped.probes import held_out_text
    from liger_cli.shipped.text import TRAIN_SEED

    wanted = ROWS + SHARED_BY + HELD_OUT
    length = min(ROW_TOKENS, plan.checkpoint.config.get("max_position_embeddings") or ROW_TOKENS)
    if isinstance(data, Text):
        whole = data.rows(length)
    else:
        texts = read_texts(Path(data)) if data else held_out_text(6 * wanted * length, TRAIN_SEED + 2**20, TEXT_KINDS)
        rows = make_rows(load_tokenizer(plan.checkpoint.folder, model.config), texts, length)
        whole = rows.ids[rows.lengths == length][:, :-1]
    whole = whole[:wanted].to(model.device)
    if len(whole) < 4:
        raise LigerError(f"the text to calibrate on fills {len(whole)} rows of {length} tokens; give at least 4")
    held_out, shared_by = (max(1, len(whole) * part // wanted) for part in (HELD_OUT, SHARED_BY))
    return whole[held_out:-shared_by], whole[-shared_by:], whole[:held_out]


def open_scored_meter(plan: Plan, data: str | None, layers: list[int]) -> Meter:
    """A meter of the plan without recurrences, the scores of these layers fitted, those without kept tokens, too.

    Raises:
        As `meter.open_meter`.
    """
    bare = replace(plan, specs=tuple(without_recurrence(spec) for spec in plan.specs))
    scored = resized(bare, "kept", {layer: max(1, bare.specs[layer].kept) for layer in layers})
    meter = open_meter(scored, data)
    rows, *_ = text_rows(scored, meter.model, data)
    say(f"fitting scores on {rows.numel():,} tokens")
    fit_keep_scores(meter.model, rows)
    meter.plan, meter.configured = bare, SCORED
    return meter


def calibration_note(report: dict) -> str:
    """One sentence on what a calibration gave."""
    closed = 1 - report["kl"] / report["window_only_kl"] if report["window_only_kl"] else 0.0
    shared = f"; {share_note(report['kept_shares'])}" if "kept_shares" in report else ""
    return (
        f"calibrated on {report['tokens']:,} tokens of {report['text']} in {report['seconds']:.0f} s: on held-out rows "
        f"{100 * closed:.0f} % of the window's KL divergence from the base is gone ({report['window_only_kl']:.4f} -> "
        f"{report['kl']:.4f} nats a token){shared}"
    )


@torch.no_grad()
def fit_keep_scores(model, rows: torch.Tensor) -> None:
    """Set the scores of every layer that keeps tokens."""
    layers = [attention for attention in model.get_decoder().liger_attentions() if attention.liger_kept]
    with progress("fitting scores", len(rows)) as step:
        found = _collect(model, layers, rows, _received, step)
        for attention, statistics in zip(layers, found, strict=True):
            attention.keep_score.copy_(fit_scores(statistics))


@torch.no_grad()
def fit_branches(model, rows: torch.Tensor, held_out: torch.Tensor) -> None:
    """Set the coefficients of every layer that has them."""
    layers = model.get_decoder().liger_attentions()
    scaled = [attention for attention in layers if attention.liger_spec.branch_scales]
    with progress("fitting coefficients", 2 * len(rows)) as step:
        joint = [attention for attention in scaled if attention.liger_spec.normalizer == "joint"]
        _fit_odds(model, joint, rows, step)
        plain = [attention for attention in scaled if attention not in joint]
        fitted = _collect(model, plain, rows, _products, step)
        judged = _collect(model, plain, held_out, _products, step)
        for attention, statistics, unseen in zip(plain, fitted, judged, strict=True):
            grm, swa = fit_scales(statistics)
            if not (grm.isfinite().all() and swa.isfinite().all()):
                raise not_finite(model, rows, "the calibration")
            window = torch.cat([torch.zeros_like(grm), torch.ones_like(swa)])
            if _error(unseen, torch.cat([grm, swa])) > _error(unseen, window):
                grm, swa = window.chunk(2)
            attention.grm_scale.copy_(grm)
            attention.swa_scale.copy_(swa)


def fit_scores(statistics: Statistics) -> torch.Tensor:
    """Weights [Hkv, D] of the logistic regression of the attention received on the key, for each head."""
    keys, weights = torch.cat(statistics.keys, dim=1).double(), torch.cat(statistics.weights, dim=1).double()
    found = []
    for x, y in zip(keys, weights, strict=True):
        spread = x.std(0).clamp_min(1e-6)
        x = F.pad(x / spread, (0, 1), value=1.0)
        weight = x.new_zeros(x.shape[1])
        penalty = PENALTY * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        penalty[-1, -1] = 1e-6
        for _ in range(NEWTON_STEPS):
            chance = (x @ weight).sigmoid()
            slope = x.T @ (chance - y) + penalty @ weight
            curvature = (x * (chance * (1 - chance)).unsqueeze(1)).T @ x + penalty
            weight = weight - torch.linalg.solve(curvature, slope)
        found.append((weight[:-1] / spread).float())
    return torch.stack(found)


def fit_scales(statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of the recurrence and of the window, [Hq] each, in closed form."""
    gram, target = statistics.gram.double(), statistics.target.double()
    heads = len(target) // 2
    prior = torch.cat([torch.zeros(heads), torch.ones(heads)]).to(gram)
    # A branch of tiny output has a tiny diagonal of its own: the penalty is relative to each.
    penalty = RIDGE * torch.diag(gram.diagonal() + 1e-6 * gram.diagonal().mean() + 1e-12)
    found = prior + torch.linalg.solve(gram + penalty, target - gram @ prior)
    return found[:heads].float(), found[heads:].float()


@torch.no_grad()
def judge(model, held_out: torch.Tensor) -> dict:
    """KL(base || model), in nats a token, of the calibrated model and of its window; the nearer one is kept."""
    found = dict(zip(("kl", "window_only_kl"), distances(model, held_out, "liger", "window"), strict=True))
    layers = [attention for attention in model.get_decoder().liger_attentions() if attention.liger_spec.branch_scales]
    if found["kl"] > found["window_only_kl"]:
        for attention in layers:
            attention.grm_scale.zero_()
            attention.swa_scale.fill_(1.0)
        found["fitted_kl"] = found["kl"]
        (found["kl"],) = distances(model, held_out, "liger")
    if found["kl"] > found["window_only_kl"]:
        for attention in model.get_decoder().liger_attentions():
            if attention.liger_kept:
                attention.keep_score.zero_()
        (found["kl"],) = distances(model, held_out, "liger")
    found["recurrent_layers"] = [attention.layer_idx for attention in layers if attention.grm_scale.abs().sum() > 0]
    return found


def extra_values(model) -> dict:
    """The extra parameters as float32 NumPy arrays, by their names in a checkpoint."""
    from liger_cli.templates.liger_extras import NAMES

    return {
        name: parameter.detach().float().cpu().numpy()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in NAMES
    }


def _collect(model, layers, rows, measure, step) -> list[Statistics]:
    """Run the base over the rows; `measure` sees each layer's input, its arguments and the softmax heads' outputs."""
    found = [Statistics([], []) for _ in layers]
    inputs: dict[int, tuple] = {}
    hooks = []
    for attention, statistics in zip(layers, found, strict=True):
        projection = _projection(attention)

        def before(module, args, kwargs):
            inputs[module.layer_idx] = (args, kwargs)

        def heads(module, args, attention=attention):
            if attention.layer_idx in inputs:  # not while `measure` runs the layer itself
                inputs[attention.layer_idx] += (args[0],)

        def after(module, args, output, statistics=statistics):
            arguments = inputs.pop(module.layer_idx)
            if len(arguments) == 3:
                measure(module, *arguments, statistics)

        hooks += [
            attention.register_forward_pre_hook(before, with_kwargs=True),
            projection.register_forward_pre_hook(heads),
            attention.register_forward_hook(after),
        ]
    model.set_attention_mode("softmax")
    try:
        for row in rows.split(1) if layers else ():
            model.get_decoder()(row, use_cache=False)
            step()
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attention_mode("liger")
    return found


def _projection(attention):
    """The module that projects the heads' outputs back."""
    return attention.o_proj if hasattr(attention, "o_proj") else attention.dense


def _received(attention, args, kwargs, output, statistics: Statistics) -> None:
    """For every key the attention that it gets from beyond the window, pressed into [0, 1)."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    q, k, v = attention.project(hidden)
    rotation = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "attention_mask")}
    rotated_q, rotated_k = attention.rotate(q, k, **{"position_embeddings": None, **rotation})
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = rotated_q.float().unflatten(1, (k.shape[1], groups)) @ rotated_k.float().unsqueeze(2).mT
    scores = scores * attention.scaling
    if softcap := getattr(attention, "attn_logit_softcapping", None):
        scores = (scores / softcap).tanh() * softcap
    place = torch.arange(length, device=q.device)
    age = place[:, None] - place
    weights = scores.masked_fill(age < 0, -torch.inf).softmax(-1)
    received = weights.masked_fill(age < attention.liger_window, 0.0).sum((0, 2, 3))  # [Hkv, T]
    plain = attention.without_positions(q, k)[1][0]
    # The last window's keys are out of everybody's reach from beyond: they say nothing about being needed.
    usable = slice(0, max(length - attention.liger_window, 1))
    statistics.keys.append(plain[:, usable].float())
    statistics.weights.append((received / (1 + received))[:, usable])


def _products(attention, args, kwargs, output, statistics: Statistics) -> None:
    """Products of both branches' outputs, each head's through its columns of the output projection."""
    grm, swa = _branches(attention, args, kwargs)
    weight = _projection(attention).weight.float().unflatten(1, (-1, grm.shape[-1]))  # [D_model, Hq, D]
    gather = lambda x: torch.einsum("thd,mhd->htm", x, weight).flatten(1)  # noqa: E731
    features = torch.cat([gather(grm), gather(swa)])  # [2 Hq, T * D_model]
    wanted = gather(output[0].float().unflatten(-1, (-1, grm.shape[-1]))).sum(0)
    gram, target = features @ features.T, features @ wanted
    statistics.gram = gram if statistics.gram is None else statistics.gram + gram
    statistics.target = target if statistics.target is None else statistics.target + target
    statistics.power += float(wanted.square().sum())


def _branches(attention, args, kwargs):
    """The outputs of the recurrence alone and of the window with its kept tokens alone, [T, Hq, D] float32 each."""
    spec, mode, seen = attention.liger_spec, attention.liger_mode, []
    hook = _projection(attention).register_forward_pre_hook(lambda module, args: seen.append(args[0][0].float()))
    attention.liger_mode = "liger"
    try:
        for mix in (1.0, 0.0):
            attention.liger_spec = replace(spec, mix=mix, branch_scales=False)
            attention.forward(*args, **{**kwargs, "attention_mask": None, CACHE: None})
    finally:
        hook.remove()
        attention.liger_spec, attention.liger_mode = spec, mode
    return (x.unflatten(-1, (attention.config.num_attention_heads, -1)) for x in seen)


def _error(statistics: Statistics, scales) -> float:
    """Squared distance from the softmax layer's output."""
    scales = scales.to(statistics.gram)
    return float(scales @ statistics.gram @ scales - 2 * scales @ statistics.target) + statistics.power


def _fit_odds(model, layers, rows, step) -> None:
    """For the joint normaliser: for each head the odds of the recurrence that come nearest to softmax's output."""
    if not layers:
        return
    errors = {attention.layer_idx: 0.0 for attention in layers}

    def measure(attention, args, kwargs, output, statistics):
        wanted = output[0].float().unflatten(-1, (attention.config.num_attention_heads, -1))
        found = []
        for odds in ODDS:
            attention.grm_scale.fill_(odds)
            attention.swa_scale.fill_(1.0)
            found.append((_output(attention, args, kwargs) - wanted).square().sum((0, 2)))
        errors[attention.layer_idx] = errors[attention.layer_idx] + torch.stack(found)

    _collect(model, layers, rows, measure, step)
    for attention in layers:
        best = errors[attention.layer_idx].argmin(0)
        attention.grm_scale.copy_(torch.tensor(ODDS).to(best.device)[best])
        attention.swa_scale.fill_(1.0)


def _output(attention, args, kwargs):
    """The layer's output before the output projection. [T, Hq, D] float32"""
    seen = []
    hook = _projection(attention).register_forward_pre_hook(lambda module, args: seen.append(args[0][0].float()))
    mode, attention.liger_mode = attention.liger_mode, "liger"
    try:
        attention.forward(*args, **{**kwargs, "attention_mask": None, CACHE: None})
    finally:
        hook.remove()
        attention.liger_mode = mode
    return seen[0].unflatten(-1, (attention.config.num_attention_heads, -1))
