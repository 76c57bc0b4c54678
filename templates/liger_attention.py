"""Liger attention: a gated recurrence and a softmax window over one set of projections (arXiv 2503.01496, section 3).

A mixin in front of a family's own attention class. Parameter names, biases, norms, tied weights and parallel plans stay
the family's; only `forward` is new. Any layer can be run as the family's own softmax attention at any time.
"""

import sys

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .liger_cache import LigerCacheLayer, first_tokens
from .liger_config import LayerSpec
from .liger_gates import GATES
from .liger_recurrence import chunk_decay, chunk_delta, chunk_slots, step_decay, step_delta, step_slots
from .liger_window import window_attention

MODES = ("liger", "softmax", "window")
RULES = {
    "decay": (chunk_decay, step_decay),
    "delta": (chunk_delta, step_delta),
    "slots": (chunk_slots, step_slots),
}


def pack_padding(attention_mask):
    """Carry a [B, S] padding mask, or None, past the family's mask code: a 4-D mask is handed on as it is."""
    if attention_mask is None:
        return torch.ones(1, 1, 1, 0, dtype=torch.bool)
    return attention_mask.bool()[:, None, None, :]


def unpack_padding(attention_mask):
    """The inverse of `pack_padding`; None where nothing is padded."""
    if attention_mask is None or attention_mask.shape[-1] == 0:
        return None
    return attention_mask[:, 0, 0, :]


