"""What each memory of a layer holds of the base's attention, for some queries and every number of kept tokens at once.

A key is near (in the window, or a sink), or it has left the window; of those that left, the `count` with the highest
scores are kept and the others have been evicted into the state (see `liger_kept`). The keys that left are ranked once a
query; sums over bands of ranks then give the exact part and the evicted part for every size of the ladder, so the
attention weights of a layer are computed once.
"""

from dataclasses import dataclass

import torch

from liger_cli.calibration.layerwise import Layer

SIZES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # kept tokens of a key/value head
FEATURES = 3  # of the evicted mass beside the query: 1, the mean logit, the log of the number of tokens
MEAN_LOG = 6.0  # taken off that log, as the model code does


def sizes_below(length: int, window: int) -> list[int]:
    """Sizes that a row of `length` tokens can tell apart: those that do not hold all that leaves the window in it."""
    return [size for size in SIZES if size < max(1, length - window)]


def draw_queries(length: int, window: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` positions of those that have something beyond the window, one from each equal part, ascending."""
    first = min(window + 1, length - 1)
    count = min(count, length - first)
    edges = torch.linspace(first, length, count + 1)
    drawn = edges[:-1] + (edges[1:] - edges[:-1]) * torch.rand(count, generator=generator)
    return drawn.long().clamp_max(length - 1)


def ranks(scores: torch.Tensor, queries: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """How many keys that have left the window score higher than each of them does, at each query.

    Args:
        scores: [H, T]. queries: [N].
    Returns:
        [H, N, T] int64: of equal scores the later key comes first; -1 near the query (in the window, or a sink), T
        where a key comes after it.
    """
    length = scores.shape[1]
    age = queries[:, None] - torch.arange(length, device=scores.device)
    near = (age >= 0) & ((age < window) | (torch.arange(length, device=scores.device) < sinks))
    left = (age >= window) & ~near
    masked = scores[:, None].masked_fill(~left, -torch.inf).flip(-1)
    order = masked.sort(dim=-1, descending=True, stable=True).indices
    found = torch.empty_like(order)
    found.scatter_(-1, order, torch.arange(length, device=order.device).expand_as(order))
    found = found.flip(-1).masked_fill(age < 0, length)
    return found.masked_fill(near, -1)


@dataclass
class Parts:
    """The exact and the evicted part of a head's attention for each size [S], its query heads [G] and queries [N].

    Attributes:
        exact_lse: [S, G, N]; exact: [S, G, N, D], softmax over the window, sinks and kept tokens.
        evicted_lse: [S, G, N], -inf where nothing was evicted; evicted: [S, G, N, D], softmax over the evicted.
        count: [S, N], tokens evicted. mean_logit: [S, G, N], over them. mean_value: [S, N, D]. slope: [S, G, N, D], the
            covariance of their values and logits.
        query: [G, N, D], before the rotary embedding, times the square root of the scaling.
    """

    exact_lse: torch.Tensor
    exact: torch.Tensor
    evicted_lse: torch.Tensor
    evicted: torch.Tensor
    count: torch.Tensor
    mean_logit: torch.Tensor
    mean_value: torch.Tensor
    slope: torch.Tensor
    query: torch.Tensor

    def features(self, size: int) -> torch.Tensor:
        """What the evicted mass is predicted from, [G, N, 3 + D]: `rest_mass` holds their weights."""
        mean = self.mean_logit[size]
        log_count = self.count[size].clamp_min(1).log().expand_as(mean) - MEAN_LOG
        return torch.cat([torch.stack([torch.ones_like(mean), mean, log_count], dim=-1), self.query], dim=-1)

    def share(self, size: int, evicted_lse: torch.Tensor | None = None) -> torch.Tensor:
        """Of all attention, what the evicted tokens have, [G, N]; with another log mass where one is given."""
        lse = self.evicted_lse[size] if evicted_lse is None else evicted_lse
        return torch.where(self.count[size] > 0, (lse - self.exact_lse[size]).sigmoid(), 0.0)

    def full(self) -> torch.Tensor:
        """The base's own output, [G, N, D]."""
        return torch.lerp(self.exact[0], self.evicted[0], self.share(0).unsqueeze(-1))

    def with_state(self, size: int, mass: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """The output with the evicted tokens in a state. mass [G, 3 + D], slope [G] -> [G, N, D]"""
        lse = self.count[size].clamp_min(1).log() + (self.features(size) @ mass.unsqueeze(-1)).squeeze(-1)
        read = self.mean_value[size] + slope[:, None, None] * self.slope[size]
        return torch.lerp(self.exact[size], read, self.share(size, lse).unsqueeze(-1))


def parts_of(layer: Layer, row: int, head: int, queries: torch.Tensor, rank: torch.Tensor, sizes: list[int]) -> Parts:
    """Everything about one key/value head in one row.

    Args:
        queries: [N] positions. rank: [N, T], of `ranks`. sizes: ascending, the first 0.
    """
    attention, groups = layer.attention, layer.groups
    own = slice(head * groups, (head + 1) * groups)
    k, v = layer.rotated_k[row, head].float(), layer.v[row, head].float()  # [T, D]
    raw = layer.rotated_q[row, own][:, queries].float() @ k.T * attention.scaling  # [G, N, T]
    cap = getattr(attention, "attn_logit_softcapping", None)
    logits = raw if cap is None else (raw / cap).tanh() * cap
    length = k.shape[0]
    causal = rank < length
    top = logits.masked_fill(~causal, -torch.inf).amax(-1, keepdim=True)
    sink_logits = getattr(attention, "sinks", None)
    if sink_logits is not None:
        sink_logits = sink_logits[own].float()[:, None, None]
        top = torch.maximum(top, sink_logits)
    weights = (logits - top).exp()
    bands = [rank < 0]
    edges = [*sizes, length]
    bands += [(rank >= low) & (rank < high) for low, high in zip(edges, edges[1:], strict=False)]
    mass, value, count, plain, logit, moment = [], [], [], [], [], []
    for band in bands:
        band = band.to(weights.dtype)
        inside = weights * band
        mass.append(inside.sum(-1))
        value.append(inside @ v)
        count.append(band.sum(-1))
        plain.append(band @ v)
        inside = raw * band
        logit.append(inside.sum(-1))
        moment.append(inside @ v)
    if sink_logits is not None:
        mass[0] = mass[0] + (sink_logits - top).exp().squeeze(-1)
    upto = lambda found: torch.stack(found).cumsum(0)[:-1]  # noqa: E731
    after = lambda found: torch.stack(found).flip(0).cumsum(0).flip(0)[1:]  # noqa: E731
    tiny = torch.finfo(torch.float32).tiny
    exact_mass, evicted_mass, evicted_count = upto(mass), after(mass), after(count)
    several = evicted_count.clamp_min(1)
    mean_logit, mean_value = after(logit) / several[:, None], after(plain) / several[..., None]
    return Parts(
        exact_lse=exact_mass.clamp_min(tiny).log() + top.squeeze(-1),
        exact=upto(value) / exact_mass.clamp_min(tiny).unsqueeze(-1),
        evicted_lse=evicted_mass.clamp_min(tiny).log() + top.squeeze(-1),
        evicted=after(value) / evicted_mass.clamp_min(tiny).unsqueeze(-1),
        count=evicted_count,
        mean_logit=mean_logit,
        mean_value=mean_value,
        slope=after(moment) / several[:, None, :, None] - mean_logit.unsqueeze(-1) * mean_value[:, None],
        query=layer.q[row, own][:, queries].float() * attention.scaling**0.5,
    )
