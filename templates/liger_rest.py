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
from .liger_recurrence import chunk_sum
from .liger_rules import RecurrenceInputs

LOG_COUNT = 6.0  # about the log of the number of tokens that the linear term for the number is fitted at


def add_rest(local, lse, q, plain_q, evicted, gate_logits, states, mass, slope, spec, scaling: float):
    """One softmax over the exact tokens and the rest state, for the heads that have one.

    Args:
        local: [B, Hq, T, D] and lse: [B, Hq, T], of the exact tokens.
        q: [B, Hq, T, D], after RoPE. plain_q: before it.
        evicted: keys, values, which are there, and the gate's logits where they depend on the token: the token that
            enters the state before each query (see `liger_kept.kept_attention`).
        gate_logits: [B, Hkv or Hq, T, 1], the gate's, where they do not depend on the token; or None where nothing
            fades.
        states: what came before, or None.
        mass: [Hq, D + 3]. slope: [Hq].
    Returns:
        [B, Hq, T, D] float32, and the states.
    """
    keys, values, there, *logits = evicted
    gate_logits = logits[0].unsqueeze(-1) if logits else gate_logits
    num_gates = keys.shape[1] if gate_logits is None else gate_logits.shape[1]
    heads, queries, gates = rest_heads(spec.rest_by_head(keys.shape[1]), q.shape[1], num_gates, q.device)
    if heads is None:
        found = rest_attention(q, plain_q, keys, values, there, gate_logits, states, mass, slope, spec, scaling)
        return _shared(local, lse, *found[:2]), found[2]
    kv = (x[:, heads] for x in (keys, values, there))
    gate_logits = None if gate_logits is None else gate_logits[:, gates]
    own = (q[:, queries], plain_q[:, queries], *kv, gate_logits, states, mass[queries], slope[queries])
    output, rest_lse, states = rest_attention(*own, spec, scaling)
    output = _shared(local[:, queries], lse[:, queries], output, rest_lse)
    return local.float().index_copy(1, queries, output), states


