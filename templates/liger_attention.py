"""Liger attention: a gated recurrence and a softmax window over one set of projections (arXiv 2503.01496, section 3).

A mixin in front of a family's own attention class. Parameter names, biases, norms, tied weights and parallel plans stay
the family's; only `forward` is new. Any layer can be run as the family's own softmax attention at any time.
"""

import sys
from contextlib import nullcontext
from functools import cache as cache_result

import torch
from transformers import Cache

from .liger_branches import (
    Settings,
    Tokens,
    by_documents,
    kernels_take_documents,
    mixed_attention,
    packed_attention,
)
from .liger_config import LayerSpec
from .liger_extras import NAMES, extra_tensors
from .liger_gates import GATES, mapped
from .liger_heads import softmax_heads, split_heads
from .liger_kept import keep_scores
from .liger_rows import (
    at_places,
    document_bounds,
    document_positions,
    documents,
    once_a_call,
    tokens_last,
    unpack_rows,
)
from .liger_transformers import (
    ALL_ATTENTION_FUNCTIONS,
    CACHE,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from .liger_window import Scoring

MODES = ("liger", "softmax", "window", "exact")
# Elements of a layer's queries from which its branches are computed again in backward: below, they keep little.
RECOMPUTED = 1 << 20


def without_autocast(device_type: str):
    """A context in which autocast does nothing: gates, scores, states and window choose their precision themselves."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _across_heads(x, weight, bias):
    """A linear map over all heads of a token together. [B, H, T, D] -> [B, H, T, D] float32"""
    flat = torch.nn.functional.linear(x.transpose(1, 2).flatten(2).float(), weight.float(), bias.float())
    return flat.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def _turned_together(q, k, position_embeddings, cache):
    """q and k after the rotary embedding that turns the first half of a head against the second."""
    cos, sin = position_embeddings
    shared = cache.shared
    if "sin" not in shared or shared["sin"][0] is not sin:
        first, second = sin.chunk(2, dim=-1)
        shared["sin"] = sin, torch.cat([-first, second], dim=-1).unsqueeze(1)
    both = torch.cat([q, k], dim=1)
    turned = torch.addcmul(both * cos.unsqueeze(1), both.roll(q.shape[-1] // 2, -1), shared["sin"][1])
    return turned.split([q.shape[1], k.shape[1]], dim=1)


@cache_result
def turns_halves(module) -> bool:
    """Whether the rotary embedding of a family's module is x cos + (-second half, first half) sin, as Llama's."""
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        x, cos, sin = torch.linspace(-1, 1, 24, device="cpu", dtype=torch.float32).sin().view(3, 1, 1, 8).unbind()
        first, second = x.chunk(2, dim=-1)
        wanted = x * cos + torch.cat([-second, first], dim=-1) * sin
        try:
            found = module.apply_rotary_pos_emb(x.unsqueeze(1), x.unsqueeze(1), cos, sin)
        except Exception:  # it takes something else
            return False
        return all(one.shape == (1, 1, 1, 8) and torch.equal(one[0], wanted) for one in found)


class LigerAttention:
    """Mixed in before the family's attention class; `LigerDecoder.linearize` puts it in its place.

    Attributes:
        liger_spec: the layer's `LayerSpec`.
        liger_mode: `liger`; `softmax` (the family's own attention); `window` (the recurrent branch off, the window's
            coefficient 1, no tokens kept by score, softmax heads kept: the control that shows what the rest is worth);
            `exact` (kept tokens, too: all but the recurrent branch and the rest state).

    Parameters of its own it has only where the spec asks for them: see `liger_extras.extra_tensors`.
    """

    liger_spec: LayerSpec
    liger_mode: str
    gradient_checkpointing = False  # transformers sets it where whole decoder layers are computed again in backward

    def add_extra_parameters(self) -> None:
        """Make the parameters that the spec asks for, at their initial values."""
        for name, extra in self._extras().items():
            setattr(self, name, torch.nn.Parameter(torch.empty(extra.shape, dtype=torch.float32)))
            self.init_extra_parameter(name)

    @torch.no_grad()
    def init_extra_parameter(self, name: str) -> None:
        """Fill one of them with its initial value."""
        parameter, extra = getattr(self, name), self._extras()[name]
        if extra.init == "normal":
            parameter.normal_(0.0, extra.width)
        elif extra.init == "uniform":
            parameter.uniform_(-extra.width, extra.width)
        elif isinstance(extra.init, str):
            parameter.copy_(getattr(self, extra.init))
        elif isinstance(extra.init, tuple):
            parameter.copy_(torch.tensor(extra.init))
        else:
            parameter.fill_(extra.init)

    def _apply(self, fn, recurse=True):
        """As torch's, but `to`, `half` and `bfloat16` leave the parameters of its own in float32."""
        exact = {name: self._parameters[name].detach() for name in NAMES if name in self._parameters}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._parameters[name]
            if after.dtype in (torch.float16, torch.bfloat16):
                gradient, after.grad = after.grad, None
                after.data = before.to(after.device, torch.float32)
                after.grad = None if gradient is None else gradient.float()
        return self

    def _extras(self):
        config = self.config
        heads = (config.num_attention_heads, self._num_key_value_heads)
        return extra_tensors(self.liger_spec, config.hidden_size, *heads, self.head_dim)

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

    @property
    def liger_mix(self) -> float:
        """The recurrent branch's coefficient in use: 0 in the modes without it and beside a rest state, 1 where there
        is no window branch."""
        if self.liger_mode != "liger" or self.liger_spec.rest:
            return 0.0
        return self.liger_spec.mix if self.liger_window > 0 else 1.0

    @property
    def liger_kept(self) -> int | tuple[int, ...]:
        """Tokens kept by score, of each key/value head where they differ: none in `window` mode, in a layer whose base
        never looked beyond its own window, or where the recurrence is all there is."""
        if self.liger_mode not in ("liger", "exact") or self.local_window is not None or self.liger_mix == 1:
            return 0
        return self.liger_spec.kept

    @property
    def liger_rest(self) -> bool:
        """Whether a rest state is in use: never in a layer whose base never looked beyond its own window."""
        in_use = self.liger_mode == "liger" and self.local_window is None
        return in_use and any(self.liger_spec.rest_by_head(self._num_key_value_heads))

    @property
    def _num_key_value_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        """hidden_states [B, T, D_model] -> the same shape, and None for the attention weights of a Liger layer.

        The model's cache comes by either name, as transformers has it.
        """
        padding, starts, told = unpack_rows(attention_mask)
        model_cache = past_key_values if cache is None else cache
        if not self.keeps_state:
            positions = None if starts is None else document_positions(starts)  # all that they say of a mask
            make = lambda: self._softmax_mask(hidden_states, padding, model_cache, positions)  # noqa: E731
            mask = once_a_call(attention_mask, f"mask {self.local_window} {hidden_states.device}", make)
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                **{CACHE: model_cache},
                **kwargs,
            )
        length = hidden_states.shape[1]
        valid = None if padding is None or told else padding[:, -length:]
        order = None if valid is None or length == 1 else tokens_last(valid)
        if order is not None:
            # Window, sinks and kept tokens count tokens: padding goes to the front, where nothing looks.
            hidden_states, valid = at_places(hidden_states, order), at_places(valid, order)
            position_embeddings = tuple(at_places(x, order) for x in position_embeddings)
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = at_places(kwargs["position_ids"], order)
        cache = None if model_cache is None else model_cache.layers[self.layer_idx]
        q, k, v = self.project(hidden_states)
        if self._turns_together(cache, length, position_embeddings):
            rotated_q, rotated_k = _turned_together(q, k, position_embeddings, cache)
        else:
            rotated_q, rotated_k = self.rotate(q, k, position_embeddings, **kwargs)
        # Under autocast norms and rotary embeddings give float32: the window works in the projections' dtype.
        rotated_q, rotated_k = rotated_q.to(v.dtype), rotated_k.to(v.dtype)

        found: list[torch.Tensor] = []

        def within_window():
            # The whole text lies in the window: the family's own attention, bit for bit.
            if not found:
                mask = self._softmax_mask(hidden_states, valid, None, None)
                found.append(self._family_attention(rotated_q, rotated_k, v, mask, kwargs))
            return found[0]

        plain_q, plain_k = self.without_positions(q, k)
        with without_autocast(hidden_states.device.type):
            gate = self._gate_logits(hidden_states, plain_q, plain_k, v) if self._fades else None
            scores = keep_scores(plain_k, self.keep_score) if self.liger_kept else None
            if self.liger_spec.positions == "rope":
                plain_q, plain_k = rotated_q, rotated_k
            features = self._features(plain_q, plain_k, position_embeddings, **kwargs)
            tokens = Tokens(*features, v, rotated_q, rotated_k, gate, scores)
            settings = self._settings(recompute=self.training and q.numel() >= RECOMPUTED)

            def attend(function, tokens, settings, within_window):
                if starts is None:
                    return function(tokens, settings, valid, cache, within_window)
                if function is mixed_attention and kernels_take_documents(tokens, settings):
                    return packed_attention(tokens, settings, document_bounds(attention_mask))
                return by_documents(documents(attention_mask), tokens, lambda part: function(part, settings))

            if not self.liger_spec.softmax_kv_heads:
                output = attend(mixed_attention, tokens, settings, within_window)
            else:
                output = v.new_empty(*hidden_states.shape[:2], q.shape[1], v.shape[-1])
                parts = split_heads(self.liger_spec, k.shape[1], q.shape[1] // k.shape[1], q.device)
                for function, (spec, heads, queries) in zip((softmax_heads, mixed_attention), parts, strict=True):
                    part = (tokens.of_heads(heads, queries), settings.of_heads(spec, queries))
                    output[:, :, queries] = attend(function, *part, lambda at=queries: within_window()[:, at])
        output = output if order is None else at_places(output, order.argsort(dim=1))
        return self.project_output(output.flatten(2)), None

    def cache_settings(self) -> dict:
        """What a `LigerCacheLayer` of this layer holds."""
        spec, scored = self.liger_spec, bool(self.liger_kept or self.liger_rest)
        beyond: int | tuple[int, ...] = spec.sinks
        if scored:
            every = tuple(count + spec.sinks for count in spec.kept_by_head(self._num_key_value_heads))
            beyond = every if len(set(every)) > 1 else every[0]
        if self.liger_window == 0 or self.liger_mix == 1:  # which looks at no token
            return {"window": 0, "local_window": self.local_window}
        return {"window": self.liger_window, "beyond": beyond, "scored": scored, "local_window": self.local_window}

    @property
    def _fades(self) -> bool:
        """Whether anything reads the gate's logits."""
        return self.liger_mix > 0 or (self.liger_rest and GATES[self.liger_spec.gate].fades)

    def _turns_together(self, cache, length: int, position_embeddings) -> bool:
        """Whether one rotation of queries and keys is the family's of each: in a step, where what counts is how many
        operations there are."""
        if cache is None or length != 1 or torch.is_grad_enabled() or type(self).rotate is not LigerAttention.rotate:
            return False
        return position_embeddings[0].shape[-1] == self.head_dim and self.turns_halves

    def _settings(self, recompute: bool) -> Settings:
        spec = self.liger_spec
        return Settings(
            spec=spec,
            window=self.liger_window,
            mix=self.liger_mix,
            scoring=Scoring(self.scaling, self._softcap(), getattr(self, "sinks", None), self._dropout()),
            scales=self._scales(),
            key_map=self.feature_k.float() if spec.feature_params == "learned" else None,
            rest=(self.rest_mass, self.rest_slope) if self.liger_rest else None,
            local_window=self.local_window,
            recompute=recompute and not self.gradient_checkpointing,
        )

    def project(self, hidden_states):
        """Queries [B, Hq, T, D], keys and values [B, Hkv, T, D], normed where the family does, before RoPE."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q.view(shape)), self.k_norm(k.view(shape))
        return self._heads(q, k, v)

    def _heads(self, *projected):
        """[B, T, H * D] or [B, T, H, D] -> [B, H, T, D], each."""
        return tuple(x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in projected)

    def rotate(self, q, k, position_embeddings, **kwargs):
        """q and k after the family's own rotary embedding, as its attention function takes them."""
        cos, sin = position_embeddings
        return self._family_module().apply_rotary_pos_emb(q, k, cos, sin)

    def without_positions(self, q, k):
        """q and k of `project` as the recurrence takes them."""
        return q, k

    def _gate_logits(self, hidden_states, q, k, v):
        """The gate's logits [B, Hkv, T, W]: pooled from a projection, learned from the hidden state, or their sum;
        [B, Hq, T, W] where query heads of a group differ."""
        spec, gate = self.liger_spec, GATES[self.liger_spec.gate]
        if gate.per_query_head:
            return gate.pool(q, spec)
        learned = spec.gate_params == "learned"
        if learned:
            low = hidden_states.float() @ self.gate_down.float().T
            logits = torch.einsum("btr,hwr->bhtw", low, self.gate_up.float()) + self.gate_bias.float()[:, None]
            if spec.gate_init == "random":
                return logits
        source = {"k": k, "v": v, "q": q}[spec.gate_source]
        if spec.gate_source == "q":
            source = q.unflatten(1, (k.shape[1], -1)).float().mean(2)
        pooled = gate.pool(source, spec)
        return pooled + logits if learned else pooled

    def _features(self, q, k, position_embeddings, **kwargs):
        """q and k as the recurrence's gate takes them, but for the keys' map for each head: a key that enters the
        recurrence later is mapped then. [B, H, T, D] -> [B, H, T, F or D]"""
        spec = self.liger_spec
        if spec.feature_params == "learned":
            q = q.float() @ self.feature_q.float().mT
        elif spec.feature_params == "dense":
            shared = q.shape[1] == k.shape[1]
            weight, bias = (self.feature_q, self.feature_q_bias) if shared else (self.feature_k, self.feature_k_bias)
            q = _across_heads(q, self.feature_q, self.feature_q_bias)
            k = _across_heads(k, weight, bias)
        if spec.positions == "after":
            q, k = self.rotate(mapped(q, spec), mapped(k, spec), position_embeddings, **kwargs)
        return q, k * self.head_dim**-0.5 if spec.feature_params == "dense" else k

    def _scales(self):
        """The coefficients of both branches, [Hq] each; None where `mix` decides or a branch is off."""
        spec = self.liger_spec
        if self.liger_mode in ("window", "exact") or (spec.mix == 1 and self.liger_window > 0):
            return None
        if spec.normalizer == "joint-max" and spec.mix > 0:
            factor = self.window_factor.sigmoid()
            return torch.ones_like(factor), factor
        return (self.grm_scale, self.swa_scale) if spec.branch_scales else None

    @property
    def output_projection(self) -> torch.nn.Module:
        """The layer's last linear map."""
        return self.o_proj

    def project_output(self, output):
        """[B, T, Hq * D] -> [B, T, D_model]"""
        return self.output_projection(output)

    def _family_module(self):
        """The module of transformers that the family's attention class is from."""
        return next(
            sys.modules[one.__module__] for one in type(self).__mro__ if one.__module__.startswith("transformers.")
        )

    def _dropout(self) -> float:
        """Of the window's softmax weights, as the family has it: in training only."""
        return self.attention_dropout if self.training else 0.0

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
        output, _ = attend(self, q, k, v, mask, dropout=self._dropout(), scaling=self.scaling, **extra)
        return output.transpose(1, 2)

    def _softmax_mask(self, hidden_states, padding, cache, position_ids):
        """The mask that the family's model would have made for this layer."""
        layer = None if cache is None else Cache(layers=[cache.layers[self.layer_idx]])
        make = create_causal_mask if self.local_window is None else create_sliding_window_causal_mask
        return make(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=padding,
            position_ids=position_ids,
            **{CACHE: layer},
        )
