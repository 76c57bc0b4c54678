"""One side of a benchmark: the model or its base, its prefill, its caches, and one decoding step at a position."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from liger_cli.templates.liger_cache import LigerCacheLayer
from liger_cli.templates.liger_kept import EMPTY

WARM_TOKENS = 128  # tokens read to get a cache whose layers all exist


class OutOfTime(Exception):
    """A forward pass took longer than it was given."""


def mask_is_given(model) -> bool:
    """Whether `generate` hands a model a mask where nothing is padded: releases of transformers differ in that."""
    import torch

    found, ids = [], torch.ones(1, 2, dtype=torch.long, device=model.device)
    hook = model.register_forward_pre_hook(
        lambda module, args, given: found.append(given.get("attention_mask") is not None), with_kwargs=True
    )
    try:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
    finally:
        hook.remove()
    return any(found)


@dataclass
class Side:
    """`model` or `base`.

    Attributes:
        which: `model` or `base`.
        activate: context that yields the model to run, with its attention mode set.
        masked: whether it is given a mask of ones; see `mask_is_given`.
    """

    which: str
    activate: Callable[[], AbstractContextManager]
    vocab_size: int
    device: str
    batch_size: int
    masked: bool

    def prefill(self, tokens: int, limit: float) -> tuple[float, object]:
        """Seconds to read `tokens` random tokens, and the cache. Raises OutOfTime after `limit` seconds."""
        import torch

        from liger_cli.templates.liger_transformers import CACHE

        ids = self._random_ids(tokens)
        with self.activate() as model, torch.inference_mode(), _deadline(model, limit):
            start = _now(self.device)
            output = model(**self._inputs(ids, tokens))
            return _now(self.device) - start, output[CACHE]

    def step(self, cache, position: int) -> float:
        """Seconds of one decoding step, [B, 1] tokens, from a cache of `position` tokens."""
        import torch

        from liger_cli.templates.liger_transformers import CACHE

        with self.activate() as model, torch.inference_mode():
            ids = self._random_ids(1)
            start = _now(self.device)
            logits = model(**self._inputs(ids, position + 1), **{CACHE: cache}).logits
            logits[:, -1].argmax(-1)
            return _now(self.device) - start

    def _inputs(self, ids, tokens: int) -> dict:
        """What `generate` gives a model, beside the cache, to read `ids` [B, T] as the last of `tokens` tokens."""
        import torch

        places = torch.arange(tokens - ids.shape[1], tokens, device=self.device).expand(len(ids), -1)
        given = {"input_ids": ids, "position_ids": places, "use_cache": True, "logits_to_keep": 1}
        if self.masked:
            given["attention_mask"] = torch.ones(len(ids), tokens, dtype=torch.long, device=self.device)
        return given

    def needed_bytes(self, tokens: int) -> int:
        """Bytes of this side's cache after `tokens` tokens, without making it."""
        cache = self._short_cache(1)
        nbytes = cache_bytes(cache)
        for layer, name, limit in token_tensors(cache):
            x = getattr(layer, name)
            nbytes += math.prod(_with(x, 1)) * x.element_size() * (_held(tokens, limit) - x.shape[2])
        return self.batch_size * nbytes

    def filled_cache(self, tokens: int):
        """A cache as long as after `tokens` tokens that were never read.

        What holds tokens is filled with random keys, values and scores; states are those after a short text, as large
        as after any other.
        """

        cache = self._short_cache(self.batch_size)
        for layer, name, limit in token_tensors(cache):
            x = getattr(layer, name)
            shape = _with(x, _held(tokens, limit))
            setattr(layer, name, _random(shape, x))
        for layer in cache.layers:
            _fill_memory(layer, tokens)
        _set_length(cache, tokens)
        return cache

    def shortened(self, cache, tokens: int):
        """Another cache that holds the first `tokens` tokens of the given one's, without a copy."""
        short = self._short_cache(self.batch_size)
        for (layer, name, limit), (source, _, _) in zip(token_tensors(short), token_tensors(cache), strict=True):
            setattr(layer, name, getattr(source, name)[:, :, : _held(tokens, limit)])
        for layer in short.layers:
            _fill_memory(layer, tokens)
        _set_length(short, tokens)
        return short

    def _short_cache(self, batch_size: int):
        """The cache of a short text, for `batch_size` sequences, all its layers made."""
        _, cache = replace(self, batch_size=1).prefill(WARM_TOKENS, float("inf"))
        if batch_size > 1:
            cache.batch_repeat_interleave(batch_size)
        return cache

    def _random_ids(self, tokens: int):
        import torch

        return torch.randint(self.vocab_size, (self.batch_size, tokens), device=self.device)


