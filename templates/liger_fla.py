"""fla's kernels, called as the functions of `liger_recurrence` are. fla itself is not imported here.

fla's layout is [B, T, H, D], its scale has to be given, and but for gated slot attention it wants a key head for every
query head. Over a text keys, values and decays are repeated to the query heads, which costs the work on the states once
for each but keeps the heads parallel. In a one-token step, which is bound by reading the state, they are not: the query
heads of a group come one after another as tokens of one text, the later ones with nothing to write and no decay.
"""

from functools import partial

import torch
from torch.nn.functional import pad

from .liger_rules import Rule

# exp of anything lower is 0 in float32; the running sums of fla's kernels would lose digits over it.
LOWEST_LOG_DECAY = -104.0
# Head dimensions are padded to a multiple: fla's backward kernels need even ones, a column of ones makes them odd.
MULTIPLE = 16


def adapted(rule: Rule, chunk, step, step_decay: str, dtype):
    """A chunked and a step function of fla with the arguments and results of the rule's own.

    Args:
        chunk, step: fla's functions.
        step_decay: the argument by which `step` takes the log decay.
        dtype: of queries, keys and values in `chunk`; steps are float32.
    """
    if rule.by_slot:
        return partial(_slots_chunk, rule, chunk, dtype), partial(_slots_step, rule, step)
    return partial(_chunk, rule, chunk, dtype), partial(_step, rule, step, step_decay)


def _chunk(rule, kernel, dtype, q, k, v, log_decay, *more, bounds=None):
    """`more`: the rule's other inputs, and the initial state or None, which may be left out. `bounds`: [N + 1], where
    the documents of a batch of one begin, and its end; there are no states behind them."""
    if q.numel() == 0:
        return rule.forms.chunk(q, k, v, log_decay, *more)
    extra, state = more[: len(rule.inputs)], _padded_state(more[-1] if len(more) > len(rule.inputs) else None)
    groups, width = q.shape[1] // k.shape[1], v.shape[-1]
    inputs = {"k": _padded(k).to(dtype), "v": _padded(v).to(dtype), "g": _gate(log_decay)}
    inputs |= {name: x.squeeze(-1) for name, x in zip(rule.inputs, extra, strict=True)}
    inputs = {name: x.transpose(1, 2).repeat_interleave(groups, dim=2) for name, x in inputs.items()}
    output, final = kernel(
        q=_padded(q).to(dtype).transpose(1, 2),
        **inputs,
        scale=1.0,
        initial_state=None if state is None else state.repeat_interleave(groups, dim=1),
        **_of_documents(bounds),
    )
    output = output[..., :width].transpose(1, 2).to(q.dtype)
    return output, None if bounds is not None else final[:, ::groups, : k.shape[-1], :width]


def _of_documents(bounds) -> dict:
    return {"output_final_state": True} if bounds is None else {"output_final_state": False, "cu_seqlens": bounds}


def _step(rule, kernel, decay_name, q, k, v, log_decay, *more):
    if _needs_grad(q, k, v, log_decay, *more):  # fla's steps by the delta rule have no gradient
        return rule.forms.step(q, k, v, log_decay, *more)
    *extra, state = more
    groups, width = q.shape[1] // k.shape[1], v.shape[-1]
    inputs = {"k": _padded(k), "v": _padded(v), decay_name: _gate(log_decay)}
    inputs |= {name: x.squeeze(-1) for name, x in zip(rule.inputs, extra, strict=True)}
    inputs = {name: pad(x.transpose(1, 2), (0, 0) * (x.ndim - 2) + (0, groups - 1)) for name, x in inputs.items()}
    output, final = kernel(
        q=_padded(q).unflatten(1, (-1, groups)).squeeze(3).transpose(1, 2),
        **inputs,
        scale=1.0,
        initial_state=_padded_state(state),
        output_final_state=True,
    )
    output = output[..., :width].transpose(1, 2).flatten(1, 2).unsqueeze(2)
    return output.to(q.dtype), final[:, :, : k.shape[-1], :width]


def _slots_chunk(rule, kernel, dtype, q, k, v, log_decay, write, initial_state=None, bounds=None):
    """The kernel is given the key heads as they are."""
    if q.numel() == 0:
        return rule.forms.chunk(q, k, v, log_decay, write, initial_state)
    output, states = kernel(
        q=_padded(q).to(dtype).transpose(1, 2),
        k=_padded(k).to(dtype).transpose(1, 2),
        v=_padded(v).to(dtype).transpose(1, 2),
        s=write.to(dtype).transpose(1, 2),
        g=log_decay.clamp_min(LOWEST_LOG_DECAY).transpose(1, 2),
        scale=1.0,
        initial_state=_padded_pair(initial_state),
        **_of_documents(bounds),
    )
    output = output[..., : v.shape[-1]].transpose(1, 2).to(q.dtype)
    if bounds is not None:
        return output, None
    keys, values = states
    return output, (keys[:, :, : k.shape[-1]], values[..., : v.shape[-1]])


def _slots_step(rule, kernel, q, k, v, log_decay, write, states):
    if _needs_grad(q, k, v, log_decay, write, *states):
        return rule.forms.step(q, k, v, log_decay, write, states)
    inputs = (x.detach() for x in (q, k, v, log_decay, write))
    return _slots_chunk(rule, kernel, q.dtype, *inputs, states)


def _needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _padded(x):
    """Zeros behind the last dimension, up to a multiple."""
    extra = -x.shape[-1] % MULTIPLE
    return pad(x, (0, extra)) if extra else x


def _gate(log_decay):
    """[B, H, T, K], padded, or [B, H, T] where a head has one decay."""
    log_decay = log_decay.clamp_min(LOWEST_LOG_DECAY)
    return log_decay.squeeze(-1) if log_decay.shape[-1] == 1 else _padded(log_decay)


def _padded_state(state):
    """[B, H, K, V] with both sizes up to a multiple; the added rows and columns stay zero."""
    if state is None:
        return None
    rows, columns = (-size % MULTIPLE for size in state.shape[-2:])
    return pad(state, (0, columns, 0, rows)) if rows or columns else state


def _padded_pair(states):
    """The states of gated slot attention, [B, H, K, M] and [B, H, M, V]; the slots are a multiple already."""
    return None if states is None else tuple(_padded_state(state) for state in states)
