"""The decoding step as a module whose cache are its buffers: what `torch.export` takes.

    ids = tokenizer(text, return_tensors="pt").input_ids
    cache = StaticCache(model.config, max_cache_len=4096)
    model(ids, past_key_values=cache)
    program = torch.export.export(model.decoding_step(cache), (ids[:, -1:], torch.tensor([[ids.shape[1]]])))

Another text begins with what a cache that has read it holds: copy `cache_tensors` of its layers into the buffers.
"""

import torch


class DecodingStep(torch.nn.Module):
    """One token behind those that a cache has read, and the cache with it.

    Attributes:
        model: a Liger causal language model.
        cache: one that the model has filled; all its layers of constant shape (`cache.is_compileable`). Its tensors are
            the buffers `cache_LAYER_NAME`.
    """

    def __init__(self, model, cache):
        """Raises ValueError: the cache is empty, or grows with the text."""
        super().__init__()
        if not all(layer.is_initialized for layer in cache.layers) or not cache.is_compileable:
            raise ValueError("an exported step needs a cache of constant shape, as StaticCache, that has read a text")
        self.model, self.cache = model, cache
        for index, layer in enumerate(cache.layers):
            for name, tensor in cache_tensors(layer).items():
                self.register_buffer(f"cache_{index}_{name}", tensor, persistent=False)

    def forward(self, input_ids, position_ids):
        """[B, 1] both -> logits [B, 1, V]; the buffers have read the token."""
        for index, layer in enumerate(self.cache.layers):
            prefix = f"cache_{index}_"
            own = {name.removeprefix(prefix): x for name, x in self._buffers.items() if name.startswith(prefix)}
            states = [own.pop(name) for name in sorted(own) if name.startswith("state_")]
            for name, tensor in own.items():
                setattr(layer, name, tensor)
            if states:
                layer.states = tuple(states)
        given = {"position_ids": position_ids, "past_key_values": self.cache, "use_cache": True}
        return self.model(input_ids, **given).logits


def cache_tensors(layer) -> dict[str, torch.Tensor]:
    """Every tensor of a cache's layer, constants included, by name."""
    found = {name: x for name, x in vars(layer).items() if isinstance(x, torch.Tensor)}
    return found | {f"state_{index}": x for index, x in enumerate(getattr(layer, "states", None) or ())}
