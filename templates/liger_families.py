"""Where a family's attention differs from Llama's, as one short class each; `families.FAMILIES` names it.

Each is a `LigerAttention` that overrides how queries, keys and values are projected, normed and rotated, or how the
output is projected. The identity test (mix 0, window >= T) holds every one of them to the family's own attention.
"""

import torch

from .liger_attention import LigerAttention


class FusedProjection(LigerAttention):
    """Phi-3, Phi-4: one matrix for queries, keys and values."""

    def project(self, hidden_states):
        kv_heads = self.config.num_key_value_heads
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads.split([self.config.num_attention_heads, kv_heads, kv_heads], dim=1)


class FullWidthNorm(LigerAttention):
    """OLMo 2 and 3, OLMoE: norms over all heads together; OLMoE clips as well."""

    def project(self, hidden_states):
        q, k = self.q_norm(self.q_proj(hidden_states)), self.k_norm(self.k_proj(hidden_states))
        return self._heads(*_clipped(self.config, q, k, self.v_proj(hidden_states)))


class ClippedProjection(LigerAttention):
    """OLMo: queries, keys and values clipped to +- clip_qkv."""

    def project(self, hidden_states):
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        return self._heads(*_clipped(self.config, q, k, v))


class PartialRotary(LigerAttention):
    """StableLM: the rotary embedding turns the first `rotary_ndims` channels of a head; norms for each head."""

    def project(self, hidden_states):
        q, k, v = super().project(hidden_states)
        return (self.q_layernorm(q), self.k_layernorm(k), v) if self.qk_layernorm else (q, k, v)

    def rotate(self, q, k, position_embeddings, **kwargs):
        size = self.rotary_ndims
        turned = super().rotate(q[..., :size], k[..., :size], position_embeddings)
        return tuple(torch.cat([part, x[..., size:]], dim=-1) for part, x in zip(turned, (q, k), strict=True))


class DenseOutput(PartialRotary):
    """Phi 1 and 2: the output projection is called `dense`."""

    @property
    def output_projection(self):
        return self.dense


class RotaryWhereAsked(LigerAttention):
    """SmolLM3: layers whose `use_rope` is 0 have no rotary embedding."""

    def rotate(self, q, k, position_embeddings, **kwargs):
        return super().rotate(q, k, position_embeddings) if self.use_rope else (q, k)


class RotaryInLocalLayers(LigerAttention):
    """Cohere 2, EXAONE 4 with a sliding window: layers that see the whole text have no rotary embedding."""

    def rotate(self, q, k, position_embeddings, **kwargs):
        return super().rotate(q, k, position_embeddings) if self.local_window is not None else (q, k)


class RotaryUnlessGlobal(RotaryInLocalLayers):
    """EXAONE 4: as Cohere 2, but a model without any sliding window has the rotary embedding in every layer."""

    def rotate(self, q, k, position_embeddings, **kwargs):
        if self.config.sliding_window is None:
            return LigerAttention.rotate(self, q, k, position_embeddings)
        return super().rotate(q, k, position_embeddings)


class NormAfterRotary(LigerAttention):
    """HunYuan: norms on queries and keys after the rotary embedding; the recurrence gets them normed, too."""

    def rotate(self, q, k, position_embeddings, **kwargs):
        return self.without_positions(*super().rotate(q, k, position_embeddings))

    def without_positions(self, q, k):
        return self.query_layernorm(q), self.key_layernorm(k)


class PositionScaledQueries(LigerAttention):
    """Ministral 3: queries grow with the logarithm of their position (Llama 4's attention temperature)."""

    def rotate(self, q, k, position_embeddings, position_ids=None, **kwargs):
        q, k = super().rotate(q, k, position_embeddings)
        rope = self.config.rope_parameters
        scale = self._family_module().get_llama_4_attn_scale(
            position_ids, rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        )
        return q * scale.to(q.dtype), k


class OutputDropout(LigerAttention):
    """StarCoder2, SeedOSS: dropout on the attention's output."""

    def project_output(self, output):
        return torch.nn.functional.dropout(
            super().project_output(output), p=self.residual_dropout, training=self.training
        )


def _clipped(config, *projected):
    limit = config.clip_qkv if hasattr(config, "clip_qkv") else None
    return projected if limit is None else tuple(x.clamp(min=-limit, max=limit) for x in projected)