@dataclass
class Decoding:
    """A side at a position, ready for any number of steps from just there.

    Attributes:
        cache: of `position` tokens. What grows with the text is set back after every step, so that the position stays.
    """

    side: Side
    position: int
    cache: object

    def __post_init__(self):
        self.held = [(layer, name, getattr(layer, name)) for layer, name, _ in token_tensors(self.cache)]

    def step(self) -> float:
        """Seconds of one step."""
        seconds = self.side.step(self.cache, self.position)
        for layer, name, x in self.held:
            setattr(layer, name, x)
        _set_length(self.cache, self.position)
        return seconds


def token_tensors(cache) -> list[tuple[object, str, int | None]]:
    """What grows with the text, to a window or without end, [B, H, tokens, ...], as (layer, attribute, tokens held at
    most or None)."""
    found: list[tuple[object, str, int | None]] = []
    for layer in cache.layers:
        names = dict.fromkeys(("keys", "values"))
        if isinstance(layer, LigerCacheLayer):
            local = layer.local_window
            names = dict.fromkeys(("softmax_keys", "softmax_values"), None if local is None else local - 1)
        elif getattr(layer, "is_sliding", False):
            names = dict.fromkeys(names, layer.sliding_window - 1)
        found += [(layer, name, limit) for name, limit in names.items() if getattr(layer, name, None) is not None]
    return found


def growing(cache) -> list[tuple[object, str]]:
    """What holds every token of the text, as (layer, attribute)."""
    return [(layer, name) for layer, name, limit in token_tensors(cache) if limit is None]


def _fill_memory(layer, tokens: int) -> None:
    """Random keys, values and scores in the slots that a text so long has taken."""
    if not isinstance(layer, LigerCacheLayer):
        return
    free = (layer.numbers[0, 0, :, :-1] >= tokens).all(0)
    layer.pairs = _random(layer.pairs.shape, layer.pairs).masked_fill_(free[:, None, None], 0)
    if layer.priority is not None:
        layer.priority = _random(layer.priority.shape, layer.priority).masked_fill_(free, EMPTY)


def _random(shape, like):
    """Random values of a tensor's dtype: keys and values, or priorities of tokens."""
    import torch

    if like.dtype == torch.int64:
        return torch.randint(2**40, tuple(shape), device=like.device)
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def _with(x, tokens: int) -> tuple[int, ...]:
    """The shape of a cache's tensor with another number of tokens."""
    return (*x.shape[:2], tokens, *x.shape[3:])


def _held(tokens: int, limit: int | None) -> int:
    return tokens if limit is None else min(tokens, limit)


def _set_length(cache, tokens: int) -> None:
    for layer in cache.layers:
        if isinstance(layer, LigerCacheLayer):
            layer.cumulative_length.fill_(tokens)
            layer.tokens.fill_(tokens)
        elif hasattr(layer, "cumulative_length"):
            layer.cumulative_length = tokens


def cache_tensors(cache) -> list[dict]:
    """Every tensor that a cache holds, a list with name -> tensor for each layer."""
    return [
        layer.tensors() if isinstance(layer, LigerCacheLayer) else {"keys": layer.keys, "values": layer.values}
        for layer in cache.layers
    ]


def cache_bytes(cache) -> int:
    """Bytes of all tensors of a cache."""
    return sum(x.numel() * x.element_size() for layer in cache_tensors(cache) for x in layer.values())


def cache_shapes(cache) -> list[dict]:
    """Shapes and dtypes by layer, equal layers once, with their number."""
    found: list[dict] = []
    for layer in cache_tensors(cache):
        shapes = {name: [*x.shape, str(x.dtype).removeprefix("torch.")] for name, x in layer.items()}
        if found and found[-1]["tensors"] == shapes:
            found[-1]["layers"] += 1
        else:
            found.append({"layers": 1, "tensors": shapes})
    return found


def _now(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


class _deadline:
    """Stops a forward pass once the time is over: before the next module of any layer runs."""

    def __init__(self, model, seconds: float):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.modules = list(base.get_decoder().modules())
        self.seconds = seconds

    def __enter__(self):
        start = time.perf_counter()

        def check(*_):
            if time.perf_counter() - start > self.seconds:
                raise OutOfTime

        self.hooks = [module.register_forward_pre_hook(check) for module in self.modules]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
