"""The rest state: what a head remembers of the tokens that are in neither its window nor its sinks and kept tokens.

Softmax attention over those tokens, expanded to first order around their mean logit: their number, their mean value,
their mean logit, and the covariance of value and logit, all read off one (D + 1) x (D + 1) state of rotated keys. It
takes part in one softmax with the exact tokens; its share is positive whatever the state holds. The mass that the
expansion leaves out is corrected by a linear term for each query head, the slope by a factor.

Exact memory for what matters and a linear state for the rest, as in LoLA (arXiv 2505.23666).
"""

from functools import lru_cache

import torch

from .liger_backend import recurrence
from .liger_gates import GATES
from .liger_rules import RecurrenceInputs

LOG_COUNT = 6.0  # about the log of the number of tokens that the linear term for the number is fitted at


def add_rest(local, lse, q, plain_q, evicted, gate_logits, states, mass, slope, spec, scaling: float):
    """One softmax over the exact tokens and the rest state, for the heads that have one.

    Args:
        local: [B, Hq, T, D] and lse: [B, Hq, T], of the exact tokens.
        q: [B, Hq, T, D], after RoPE. plain_q: before it.
        evicted: keys, values, which are there, and the gate's logits where they depend on the token: the token that
            enters the state before each query (see `liger_kept.kept_attention`).
        gate_logits: [B, Hkv or Hq, T, 1], the gate's, where they do not depend on the token.
        states: what came before, or None.
        mass: [Hq, D + 3]. slope: [Hq].
    Returns:
        [B, Hq, T, D] float32, and the states.
    """
    keys, values, there, *logits = evicted
    gate_logits = logits[0].unsqueeze(-1) if logits else gate_logits
    heads, queries, gates = rest_heads(spec.rest_by_head(keys.shape[1]), q.shape[1], gate_logits.shape[1], q.device)
    if heads is None:
        found = rest_attention(q, plain_q, keys, values, there, gate_logits, states, mass, slope, spec, scaling)
        return _shared(local, lse, *found[:2]), found[2]
    kv = (x[:, heads] for x in (keys, values, there))
    own = (q[:, queries], plain_q[:, queries], *kv, gate_logits[:, gates], states, mass[queries], slope[queries])
    output, rest_lse, states = rest_attention(*own, spec, scaling)
    output = _shared(local[:, queries], lse[:, queries], output, rest_lse)
    return local.float().index_copy(1, queries, output), states


def rest_attention(q, plain_q, keys, values, there, gate_logits, states, mass, slope, spec, scaling: float):
    """Attention to the rest state alone: arguments as `add_rest`, of heads that all have one.

    Returns:
        o [B, Hq, T, D] and lse [B, Hq, T], the lowest number where the state is empty, and the states.
    """
    dim, heads = q.shape[-1], gate_logits.shape[1]  # a state for each query head where their decays differ
    keys, values = (_for_heads(x.float(), heads) for x in (keys, values))
    there = _for_heads(there, heads).unsqueeze(-1)
    one = there.to(keys.dtype)
    keys, values = torch.cat([keys * one, one], dim=-1), torch.cat([values, one], dim=-1)
    reading = q.float() * scaling
    if q.shape[2] == 1 and states is not None:
        (state,) = states
        if spec.gate != "none":
            state = state * _log_decay(gate_logits, there, spec).exp()
        state = torch.addcmul(state, keys.mT, values)
        read = (reading.unflatten(1, (heads, -1)).squeeze(3) @ state[:, :, :dim]).unsqueeze(3)
        sums, states = state[:, :, dim:].unsqueeze(2), (state,)
    else:
        # One more query for each state reads the row of the ones: the sum of the values, and the number of tokens.
        reading = torch.nn.functional.pad(reading, (0, 1)).unflatten(1, (heads, -1))
        counting = torch.nn.functional.pad(torch.zeros_like(reading[:, :, :1, :, :dim]), (0, 1), value=1.0)
        reading = torch.cat([reading, counting], dim=2).flatten(1, 2)
        inputs = RecurrenceInputs(reading, keys, values, _log_decay(gate_logits, there, spec))
        read, states = recurrence(GATES[spec.gate].rule, inputs, states, spec.backend)
        read = read.unflatten(1, (heads, -1))
        read, sums = read[:, :, :-1], read[:, :, -1:]

    count = sums[..., dim:]
    empty = count <= 0
    count = count.masked_fill(empty, 1.0)
    mean_value, read = sums[..., :dim] / count, read / count
    mean_logit = read[..., dim:]
    covariance = torch.addcmul(read[..., :dim], mean_logit, mean_value, value=-1)
    output = torch.addcmul(mean_value, slope.float().view(heads, -1, 1, 1), covariance)
    log_count = count.log()
    weight = mass.float().view(heads, -1, 1, dim + 3)
    lse = torch.addcmul(log_count + weight[..., :1], weight[..., 1:2], mean_logit)
    lse = torch.addcmul(lse, weight[..., 2:3], log_count - LOG_COUNT)
    plain_q = plain_q.float().unflatten(1, (heads, -1))
    lse = lse + scaling**0.5 * (plain_q * weight[..., 3:]).sum(-1, keepdim=True)
    lse = lse.masked_fill(empty, torch.finfo(torch.float32).min)
    return output.flatten(1, 2), lse.squeeze(-1).flatten(1, 2), states


def _log_decay(gate_logits, there, spec):
    """Of the gate, 0 where no token enters. [B, H, T, 1]"""
    logits = gate_logits.float()
    return GATES[spec.gate].inputs(logits, logits, logits, logits, spec).log_decay.masked_fill(~there, 0.0)


def _shared(local, lse, output, rest_lse):
    return torch.lerp(local.float(), output, (rest_lse - lse).sigmoid().unsqueeze(-1))


def empty_rest(values, gate_logits, spec):
    """The states before the first token is evicted. values [B, Hkv, T, D]"""
    each = max(gate_logits.shape[1] // values.shape[1], 1)
    count = sum(spec.rest_by_head(values.shape[1])) * each
    width = values.shape[-1] + 1
    return (values.new_zeros(values.shape[0], count, width, width, dtype=torch.float32),)


def _for_heads(x, heads: int):
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


@lru_cache(maxsize=256)
def rest_heads(flags: tuple[bool, ...], num_heads: int, num_gates: int, device):
    """The key/value heads that have a rest state, their query heads and their gates' heads; None where all have."""
    if all(flags):
        return None, None, None
    with torch.inference_mode(False):
        heads = torch.tensor([head for head, flag in enumerate(flags) if flag], device=device)
        each = [heads[:, None] * (count // len(flags)) + torch.arange(count // len(flags), device=device)
                for count in (num_heads, num_gates)]  # fmt: skip
        return heads, *(index.flatten() for index in each)
