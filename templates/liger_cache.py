"""The cache layer of a Liger attention layer, and how it gets into transformers' own caches.

transformers builds its caches from the base's `layer_types`, which know nothing of Liger's window. So the model swaps
its own layers in on first touch, in a DynamicCache or StaticCache alike; the memory of a layer is constant.
"""

import torch
from transformers import Cache, DynamicCache

from .liger_rows import at_places, tokens_last
from .liger_transformers import CacheLayerMixin, DynamicLayer


class LigerCacheLayer(CacheLayerMixin):
    """The last keys and values, the first `sinks` ones, those kept by score, and the recurrent states of one layer.

    Softmax heads inside the layer are apart from these: all their keys and values. Hkv counts the other heads.

    Attributes:
        keys, values: [B, Hkv, <= window - 1, D], after RoPE, oldest first. `window` is that of the layer, or one more
            where a token that leaves it is still needed: it may be kept, or enter the recurrence.
        valid: [B, <= window - 1] bool, false at padding; None while no padding was seen.
        sink_keys, sink_values: [B, Hkv, sinks, D]; sink_positions: [B, sinks] int64, which token each is, EMPTY where
            none. None where tokens are kept: then the sinks are among those.
        kept: keys, values [B, Hkv, sinks + kept, D] and priorities [B, Hkv, sinks + kept] int64 of the sinks and kept
            tokens, and the gate's logits where they go with a token into the rest state; as many such tensors for each
            group of heads where they keep different numbers (see `liger_kept.head_groups`). None before the first
            update.
        window_priority: [B, Hkv, <= window - 1] int64, of the tokens of `keys`, or None. window_logits: of the gate,
            float32, or None.
        tokens: [B] int64, tokens seen but for padding; None while no padding was seen, or where nothing asks for it.
        states: the float32 states of the gate, [B, Hkv, K, V] each, or None before the first token.
        softmax_keys, softmax_values: [B, heads, S, D] of the softmax heads, after RoPE, S tokens so far; None where the
            layer has none. softmax_valid: [B, S] bool, None while no padding was seen.
    """

    is_sliding = True
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    EMPTY = -(2**40)
    TENSORS = (
        *("keys", "values", "valid", "sink_keys", "sink_values", "sink_positions"),
        *("softmax_keys", "softmax_values", "softmax_valid"),
        *("window_priority", "window_logits", "tokens"),
    )

    def __init__(self, window: int, sinks: int = 0, local_window: int | None = None):
        """`local_window` is the base's own window in this layer, beyond which its softmax heads need nothing."""
        super().__init__()
        self.window = window
        self.sinks = sinks
        self.local_window = local_window
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next update starts a new text."""
        self.keys = self.values = self.valid = None
        self.softmax_keys = self.softmax_values = self.softmax_valid = None
        self.sink_keys = self.sink_values = self.sink_positions = None
        self.states = self.kept = self.window_priority = self.window_logits = self.tokens = None
        self.cumulative_length = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shapes, dtype and device from the first keys. [B, Hkv, T, D]"""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        if self.sinks:
            batch, heads, _, dim = key_states.shape
            self.sink_keys = key_states.new_zeros(batch, heads, self.sinks, dim)
            self.sink_values = value_states.new_zeros(batch, heads, self.sinks, value_states.shape[-1])
            self.sink_positions = torch.full((batch, self.sinks), self.EMPTY, device=self.device)
        self.is_initialized = True

    def update(self, key_states, value_states, valid=None, priority=None, logits=None):
        """Append T tokens to the window.

        Args:
            key_states, value_states: [B, Hkv, T, D].
            valid: [B, T] bool, false at padding, or None.
            priority: [B, Hkv, T], or None where no tokens are kept by their score. logits: [B, Hkv, T], of the gate, or
                None where they do not go with a token.
        Returns:
            keys and values [B, Hkv, P + T, D], valid [B, P + T] or None, priority and logits [B, Hkv, P + T] or None:
            the P tokens held so far, then the new; where there is new padding, all padding first.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = (self.keys, self.values, self.window_priority, self.window_logits)
        new = (key_states, value_states, priority, logits)
        (keys, values, priority, logits), valid = _appended(before, new, self.valid, valid)
        self.cumulative_length += key_states.shape[2]
        first = max(keys.shape[2] - max(self.window - 1, 0), 0)
        # A slice would keep the whole text's keys alive; after a step that is one token.
        step = key_states.shape[2] == 1
        last = lambda x: None if x is None else x[:, :, first:] if step else x[:, :, first:].clone()  # noqa: E731
        self.keys, self.values, self.window_priority, self.window_logits = map(last, (keys, values, priority, logits))
        self.valid = None if valid is None else valid[:, first:].clone()
        return keys, values, valid, priority, logits

    def update_sinks(self, key_states, value_states, places):
        """Fill free sink slots with the first tokens that are not padding. Call before `update`.

        Args:
            key_states, value_states: [B, Hkv, T, D].
            places: [B, T], which tokens of the text these are; EMPTY at padding.
        Returns:
            sink keys and values [B, Hkv, N, D] and their places [B, N] (EMPTY where there is none).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.sink_keys, self.sink_values, self.sink_positions = first_tokens(
            torch.cat([self.sink_keys, key_states], dim=2),
            torch.cat([self.sink_values, value_states], dim=2),
            torch.cat([self.sink_positions, places], dim=1),
            self.sinks,
        )
        return self.sink_keys, self.sink_values, self.sink_positions

    def places(self, valid, like):
        """Count T tokens. Call before `update`.

        Args:
            valid: [B, T] bool, false at padding, or None.
            like: [B, Hkv, T], of the same tokens.
        Returns:
            [B or 1, T], which tokens of the text they are, from 0.
        """
        batch, _, length = like.shape
        if valid is None and self.tokens is None:
            return torch.arange(length, device=like.device)[None] + self.cumulative_length
        there = torch.ones(batch, length, dtype=torch.bool, device=like.device) if valid is None else valid
        before = self.cumulative_length if self.tokens is None else self.tokens[:, None]
        counted = before + there.cumsum(1)
        self.tokens = counted[:, -1].clone()
        return counted - 1

    def update_softmax_heads(self, key_states, value_states, valid=None):
        """Append T tokens to what the softmax heads keep. Call before `update`.

        Args:
            key_states, value_states: [B, heads, T, D].
            valid: [B, T] bool, false at padding, or None.
        Returns:
            keys and values [B, heads, S, D] and valid [B, S] or None, of all S tokens, or of those that the base's own
            window can reach.
        """
        before = (self.softmax_keys, self.softmax_values)
        if self.softmax_keys is None:
            before = (key_states[:, :, :0], value_states[:, :, :0])
        new = (key_states, value_states)
        (keys, values), valid = _appended(before, new, self.softmax_valid, valid, self.local_window is not None)
        self.softmax_keys, self.softmax_values, self.softmax_valid = keys, values, valid
        if self.local_window is not None and keys.shape[2] >= self.local_window:
            first = keys.shape[2] - self.local_window + 1
            self.softmax_keys, self.softmax_values = keys[:, :, first:].clone(), values[:, :, first:].clone()
            self.softmax_valid = None if valid is None else valid[:, first:].clone()
        return keys, values, valid

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` would return."""
        past = 0 if self.keys is None else self.keys.shape[2]
        return past + query_length, self.cumulative_length - past

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, *_args) -> None:
        """Raises: a recurrent state cannot be rolled back."""
        raise RuntimeError("the recurrent state of a Liger layer cannot be rolled back, so its cache cannot be cropped")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor held, by name, each with the batch first."""
        named = {name: getattr(self, name) for name in self.TENSORS}
        named |= {f"state_{index}": state for index, state in enumerate(self.states or ())}
        named |= {f"kept_{index}": tensor for index, tensor in enumerate(self.kept or ())}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function) -> None:
        for name, tensor in self.tensors().items():
            if not name.startswith(("state_", "kept_")):
                setattr(self, name, function(tensor))
        if self.states is not None:
            self.states = tuple(function(state) for state in self.states)
        if self.kept is not None:
            self.kept = tuple(function(tensor) for tensor in self.kept)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows of the chosen beams, in their order."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        self._map(lambda x: x.to(self.device, non_blocking=True))


def first_tokens(keys, values, positions, count: int):
    """The first `count` tokens that are there. keys, values [B, Hkv, S, D]; positions [B, S], EMPTY for none."""
    missing = positions < 0
    order = missing.to(torch.int64).argsort(dim=1, stable=True)[:, :count]
    index = order[:, None, :, None]
    return (
        keys.gather(2, index.expand(-1, keys.shape[1], -1, keys.shape[3])),
        values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3])),
        positions.gather(1, order),
    )


def _appended(before, new, valid_before, valid, padding_first: bool = True):
    """New tokens behind those before, [B, H, S, ...] each or None, and which of both are there, [B, S] or None.

    padding_first: where there is new padding, bring all padding to the front.
    """
    past, length = before[0].shape[2], new[0].shape[2]
    both = zip(before, new, strict=True)
    joined = [x if old is None or x is None else torch.cat([old, x], dim=2) for old, x in both]
    if valid is None and valid_before is None:
        return joined, None
    ones = lambda n: torch.ones(len(new[0]), n, dtype=torch.bool, device=new[0].device)  # noqa: E731
    there = [ones(past) if valid_before is None else valid_before, ones(length) if valid is None else valid]
    there = torch.cat(there, dim=1)
    if valid is None or past == 0 or not padding_first:
        return joined, there
    order = tokens_last(there)
    return [None if x is None else at_places(x, order, dim=2) for x in joined], at_places(there, order)


def cache_for(model_config) -> Cache:
    """An empty dynamic cache with the layers that transformers would build for this config."""
    return DynamicCache(config=model_config)


def adapt_cache(cache: Cache, attentions) -> None:
    """Make every layer of `cache` fit its attention layer: Liger's own, or the one transformers built.

    Args:
        cache: transformers' cache; its layers are replaced in place.
        attentions: the model's attention modules, in order.
    Raises:
        ValueError: a layer was filled in the other attention mode.
    """
    make_layer = getattr(cache, "layer_class_to_replicate", None)
    while make_layer is not None and len(cache.layers) < len(attentions):
        cache.layers.append(make_layer())
    for index, attention in enumerate(attentions):
        layer = cache.layers[index]
        if isinstance(layer, LigerCacheLayer) == attention.keeps_state:
            continue
        if int(layer.get_seq_length()) > 0:
            raise ValueError("this cache was filled in another attention mode; start with an empty one")
        spec = attention.liger_spec
        holds = bool(attention.liger_kept or attention.liger_rest)
        window, local_window = attention.liger_window + (spec.delayed or holds), attention.local_window
        sinks = 0 if holds else spec.sinks
        cache.layers[index] = LigerCacheLayer(window, sinks, local_window) if attention.keeps_state else DynamicLayer()
