"""The cache layer of a Liger attention layer, and how it gets into transformers' own caches.

transformers builds its caches from the base's `layer_types`, which know nothing of Liger's window. So the model swaps
its own layers in on first touch, in a DynamicCache or StaticCache alike. The memory of a layer is constant: the same
shapes at the same addresses from the first token on, but for its softmax heads, whose memory is so in a StaticCache.
"""

import torch
from transformers import Cache, DynamicCache

from .liger_kept import EMPTY
from .liger_memory import NEVER, Layout, from_ring, from_scored, to_ring, to_scored
from .liger_rows import at_places, tokens_last
from .liger_transformers import CacheLayerMixin, DynamicLayer


class LigerCacheLayer(CacheLayerMixin):
    """The tokens that stay visible, and the recurrent states of one layer.

    Softmax heads inside the layer are apart from these: all their keys and values. Hkv counts the other heads.

    Attributes:
        layout: how the slots of the exact memory are laid out (see `liger_memory`); None before the first token.
        pairs: [B, M, S, 2, D], keys after RoPE and values of the window, the sinks and the kept tokens; zero where a
            slot is not taken.
        priority: [B, M, S] int64, by which they are kept, EMPTY where a slot is not taken; None where none are scored.
        logits: [B, M, S], of the gate, where they go with a token into the rest state; or None.
        tokens: [B] int64, tokens seen but for padding.
        cumulative_length: [] int64, tokens seen.
        states: the float32 states of the gate, [B, Hkv, K, V] each, or None before the first token.
        softmax_keys, softmax_values: [B, heads, S, D] of the softmax heads, after RoPE, S tokens so far; None where the
            layer has none. softmax_valid: [B, S] bool, None while no padding was seen. In a StaticCache S is the most
            that it holds, and softmax_length, [] int64, how many there are.
        numbers: of the slots, see `Layout.numbers`. foreign: [1, 1, Hkv, S] bool, which are another head's. sizes:
            [Hkv], the layout's.
        shared: what one call of the model computes once for all its layers, by name; None outside of a model.
    """

    is_sliding = True
    is_croppable = False
    supports_early_init = False

    TENSORS = ("pairs", "priority", "logits", "tokens", "softmax_keys", "softmax_values", "softmax_valid")

    def __init__(
        self,
        window: int,
        beyond: int | tuple[int, ...] = 0,
        scored: bool = False,
        local_window: int | None = None,
        mode: str = "liger",
        max_cache_len: int | None = None,
    ):
        """A layer's `window`; `beyond`: tokens held behind it, sinks included, of each head where they differ;
        `scored`: whether they are kept by their score; `local_window`: the base's own, beyond which its softmax heads
        need nothing; `mode`: the attention mode that fills it; `max_cache_len`: of the StaticCache that it is in."""
        super().__init__()
        self.max_cache_len = max_cache_len
        self.window, self.beyond, self.scored = window, beyond, scored
        self.local_window = local_window
        self.mode = mode
        self.shared = None
        self.reset()

    @property
    def is_compileable(self) -> bool:
        """Whether every tensor keeps its shape: softmax heads need a StaticCache."""
        return self.softmax_keys is None or self._fixed

    @property
    def _fixed(self) -> bool:
        """Whether softmax heads write into tensors of one shape: not where the base's own window bounds them."""
        return self.max_cache_len is not None and self.local_window is None

    def reset(self) -> None:
        """Forget everything; the next update starts a new text."""
        self.layout = self.pairs = self.priority = self.logits = self.states = None
        self.tokens = self.cumulative_length = self.numbers = self.foreign = self.sizes = None
        self.softmax_keys = self.softmax_values = self.softmax_valid = self.softmax_length = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor, queries: int = 1) -> None:
        """Take shapes, dtype and device from the first keys, [B, Hkv, T, D], of so many query heads."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        beyond = self.beyond if isinstance(self.beyond, tuple) else (self.beyond,) * heads
        self.layout = layout = Layout(self.window, beyond, self.scored)
        with torch.inference_mode(False):  # or nothing outside of that mode could write to them
            self.pairs = torch.zeros(batch, layout.rows, layout.slots, 2, dim, dtype=self.dtype, device=self.device)
            if self.scored:
                self.priority = torch.full(self.pairs.shape[:3], EMPTY, device=self.device)
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
            self.numbers = layout.numbers(queries, self.device)
            self.foreign = layout.numbers(heads, self.device)[..., :-1] == NEVER
            self.sizes = torch.tensor(layout.sizes, device=self.device)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Raises: a Liger layer reads its memory as a whole, and nothing else has a use for it."""
        raise RuntimeError("the cache layer of a Liger layer is filled by that layer alone")

    def advance(self, length: int, valid=None) -> dict:
        """Count T new tokens, in every layer of a model once a call.

        Args:
            valid: [B, T] bool, false at padding, or None.
        Returns:
            what is shared with the other layers on this device; with more than one token, how many were read before,
            [B], as `read`.
        """
        shared = {} if self.shared is None else self.shared.setdefault(self.device, {})
        if "tokens" in shared:
            self.tokens, self.cumulative_length = shared["tokens"]
        else:
            shared["read"] = self.tokens.clone()
            self.tokens = self._write(self.tokens, self.tokens + (length if valid is None else valid.sum(1)))
            self.cumulative_length = self._write(self.cumulative_length, self.cumulative_length + length)
            shared["tokens"] = self.tokens, self.cumulative_length
        return shared

    def recall(self, read):
        """A window's tokens in order, those that are not there first, and the others.

        Args:
            read: [B], how many were read.
        Returns:
            keys, values [B, Hkv, W, D], valid [B, W], priority and logits [B, Hkv, W] or None; the sinks, as
            `liger_memory.from_ring` gives them, or None; and the kept tokens, as `liger_kept.attend_kept` takes them,
            or None.
        """
        if not self.scored:
            pairs, valid, sinks = from_ring(self.pairs, read, self.layout)
            return (*pairs.unbind(3), valid, None, None), sinks, None
        held = (self.pairs, self.priority) if self.logits is None else (self.pairs, self.priority, self.logits)
        (pairs, priority, *logits), memory = from_scored(held, read, self.layout)
        return (*pairs.unbind(3), priority[:, 0] > EMPTY, priority, *(logits or [None])), None, memory

    def store(self, keys, values, valid, priority=None, logits=None, sinks=None, memory=None) -> None:
        """Keep what the next token can see. Call behind `advance`.

        Args:
            keys, values: [B, Hkv, S, D] of all tokens from the window's first, if there are so many; the rest as
                `recall` returns it.
        """
        if not self.layout.slots:
            return
        recent = [torch.stack([keys, values], dim=3)]
        recent += [x for x in (priority, logits) if x is not None]
        missing = self.window - keys.shape[2]
        there = torch.ones_like(keys[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
        if missing > 0:
            front = lambda x: (*[0, 0] * (x.ndim - 3), missing, 0)  # noqa: E731
            fills = [EMPTY if x.dtype == torch.int64 else 0 for x in recent]
            recent = [torch.nn.functional.pad(x, front(x), value=fill) for x, fill in zip(recent, fills, strict=True)]
            there = torch.nn.functional.pad(there, (missing, 0), value=False)
        recent = [x[:, :, x.shape[2] - self.window :] for x in recent]
        if self.scored:
            self.pairs, self.priority, *more = (
                self._write(old, new)
                for old, new in zip(
                    (self.pairs, self.priority, self.logits), to_scored(recent, memory, self.layout), strict=False
                )
            )
            self.logits = more[0] if more else None
        else:
            there = there[:, there.shape[1] - self.window :]
            self.pairs = self._write(self.pairs, to_ring(recent[0], there, self.tokens, sinks, self.layout))

    def keep_states(self, states: tuple | None, moved: bool = False) -> None:
        """The states after the last token; moved: they need not stay where they were, but in a graph."""
        if states is None or (moved and not torch.compiler.is_compiling()):
            self.states = states
        elif self.states is None:
            self.states = tuple(self._write(None, x) for x in states)
        else:
            self.states = tuple(self._write(*both) for both in zip(self.states, states, strict=True))

    def update_softmax_heads(self, key_states, value_states, valid=None):
        """Append T tokens to what the softmax heads keep.

        Args:
            key_states, value_states: [B, heads, T, D].
            valid: [B, T] bool, false at padding, or None.
        Returns:
            keys and values [B, heads, S, D] and valid [B, S] or None, of all tokens, or of those that the base's own
            window can reach; and how many of these were there before: None where it is S - T, else [] int64.
        """
        if self._fixed:
            return self._update_fixed(key_states, value_states, valid)
        before = (self.softmax_keys, self.softmax_values)
        if self.softmax_keys is None:
            before = (key_states[:, :, :0], value_states[:, :, :0])
        new = (key_states, value_states)
        (keys, values), valid = appended(before, new, self.softmax_valid, valid, self.local_window is not None)
        self.softmax_keys, self.softmax_values, self.softmax_valid = keys, values, valid
        if self.local_window is not None and keys.shape[2] >= self.local_window:
            first = keys.shape[2] - self.local_window + 1
            self.softmax_keys, self.softmax_values = keys[:, :, first:].clone(), values[:, :, first:].clone()
            self.softmax_valid = None if valid is None else valid[:, first:].clone()
        return keys, values, valid, None

    def _update_fixed(self, keys, values, valid):
        """`update_softmax_heads` in tensors with room for a whole StaticCache."""
        batch, heads, length, dim = keys.shape
        first, room = self.softmax_keys is None, self.max_cache_len
        with torch.inference_mode(False):
            if first:
                self.softmax_keys, self.softmax_values = (
                    x.new_zeros(batch, heads, room, dim, requires_grad=False) for x in (keys, values)
                )
                self.softmax_length = torch.zeros((), dtype=torch.int64, device=keys.device)
            if valid is not None and self.softmax_valid is None:
                self.softmax_valid = torch.ones(batch, room, dtype=torch.bool, device=keys.device)
        before = self.softmax_length.clone()
        places = before + torch.arange(length, device=keys.device)
        self.softmax_keys = self._put(self.softmax_keys, 2, places, keys)
        self.softmax_values = self._put(self.softmax_values, 2, places, values)
        if self.softmax_valid is not None:
            there = torch.ones_like(keys[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
            self.softmax_valid = self._put(self.softmax_valid, 1, places, there)
        self.softmax_length = self._write(self.softmax_length, before + length)
        if first:
            return keys, values, valid, None
        return self.softmax_keys, self.softmax_values, self.softmax_valid, before

    @staticmethod
    def _put(x, dim: int, places, new):
        """New rows in their places, without a copy of the others where no gradient wants it."""
        return x.index_copy(dim, places, new) if torch.is_grad_enabled() else x.index_copy_(dim, places, new)

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens seen, padding included: a tensor where a number would wait for the device, or stop a compilation."""
        if self.cumulative_length is None:
            return 0
        if self.cumulative_length.device.type == "cpu" and not torch.compiler.is_compiling():
            return int(self.cumulative_length)
        return self.cumulative_length.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would be made for: Liger layers make their own."""
        return query_length, 0

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
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, function) -> None:
        for name, tensor in self.tensors().items():
            if not name.startswith("state_"):
                setattr(self, name, function(tensor))
        if self.states is not None:
            self.states = tuple(function(state) for state in self.states)

    @staticmethod
    def _write(old, new):
        """The new values at the old address, for a graph that was captured; elsewhere where a gradient may still want
        the old ones, or they cannot be written to."""
        if torch.is_grad_enabled():
            return new
        if not torch.compiler.is_compiling() and (old is None or (old.is_inference() and not new.is_inference())):
            with torch.inference_mode(False):
                old = torch.empty(new.shape, dtype=new.dtype, device=new.device)
        return old.copy_(new)

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
    """The first `count` tokens that are there. keys, values [B, Hkv, S, D]; positions [B, S], negative for none."""
    missing = positions < 0
    order = missing.to(torch.uint8).sort(dim=1, stable=True).indices[:, :count]
    return at_places(keys, order, dim=2), at_places(values, order, dim=2), positions.gather(1, order)


def appended(before, new, valid_before, valid, padding_first: bool = True):
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


def room(cache: Cache, whole: bool = False) -> int | None:
    """Tokens that a StaticCache has room for; None of another cache.

    Args:
        whole: None, too, where all its layers are sliding windows, which hold the last tokens alone.
    """
    layers = [layer for layer in cache.layers if getattr(layer, "max_cache_len", None) is not None]
    slides = lambda layer: getattr(layer, "local_window", None) or getattr(layer, "is_sliding", False)  # noqa: E731
    return max((layer.max_cache_len for layer in layers if not (whole and slides(layer))), default=None)


def adapt_cache(cache: Cache, attentions) -> None:
    """Make every layer of `cache` fit its attention layer: Liger's own, or the one transformers built.

    Args:
        cache: transformers' cache; its layers are replaced in place.
        attentions: the model's attention modules, in order.
    Raises:
        ValueError: a layer was filled in another attention mode.
    """
    make_layer = getattr(cache, "layer_class_to_replicate", None)
    while make_layer is not None and len(cache.layers) < len(attentions):
        cache.layers.append(make_layer())
    shared: dict = {}
    for index, attention in enumerate(attentions):
        layer = cache.layers[index]
        ours, mode = isinstance(layer, LigerCacheLayer), attention.liger_mode
        if ours != attention.keeps_state or (ours and layer.mode != mode):
            if layer.is_initialized:
                raise ValueError("this cache was filled in another attention mode; start with an empty one")
            if attention.keeps_state:
                layer = LigerCacheLayer(**attention.cache_settings(), mode=mode, max_cache_len=room(cache))
            else:
                layer = DynamicLayer()
            cache.layers[index] = layer
        if attention.keeps_state:
            layer.shared = shared