def rest_attention(q, plain_q, keys, values, there, gate_logits, states, mass, slope, spec, scaling: float):
    """Attention to the rest state alone: arguments as `add_rest`, of heads that all have one.

    Returns:
        o [B, Hq, T, D] and lse [B, Hq, T], the lowest number where the state is empty, and the states.
    """
    dim = q.shape[-1]
    if not GATES[spec.gate].fades:
        gate_logits = None
    heads = keys.shape[1] if gate_logits is None else gate_logits.shape[1]  # of query heads where their decays differ
    keys, values = (_for_heads(x.float(), heads) for x in (keys, values))
    there = _for_heads(there, heads).unsqueeze(-1)
    one = there.to(keys.dtype)
    values = torch.cat([values, torch.ones_like(one)], dim=-1) * one
    reading = q.float() * scaling
    if gate_logits is None:
        before = values.new_zeros(*values.shape[:2], dim + 1, dim + 1) if states is None else states[0]
        read, state = chunk_sum(reading, keys, values, before[:, :, :dim])
        read = read.unflatten(1, (heads, -1))
        sums = values.cumsum(2) + before[:, :, dim:]
        states = (torch.cat([state, sums[:, :, -1:] if q.shape[2] else before[:, :, dim:]], dim=2),)
        sums = sums.unsqueeze(2)
    else:
        # One more query for each state reads the row of the ones: the sum of the values, and the number of tokens.
        keys = torch.cat([keys * one, one], dim=-1)
        reading = torch.nn.functional.pad(reading, (0, 1)).unflatten(1, (heads, -1))
        counting = torch.nn.functional.pad(torch.zeros_like(reading[:, :, :1, :, :dim]), (0, 1), value=1.0)
        reading = torch.cat([reading, counting], dim=2).flatten(1, 2)
        inputs = RecurrenceInputs(reading, keys, values, _log_decay(gate_logits, there, spec))
        read, states = recurrence(GATES[spec.gate].rule, inputs, states, spec.backend)
        read = read.unflatten(1, (heads, -1))
        read, sums = read[:, :, :-1], read[:, :, -1:]

    count = sums[..., dim:] if gate_logits is not None else sums[..., dim:].detach()  # nothing fades: a whole number
    empty = count <= 0
    count = count.masked_fill(empty, 1.0)
    share = count.reciprocal()
    mean_value, read = sums[..., :dim] * share, read * share
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
    each = 1 if gate_logits is None else max(gate_logits.shape[1] // values.shape[1], 1)
    count = sum(spec.rest_by_head(values.shape[1])) * each
    width = values.shape[-1] + 1
    return (values.new_zeros(values.shape[0], count, width, width, dtype=torch.float32),)


def counted_states(states: tuple, tokens, sizes, spec) -> tuple:
    """The states with the number of tokens in them, which a step leaves out where nothing fades. tokens [B], sizes
    [Hkv]: how many were read, and how many the head's exact memory holds."""
    if GATES[spec.gate].fades:
        return states
    heads = chosen_heads(spec.rest_by_head(len(sizes)), tokens.device)
    number = (tokens.unsqueeze(1) - (sizes if heads is None else sizes[heads])).clamp_min(0).to(states[0].dtype)
    state = states[0].clone()
    state[:, :, -1, -1] = number
    return (state,)


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


def step_rest(q, plain_q, evicted, evicts, decay_logits, state, mass, slope, spec, scaling: float, heads, counted):
    """Attention of one token to the rest state alone, which is written to, for the heads that have one.

    Args:
        q: [B, Hkv, G, D], after RoPE. plain_q: before it.
        evicted: [B, Hkv, 2, D], keys and values that enter the state, zero where nothing does.
        evicts: [B, Hkv] bool, where something does; None where what does not is zero and the state does not fade.
        decay_logits: [B, Hkv or Hq, 1, 1], the gate's, or None where the state does not fade.
        state: [B, h, D + 1, D + 1]. mass: [Hq, D + 3]. slope: [Hq].
        heads: of `chosen_heads`.
        counted: as `state_counts` gives them, of these heads, for a state that does not fade; else the number is the
            state's own.
    Returns:
        o [B, h, g, D] and lse [B, h, g, 1], for the g query heads of each state.
    """
    dim, per_query = q.shape[-1], decay_logits is not None and decay_logits.shape[1] != evicted.shape[1]
    mass, slope = (x.float().unflatten(0, (q.shape[1], -1)) for x in (mass, slope))
    if heads is not None:
        mass, slope = mass[heads], slope[heads]
        q, plain_q, evicted = (x[:, heads] for x in (q, plain_q, evicted))
        evicts = None if evicts is None else evicts[:, heads]
        if decay_logits is not None and not per_query:
            decay_logits = decay_logits[:, heads]
        elif per_query:
            decay_logits = decay_logits.unflatten(1, (-1, q.shape[2]))[:, heads].flatten(1, 2)
    if per_query:  # a state for each query head
        each = q.shape[2]
        q, plain_q = (x.flatten(1, 2).unsqueeze(2) for x in (q, plain_q))
        mass, slope = mass.flatten(0, 1).unsqueeze(1), slope.reshape(-1, 1)
        evicted, evicts = evicted.repeat_interleave(each, 1), evicts.repeat_interleave(each, 1)
    entering = torch.nn.functional.pad(evicted.float(), (0, 1), value=1.0)
    if evicts is not None:
        there = evicts[:, :, None, None]
        entering = entering * there
    if decay_logits is not None:
        state.mul_(_log_decay(decay_logits, there, spec).exp())
    state.addcmul_(entering[:, :, 0].unsqueeze(-1), entering[:, :, 1].unsqueeze(-2))
    if counted is None:
        counted = state_counts(state[:, :, dim:, dim:], q.shape[2], scaling)
    number, log_count, one, over = counted

    mean = state / number
    means, rows = mean.flatten(0, 1), (*q.shape[:3], dim + 1)
    root = scaling**0.5  # what is read is times 1 / root, as the query before RoPE is
    read = torch.baddbmm(means[:, dim:], q.flatten(0, 1).float(), means[:, :dim], beta=0, alpha=root).view(rows)
    mean_value, mean_logit = mean[:, :, dim:, :dim], read[..., dim:]
    covariance = torch.addcmul(read[..., :dim], mean_logit, mean_value, value=-1)
    output = torch.addcmul(mean_value, slope.unsqueeze(-1), covariance, value=root)
    terms = torch.cat([one, mean_logit, over, plain_q.float()], dim=-1).view(-1, 1, dim + 3)
    mass = mass.expand(len(q), *mass.shape).reshape(-1, dim + 3, 1)
    lse = torch.baddbmm(log_count, terms, mass, alpha=root).view(*rows[:3], 1)
    return output, lse


def state_counts(number, queries: int, scaling: float):
    """What `step_rest` reads of the number of tokens in a state, [B, h, 1, 1], for its g query heads.

    Returns:
        the number, at least 1; its logarithm, the lowest number where there are no tokens, [B * h * g, 1, 1]; the first
        and the third of the mass's terms, over the square root of the scaling, [B, h, g, 1].
    """
    empty, number = number <= 0, number.clamp_min(1.0)
    log_count = number.log()
    one = torch.full_like(log_count, scaling**-0.5)
    hidden = log_count.masked_fill(empty, torch.finfo(torch.float32).min)
    rows = (*number.shape[:2], queries, 1)
    return number, hidden.expand(rows).reshape(-1, 1, 1), one.expand(rows), ((log_count - LOG_COUNT) * one).expand(rows)


def chosen_heads(flags: tuple[bool, ...], device):
    """The heads with a rest state: None for all, a slice where they lie evenly, else their indices."""
    if all(flags):
        return None
    heads = [head for head, flag in enumerate(flags) if flag]
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    even = slice(heads[0], heads[-1] + 1, step)
    if list(range(len(flags)))[even] == heads:
        return even
    return rest_heads(flags, len(flags), len(flags), device)[0]
