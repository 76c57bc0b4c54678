"""What calibration fits of a layer, in closed form: which tokens to keep, and what the state of the evicted stands for.

Both are regressions on the attention that the base itself gives: the first of how much a key is attended to from beyond
the window on the key, the second of the evicted tokens' part of the softmax on the state's few numbers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from liger_cli.calibration.layerwise import Layer
from liger_cli.calibration.memories import FEATURES, Parts

PENALTY = 3.0  # of the keys' regression, on standardised channels
SCALE = 16.0  # of scores, which the model code rounds: keys that differ should not tie
RIDGE = 1e-2  # of the evicted mass's regression, relative to each feature's own weight
FLOOR = 1e-3  # of a query's weight in it, relative to the mean


def fit_keep_score(layer: Layer, queries: torch.Tensor, sinks: int) -> torch.Tensor:
    """Weights [Hkv, D] of the score of a key, before its rotary embedding.

    Args:
        queries: [N] positions, evenly spread, that stand for all.
    """
    window, length = layer.attention.liger_window, layer.k.shape[2]
    received = received_attention(layer, queries)
    # The last window's keys are out of everybody's reach from beyond: they say nothing about being needed.
    usable = slice(sinks, max(length - window, sinks + 1))
    heads = zip(layer.k[:, :, usable].transpose(0, 1), received[:, :, usable].transpose(0, 1), strict=True)
    return torch.stack([fitted_score(keys.flatten(0, 1), wanted.flatten()) for keys, wanted in heads])


def received_attention(layer: Layer, queries: torch.Tensor) -> torch.Tensor:
    """The attention that each key gets from beyond the window, of all query heads that share it, [B, Hkv, T].

    Args:
        queries: [N] positions, evenly spread, that stand for all.
    """
    attention, window = layer.attention, layer.attention.liger_window
    batch, kv_heads, length, _ = layer.k.shape
    age = queries[:, None] - torch.arange(length, device=queries.device)
    received = torch.zeros(batch, kv_heads, length, device=queries.device)
    cap = getattr(attention, "attn_logit_softcapping", None)
    for row in range(batch):
        for head in range(kv_heads):
            own = slice(head * layer.groups, (head + 1) * layer.groups)
            logits = layer.rotated_q[row, own][:, queries].float() @ layer.rotated_k[row, head].float().T
            logits = logits * attention.scaling
            logits = logits if cap is None else (logits / cap).tanh() * cap
            weights = logits.masked_fill(age < 0, -torch.inf).softmax(-1)
            received[row, head] = weights.masked_fill(age < window, 0.0).sum((0, 1))
    return received * (length / len(queries))


def fitted_score(x: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Weights [F] of features x [N, F] that tell which tokens are looked at: ridge regression on r / (1 + r).

    r is the attention that a token receives: what is looked at once counts nearly as much as what is looked at by all.
    """
    x = x.double()
    spread = x.std(0).clamp_min(1e-6)
    x = F.pad((x - x.mean(0)) / spread, (0, 1), value=1.0)
    penalty = PENALTY * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ (received / (1 + received)).double())
    return (SCALE * weight[:-1] / spread).float()


@dataclass
class StateFit:
    """Sums for the two regressions of one key/value head's state, for each size [S] and query head [G].

    Attributes:
        gram: [S, G, F, F] and target: [S, G, F], of the log of the evicted mass over their number on `Parts.features`,
            weighted by how much the head's output turns on it.
        slopes: [S, G, 2]: the wanted read-out's product with the slope, and the slope's own square.
    """

    gram: torch.Tensor = field(default=None)
    target: torch.Tensor = field(default=None)
    slopes: torch.Tensor = field(default=None)

    def add(self, parts: Parts) -> None:
        sizes, groups = parts.evicted_lse.shape[:2]
        width = FEATURES + parts.query.shape[-1]
        if self.gram is None:
            new = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=parts.query.device)  # noqa: E731
            self.gram, self.target = new(sizes, groups, width, width), new(sizes, groups, width)
            self.slopes = new(sizes, groups, 2)
        for size in range(sizes):
            there = (parts.count[size] > 0).double()
            share = parts.share(size).double()
            weight = (share * (1 - share)).square()
            weight = (weight / weight.mean(-1, keepdim=True).clamp_min(1e-30) + FLOOR) * there  # [G, N]
            features = parts.features(size).double()
            wanted = (parts.evicted_lse[size] - parts.count[size].clamp_min(1).log()).double()
            weighted = features * weight.unsqueeze(-1)
            self.gram[size] += weighted.mT @ features
            self.target[size] += (weighted * wanted.unsqueeze(-1)).sum(1)
            slope, missing = parts.slope[size].double(), (parts.evicted[size] - parts.mean_value[size]).double()
            square = (share.square() * there).unsqueeze(-1)
            self.slopes[size] += torch.stack(
                [(square * slope * missing).sum((1, 2)), (square * slope * slope).sum((1, 2))], dim=-1
            )

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of the log mass [S, G, F] and of the slope [S, G]; float32."""
        mass = solve_mass(self.gram, self.target)
        slope = self.slopes[..., 0] / self.slopes[..., 1].clamp_min(1e-12)
        return mass.float(), slope.float()


def solve_mass(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The weights of the log mass, [..., F], from the normal equations [..., F, F] and [..., F].

    Drawn towards the mean logit itself, the second feature, which is what the mass of equal logits would be.
    """
    prior = torch.zeros_like(target)
    prior[..., 1] = 1.0
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    penalty = torch.diag_embed(RIDGE * diagonal + 1e-9 * diagonal.mean(-1, keepdim=True) + 1e-12)
    missing = target - (gram @ prior.unsqueeze(-1)).squeeze(-1)
    return prior + torch.linalg.solve(gram + penalty, missing.unsqueeze(-1)).squeeze(-1)
