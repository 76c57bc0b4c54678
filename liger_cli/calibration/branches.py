"""Coefficients of the paper's two branches, in closed form: for layers whose recurrence reads every token.

`grm_scale`, `swa_scale`: ridge regression of the softmax layer's output, after the output projection, on the output
of each head's two branches. The penalty draws towards the window alone (0 and 1). With the joint normaliser only the
odds of the two branches count, and those are searched for each head.
"""

from dataclasses import dataclass, replace

import torch

from liger_cli.calibration.base import not_finite
from liger_cli.calibration.layerwise import projection
from liger_cli.system.progress import progress
from liger_cli.templates.liger_transformers import CACHE

RIDGE = 1e-3  # of the mean diagonal of the Gram matrix
ODDS = [2.0**power for power in range(-8, 13)]  # of the recurrence against the window, for the joint normaliser


@dataclass
class Statistics:
    """What one layer's fit needs, summed over the rows.

    Attributes:
        gram: [2 Hq, 2 Hq] products of the branches' outputs, the recurrences first; target: [2 Hq], with the softmax
            layer's output; power: of the softmax layer's output.
    """

    gram: torch.Tensor | None = None
    target: torch.Tensor | None = None
    power: float = 0.0


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


def fit_scales(statistics: Statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of the recurrence and of the window, [Hq] each, in closed form."""
    gram, target = statistics.gram.double(), statistics.target.double()
    heads = len(target) // 2
    prior = torch.cat([torch.zeros(heads), torch.ones(heads)]).to(gram)
    # A branch of tiny output has a tiny diagonal of its own: the penalty is relative to each.
    penalty = RIDGE * torch.diag(gram.diagonal() + 1e-6 * gram.diagonal().mean() + 1e-12)
    found = prior + torch.linalg.solve(gram + penalty, target - gram @ prior)
    return found[:heads].float(), found[heads:].float()


def _collect(model, layers, rows, measure, step) -> list[Statistics]:
    """Run the base over the rows; `measure` sees each layer's input, its arguments and the softmax heads' outputs."""
    found = [Statistics() for _ in layers]
    inputs: dict[int, tuple] = {}
    hooks = []
    for attention, statistics in zip(layers, found, strict=True):
        out_projection = projection(attention)

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
            out_projection.register_forward_pre_hook(heads),
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


def _products(attention, args, kwargs, output, statistics: Statistics) -> None:
    """Products of both branches' outputs, each head's through its columns of the output projection."""
    grm, swa = _branches(attention, args, kwargs)
    weight = projection(attention).weight.float().unflatten(1, (-1, grm.shape[-1]))  # [D_model, Hq, D]
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
    hook = projection(attention).register_forward_pre_hook(lambda module, args: seen.append(args[0][0].float()))
    attention.liger_mode = "liger"
    try:
        for mix in (1.0, 0.0)[: 2 if attention.liger_window else 1]:
            attention.liger_spec = replace(spec, mix=mix, branch_scales=False)
            attention.forward(*args, **{**kwargs, "attention_mask": None, CACHE: None})
    finally:
        hook.remove()
        attention.liger_spec, attention.liger_mode = spec, mode
    seen = seen if len(seen) == 2 else [*seen, torch.zeros_like(seen[0])]  # no window, no branch of it
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
    hook = projection(attention).register_forward_pre_hook(lambda module, args: seen.append(args[0][0].float()))
    mode, attention.liger_mode = attention.liger_mode, "liger"
    try:
        attention.forward(*args, **{**kwargs, "attention_mask": None, CACHE: None})
    finally:
        hook.remove()
        attention.liger_mode = mode
    return seen[0].unflatten(-1, (attention.config.num_attention_heads, -1))
