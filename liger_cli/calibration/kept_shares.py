"""Kept tokens shared out between the layers of a calibrated model, without a pass of the model for each size.

What a layer lacks with so many kept tokens, d, changes what the model says by a KL divergence of about (g . d)^2 / 2,
where g is the gradient of the log-likelihood, at the layer's output, of tokens drawn from the model's own distribution:
its Fisher information (Martens, arXiv 1412.1193, section 9), each token's output taken by itself. So one backward pass
tells for every layer what each size costs, where `allocation` measures a whole pass for each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from liger_cli.calibration.allocation import MEASURED, allocate, interpolated, ladder_of, rungs_up_to
from liger_cli.calibration.meter import distances
from liger_cli.conversion.plan import Plan
from liger_cli.conversion.plan_edits import constant_bytes, resized, without_recurrence
from liger_cli.system.progress import progress
from liger_cli.templates.liger_transformers import CACHE

DRAWS = 2  # of the tokens that a likelihood is taken of
LEAST = (0.0, 0.25, 0.5)  # of the mean that every layer keeps in a first try


def shared_out(plan: Plan, model, rows: torch.Tensor) -> tuple[Plan, dict | None]:
    """The plan and the model with kept tokens where they are worth most, at the bytes that they have now.

    The costs of layers are taken to add up. Allocations in which every layer keeps at least a part of the mean are
    measured against the same number everywhere; the nearest to the base is taken.

    Args:
        plan: with the same number of kept tokens in every layer that has any.
        model: of that plan, its scores fitted.
        rows: [N, T], which the scores were not fitted on.
    Returns:
        The plan; and what was found: `mean`, `layers` (tokens by layer), `expected` (layer by layer the KL divergence,
        in nats a token, of each size in it alone) and `tries` (tokens, and KL of the whole model without recurrences).
        None where there is nothing to share out.
    """
    every = {attention.layer_idx: attention for attention in model.get_decoder().liger_attentions()}
    every = {layer: attention for layer, attention in every.items() if attention.liger_window}
    attentions = {layer: attention for layer, attention in every.items() if attention.liger_kept}
    limits = {layer: rows.shape[1] - attention.liger_window for layer, attention in attentions.items()}
    uniform = {layer: attention.liger_kept for layer, attention in attentions.items()}
    if len(attentions) < 2 or any(uniform[layer] >= limit for layer, limit in limits.items()):
        return plan, None
    rungs = {layer: rungs_up_to(MEASURED["kept"], limit) for layer, limit in limits.items()}
    ladder = ladder_of(plan, "kept", rungs)
    expected = expected_losses(model, attentions, rows, {layer: places[:-1:2] for layer, places in rungs.items()})
    losses = {layer: interpolated(found) for layer, found in expected.items()}
    budget, mean = constant_bytes(plan), sum(uniform.values()) / len(uniform)
    options = [uniform, *(ladder.tokens(allocate(ladder, losses, budget, least * mean)) for least in LEAST)]
    tries = []
    for tokens in (dict(option) for option in dict.fromkeys(tuple(one.items()) for one in options)):
        with _without_recurrences(every, tokens):
            tries.append({"tokens": tokens, "kl": distances(model, rows, "liger")[0]})
    best = min(tries, key=lambda one: one["kl"])["tokens"]
    for layer, attention in attentions.items():
        attention.liger_spec = replace(attention.liger_spec, kept=best[layer])
    report = {
        "mean": mean,
        "layers": {str(layer): count for layer, count in best.items()},
        "expected": [
            {"layer": layer, "sizes": [[tokens, loss] for tokens, loss in zip(rungs[layer][:-1:2], found, strict=True)]}
            for layer, found in expected.items()
        ],
        "tries": [{"tokens": list(one["tokens"].values()), "kl": one["kl"]} for one in tries],
    }
    return resized(plan, "kept", best), report


def expected_losses(
    model, attentions: dict[int, torch.nn.Module], rows: torch.Tensor, sizes: dict[int, list[int]]
) -> dict[int, list[float]]:
    """What the layer alone, as a window with so many kept tokens, is expected to cost: KL(base || model), nats a token.

    Args:
        attentions: the layers, by their index.
        sizes: numbers of kept tokens for each layer.
    """
    generator = torch.Generator(rows.device).manual_seed(0)
    totals = {layer: [0.0] * len(sizes[layer]) for layer in attentions}
    with progress("sharing out kept tokens", len(rows)) as step:
        for row in rows.split(1):
            calls, gradients = _gradients(model, attentions, row, generator)
            for layer, attention in attentions.items():
                args, kwargs, wanted = calls[layer]
                for place, tokens in enumerate(sizes[layer]):
                    with torch.no_grad(), _without_recurrences({layer: attention}, {layer: tokens}):
                        lacking = attention(*args, **kwargs)[0].float() - wanted.float()
                    for gradient in gradients[layer]:
                        projected = (gradient.float() * lacking).sum(-1)
                        totals[layer][place] += float(projected.square().sum()) / 2 / DRAWS
            step()
    return {layer: [total / rows.numel() for total in found] for layer, found in totals.items()}


@torch.enable_grad()
def _gradients(model, attentions, row: torch.Tensor, generator) -> tuple[dict, dict]:
    """Of the base on one row: each layer's call (args, kwargs, output), and gradients at its output, one a draw."""
    calls = {}

    def keep(module, args, kwargs, output):
        calls[module.layer_idx] = (args, kwargs, output[0])

    def begin(module, args, output):  # gradients start here, whether the weights take any or not
        return output.detach().requires_grad_()

    hooks = [attention.register_forward_hook(keep, with_kwargs=True) for attention in attentions.values()]
    hooks.append(model.get_input_embeddings().register_forward_hook(begin))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False).set_attention_mode("softmax")
    try:
        log_p = model(row, use_cache=False).logits[0].float().log_softmax(-1)
    finally:
        model.set_attention_mode("liger")
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_()
    outputs = [calls[layer][2] for layer in attentions]
    gradients = {layer: [] for layer in attentions}
    for draw in range(DRAWS):
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        found = torch.autograd.grad(log_p.gather(-1, drawn).sum(), outputs, retain_graph=draw + 1 < DRAWS)
        for layer, gradient in zip(attentions, found, strict=True):
            gradients[layer].append(gradient)
    bare = {"attention_mask": None, CACHE: None}  # no padding; softmax's own mask is none of Liger's
    return {layer: (args, {**kwargs, **bare}, out.detach()) for layer, (args, kwargs, out) in calls.items()}, gradients


@contextmanager
def _without_recurrences(attentions: dict[int, torch.nn.Module], tokens: dict[int, int]) -> Iterator[None]:
    """Within, these layers are Liger's with window and kept tokens alone, as many as told or as they have."""
    before = [(attention, attention.liger_spec, attention.liger_mode) for attention in attentions.values()]
    try:
        for attention, spec, _ in before:
            kept = tokens.get(attention.layer_idx, spec.kept)
            attention.liger_spec, attention.liger_mode = replace(without_recurrence(spec), kept=kept), "liger"
        yield
    finally:
        for attention, spec, mode in before:
            attention.liger_spec, attention.liger_mode = spec, mode