class LigerAttention:
    """Mixed in before the family's attention class by `liger_model.linearize`.

    Attributes:
        liger_spec: the layer's `LayerSpec`.
        liger_mode: `liger`; `softmax` (the family's own attention); `window` (the recurrent branch off, the window's
            coefficient 1: the control that shows what the recurrence is worth).
    """

    liger_spec: LayerSpec
    liger_mode: str

    @property
    def keeps_state(self) -> bool:
        """Whether this layer runs on a `LigerCacheLayer`."""
        return self.liger_spec.kind == "liger" and self.liger_mode != "softmax"

    @property
    def local_window(self) -> int | None:
        """The base's own sliding window in this layer, or None."""
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is not None and layer_types[self.layer_idx] == "full_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    @property
    def liger_window(self) -> int:
        """The window in use: the layer's, but never more than the base's own."""
        return min(self.liger_spec.window, self.local_window or self.liger_spec.window)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values: Cache | None = None,
        **kwargs,
    ):
        """hidden_states [B, T, D_model] -> the same shape, and None for the attention weights of a Liger layer."""
        padding = unpack_padding(attention_mask)
        if not self.keeps_state:
            mask = self._softmax_mask(hidden_states, padding, past_key_values, kwargs.get("position_ids"))
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        length = hidden_states.shape[1]
        valid = None if padding is None else padding[:, -length:]
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        q, k, v = self.project(hidden_states)
        rotated_q, rotated_k = self.rotate(q, k, position_embeddings)
        mix = 0.0 if self.liger_mode == "window" else self.liger_spec.mix
        recurrent = self._recurrent_branch(q, k, v, valid, cache) if mix > 0 else None
        window = self._window_branch(hidden_states, rotated_q, rotated_k, v, valid, cache, kwargs) if mix < 1 else None
        if window is None and cache is not None:
            cache.update(rotated_k, v, valid)
        if recurrent is None:
            output = window
        elif window is None:
            output = (mix * recurrent).to(v.dtype)
        else:
            output = (mix * recurrent + (1 - mix) * window.float()).to(v.dtype)
        return self.project_output(output.transpose(1, 2).flatten(2)), None

    def project(self, hidden_states):
        """Queries [B, Hq, T, D], keys and values [B, Hkv, T, D], normed where the family does, before RoPE."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def rotate(self, q, k, position_embeddings):
        """q and k after the family's own rotary embedding."""
        cos, sin = position_embeddings
        return self._family_module().apply_rotary_pos_emb(q, k, cos, sin)

    def project_output(self, output):
        """[B, T, Hq * D] -> [B, T, D_model]"""
        return self.o_proj(output)

    def _family_module(self):
        return sys.modules[self.liger_family_attention.__module__]

    def _recurrent_branch(self, q, k, v, valid, cache):
        """The gated recurrence in float32. [B, Hq, T, D]"""
        spec = self.liger_spec
        gate = GATES[spec.gate]
        q, k, v = q.float(), k.float(), v.float()
        source = {"k": k, "v": v, "q": q}[spec.gate_source]
        if spec.gate_source == "q":
            source = q.unflatten(1, (k.shape[1], -1)).mean(2)
        denominator = gate.denominator or (spec.normalizer if spec.normalizer != "none" else None)
        values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if denominator else v
        inputs = gate.inputs(q, k, values, source, spec)
        if valid is not None:
            inputs = inputs.masked(valid)
        initial = None if cache is None else cache.states
        chunk, step = RULES[gate.rule]
        arguments = [inputs.q, inputs.k, inputs.v, inputs.log_decay]
        if gate.rule != "decay":
            arguments.append(inputs.beta if gate.rule == "delta" else inputs.write)
        if initial is not None and gate.rule != "slots":
            (initial,) = initial
        if q.shape[2] == 1 and initial is not None:
            output, states = step(*arguments, initial)
        else:
            output, states = chunk(*arguments, initial)
        if cache is not None:
            cache.states = states if gate.rule == "slots" else (states,)
        if denominator:
            output, total = output[..., :-1], output[..., -1:]
            # max1: mLSTM (arXiv 2405.04517, eq. 21). running: nothing was written yet where the sum is 0.
            floor = 1.0 if denominator == "max1" else torch.finfo(output.dtype).tiny
            output = output / total.abs().clamp_min(floor)
        return output

    def _window_branch(self, hidden_states, q, k, v, valid, cache, kwargs):
        """Softmax attention over the last tokens, in the model's dtype. [B, Hq, T, D]"""
        spec, window = self.liger_spec, self.liger_window
        past = 0 if cache is None else cache.get_seq_length()
        sinks = None
        if spec.sinks:
            sinks = self._sinks(k, v, valid, cache, past)
        new_k, new_v = k, v
        if cache is not None:
            k, v, valid = cache.update(k, v, valid)
        if past == 0 and q.shape[2] <= window:
            # The whole text lies in the window: the family's own attention, bit for bit.
            mask = self._softmax_mask(hidden_states, valid, None, None)
            return self._family_attention(q, new_k, new_v, mask, kwargs)
        output, _ = window_attention(
            q, k, v, window, self.scaling, valid, self._softcap(), getattr(self, "sinks", None), sinks
        )
        return output

    def _sinks(self, k, v, valid, cache, past: int):
        if cache is not None:
            keys, values, positions = cache.update_sinks(k, v, valid)
        else:
            positions = torch.arange(k.shape[2], device=k.device)[None].expand(k.shape[0], -1)
            if valid is not None:
                positions = positions.masked_fill(~valid, LigerCacheLayer.EMPTY)
            keys, values, positions = first_tokens(k, v, positions, self.liger_spec.sinks)
        age = torch.where(positions >= 0, past - positions, LigerCacheLayer.EMPTY)
        return keys, values, age

    def _softcap(self):
        return getattr(self, "attn_logit_softcapping", None)

    def _family_attention(self, q, k, v, mask, kwargs):
        """The family's attention function on rotated queries and keys. [B, Hq, T, D]"""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self._family_module().eager_attention_forward
        )
        extra = {name: value for name, value in kwargs.items() if name not in ("position_ids", "use_cache")}
        if self.local_window is not None:
            extra["sliding_window"] = self.local_window
        if self._softcap() is not None:
            extra["softcap"] = self._softcap()
        if hasattr(self, "sinks"):
            extra["s_aux"] = self.sinks
        output, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **extra)
        return output.transpose(1, 2)

    def _softmax_mask(self, hidden_states, padding, past_key_values, position_ids):
        """The mask that the family's model would have made for this layer."""
        layer = None if past_key_values is None else Cache(layers=[past_key_values.layers[self.layer_idx]])
        make = create_causal_mask if self.local_window is None else create_sliding_window_causal_mask
        return make(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=padding,
            past_key_values=layer,
            position_ids=position_ids,
        )
