"""How far every key/value head reaches: a closed-form score from one pass of the base, to shortlist heads by."""

import time

import torch

from liger_cli.calibration.choice import Kept
from liger_cli.calibration.meter import Batch, Meter
from liger_cli.conversion.requests import Head
from liger_cli.templates.liger_heads import masked_attention
from liger_cli.templates.liger_transformers import CACHE

SAMPLE = 64  # tokens of a row that are looked at beside the hard ones


def measure_reach(meter: Meter, kept: Kept) -> dict[Head, float]:
    """What each head of the candidate layers that are not kept adds from beyond the window just where it matters.

    For a token t, a key/value head h with its query heads, and o its attention's output in the base,

        r(h, t) = |W_O (o_full(t) - o_window(t))| / |x(t)|

    where W_O is that head's part of the layer's output projection and x the residual stream that it is added to: how
    much the head attends to beyond its window, what it finds there, and how much of it the layer passes on. The reach
    is the mean of r over the tokens where base and window-only model differ (`Batch.hard`) less its mean over others:
    heads that look far everywhere alike, as in the first layer, do not carry what is lost. Where no token is hard, the
    mean over all.
    """
    start = time.perf_counter()
    layers = [layer for layer in meter.candidates if layer not in kept]
    heads = meter.plan.checkpoint.geometry.num_key_value_heads
    hard = [batch.hard for batch in meter.batches]
    others = [_others(batch) for batch in meter.batches]
    any_hard = any(part.any() for part in hard)
    shares = [part.double() / max(sum(int(one.sum()) for one in hard), 1) for part in hard]
    others = [part.double() / max(sum(int(one.sum()) for one in others), 1) for part in others]
    totals = {layer: torch.zeros(heads, dtype=torch.float64) for layer in layers}
    meter.apply(frozenset(meter.candidates), "softmax")
    for batch, share, other in zip(meter.batches, shares, others, strict=True):
        weights = share - other if any_hard else other
        if weights.any():
            for layer, found in _reaches(meter, batch, weights, layers).items():
                totals[layer] += found
    meter.passes += 1
    meter.seconds += time.perf_counter() - start
    return {(layer, head): float(totals[layer][head]) for layer in layers for head in range(heads)}


def _others(batch: Batch):
    """[B, P] bool: judged tokens of the text that are not hard, some of them if they are many."""
    if batch.answers:
        return torch.zeros_like(batch.judged)
    sample = torch.zeros_like(batch.judged)
    sample[:, :: max(1, sample.shape[1] // SAMPLE)] = True
    return batch.judged & ~batch.hard & sample


@torch.inference_mode()
def _reaches(meter: Meter, batch: Batch, weights, layers: list[int]) -> dict[int, torch.Tensor]:
    """Weighted sums over tokens, [Hkv] for each layer. weights: [B, P], of the batch's judged positions."""
    positions = torch.arange(batch.ids.shape[1]) if batch.kept is None else batch.kept
    columns = weights.any(0)
    positions, weights = positions[columns].to(meter.model.device), weights[:, columns]
    decoder = meter.model.get_decoder()
    residuals, found = {}, {}

    def before_layer(index):
        def hook(_module, arguments, keywords):
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            residuals[index] = hidden[:, positions].float().norm(dim=-1)  # [B, P]

        return hook

    def before_attention(index):
        def hook(attention, arguments, keywords):
            keywords = {**keywords}
            hidden = arguments[0] if arguments else keywords.pop("hidden_states")
            added = _added(attention, hidden, keywords, positions)  # [B, P, Hkv]
            relative = added / residuals[index].clamp_min(1e-12).unsqueeze(-1)
            found[index] = torch.einsum("bph,bp->h", relative.cpu().double(), weights)

        return hook

    handles = []
    for index in layers:
        layer = decoder.layers[index]
        handles.append(layer.register_forward_pre_hook(before_layer(index), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_pre_hook(before_attention(index), with_kwargs=True))
    try:
        decoder(input_ids=batch.ids.to(meter.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _added(attention, hidden_states, keywords: dict, positions):
    """Norm of what each key/value head adds to the residual stream from beyond the window. [B, P, Hkv]"""
    keywords.pop("attention_mask", None)
    keywords.pop(CACHE, None)
    q, k, v = attention.project(hidden_states)
    q, k = attention.rotate(q, k, keywords.pop("position_embeddings", None), **keywords)
    q = q[:, :, positions]
    column = torch.arange(k.shape[2], device=k.device)
    age = positions[:, None] - column
    whole = (age >= 0) & (age < (attention.local_window or k.shape[2]))
    near = whole & (age < attention.liger_window)
    softcap, sink_logits = getattr(attention, "attn_logit_softcapping", None), getattr(attention, "sinks", None)
    full, window = (
        masked_attention(q, k, v, seen[None, None], attention.scaling, softcap, sink_logits) for seen in (whole, near)
    )
    beyond = (full - window).transpose(1, 2)  # [B, P, Hq, D]
    groups = beyond.shape[2] // k.shape[1]
    nothing = attention.project_output(torch.zeros_like(beyond[:, :1]).flatten(2))  # the projection's bias
    norms = []
    for head in range(k.shape[1]):
        alone = torch.zeros_like(beyond)
        queries = slice(head * groups, (head + 1) * groups)
        alone[:, :, queries] = beyond[:, :, queries]
        norms.append((attention.project_output(alone.flatten(2)) - nothing).float().norm(dim=-1))
    return torch.stack(norms, dim=-1)
