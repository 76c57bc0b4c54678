"""One side of a benchmark: the model or its base, its prefill, its caches, and one decoding step at a position."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from liger_cli.templates.liger_cache import LigerCacheLayer

WARM_TOKENS = 128  # tokens read to get a cache whose layers all exist
PREFILL_CHUNK = 2048  # tokens a forward pass, where the layers carry a state


class OutOfTime(Exception):
    """A forward pass took longer than it was given."""


@dataclass
class Side:
    """`model` or `base`.

    Attributes:
        which: `model` or `base`.
        activate: context that yields the model to run, with its attention mode set.
        chunk: tokens a prefill pass; None reads the whole text in one.
    """

    which: str
    activate: Callable[[], AbstractContextManager]
    chunk: int | None
    vocab_size: int
    device: str
    batch_size: int

    def prefill(self, tokens: int, limit: float) -> tuple[float, object]:
        """Seconds to read `tokens` random tokens, and the cache. Raises OutOfTime after `limit` seconds."""
        import torch

        ids = self._random_ids(tokens)
        with self.activate() as model, torch.inference_mode(), _deadline(model, limit):
            cache, start = None, _now(self.device)
            for part in ids.split(self.chunk or tokens, dim=1):
                cache = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            return _now(self.device) - start, cache

    def step(self, cache) -> float:
        """Seconds of one decoding step, [B, 1] tokens, from the cache."""
        import torch

        with self.activate() as model, torch.inference_mode():
            ids = self._random_ids(1)
            start = _now(self.device)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            logits[:, -1].argmax(-1)
            return _now(self.device) - start

    def token_bytes(self) -> int:
        """Bytes that the layers that grow take for one token of every sequence."""
        _, cache = replace(self, batch_size=1).prefill(WARM_TOKENS, float("inf"))
        return self.batch_size * sum(
            2 * x.numel() * x.element_size() // x.shape[2] for x in (layer.keys for layer in growing(cache))
        )

    def filled_cache(self, tokens: int):
        """A cache as long as after `tokens` tokens that were never read.

        Growing layers hold random keys and values [B, Hkv, tokens, D]; the others what they hold after a short text,
        which is as large as after any other.
        """
        import torch

        _, cache = replace(self, batch_size=1).prefill(WARM_TOKENS, float("inf"))
        cache.batch_repeat_interleave(self.batch_size)
        for layer in growing(cache):
            for name in ("keys", "values"):
                x = getattr(layer, name)
                setattr(layer, name, torch.randn(*x.shape[:2], tokens, x.shape[3], dtype=x.dtype, device=x.device))
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = tokens
        return cache

    def shortened(self, cache, tokens: int):
        """Another cache whose growing layers are the first `tokens` tokens of the given one's, without a copy."""
        _, short = self.prefill(WARM_TOKENS, float("inf"))
        for layer, source in zip(growing(short), growing(cache), strict=True):
            layer.keys, layer.values = source.keys[:, :, :tokens], source.values[:, :, :tokens]
        for layer in short.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = tokens
        return short

    def _random_ids(self, tokens: int):
        import torch

        return torch.randint(self.vocab_size, (self.batch_size, tokens), device=self.device)


@dataclass
class Decoding:
    """A side at a position, ready for any number of steps from just there.

    Attributes:
        cache: of `position` tokens. Growing layers are set back after every step, so that the position stays.
    """

    side: Side
    position: int
    cache: object

    def __post_init__(self):
        self.growing = [(layer, layer.keys, layer.values) for layer in growing(self.cache)]

    def step(self) -> float:
        """Seconds of one step."""
        seconds = self.side.step(self.cache)
        for layer, keys, values in self.growing:
            layer.keys, layer.values = keys, values
        return seconds


def growing(cache) -> list:
    """The layers of a cache that keep every token."""
    return [x for x in cache.layers if not isinstance(x, LigerCacheLayer) and not getattr(x, "is_sliding", False)]


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
    """Stops a forward pass between two layers once the time is over."""

    def __init__(self, model, seconds: float):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.layers = base.get_decoder().layers
        self.seconds = seconds

    def __enter__(self):
        start = time.perf_counter()

        def check(*_):
            if time.perf_counter() - start > self.seconds:
                raise OutOfTime

        self.hooks = [layer.register_forward_pre_hook(check) for layer in self.layers]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
