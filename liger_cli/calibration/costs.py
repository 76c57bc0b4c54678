"""What a key/value head lacks of the base's attention with so much memory, and what that costs.

Two measures, from one forward and one backward pass: the error at the layer's output, relative to that output; and
the KL divergence, in nats a token, that the error is expected to make: (g . d)^2 / 2 for an error d where the log-
likelihood of drawn tokens has the gradient g (see `layerwise.visit_backward`). The first overrates heads that little
depends on, the second those that ordinary text seldom needs, such as the ones that begin a copy. Their geometric mean
is the score.
"""

from dataclasses import dataclass

import torch

from liger_cli.calibration.layerwise import Layer
from liger_cli.calibration.memories import Parts


@dataclass
class HeadCosts:
    """Of one key/value head, summed over queries; [S, 2]: without a state and with one.

    Attributes:
        layer, head: which one.
        sizes: kept tokens.
        nats: expected KL divergence. error: squared error at the layer's output. power: of the layer's own output.
        queries: how many.
    """

    layer: int
    head: int
    sizes: list[int]
    nats: torch.Tensor
    error: torch.Tensor
    power: float = 0.0
    queries: int = 0

    @classmethod
    def zeros(cls, layer: int, head: int, sizes: list[int]) -> "HeadCosts":
        return cls(layer, head, sizes, *(torch.zeros(len(sizes), 2, dtype=torch.float64) for _ in range(2)))

    def add(self, layer: Layer, row: int, queries: torch.Tensor, parts: Parts, state=None) -> None:
        """Add the queries of one row. state: the weights of `StateFit.solve`, or None without one."""
        own = slice(self.head * layer.groups, (self.head + 1) * layer.groups)
        projection = layer.output_weight()
        gradient, weight = layer.gradient[row, own][:, queries], projection[own]  # [G, N, D], [G, D, M]
        full = parts.full()
        for size in range(len(self.sizes)):
            for column in range(2 if state else 1):
                output = parts.with_state(size, state[0][size], state[1][size]) if column else parts.exact[size]
                lacking = output - full
                self.nats[size, column] += float((gradient * lacking).sum((0, 2)).square().sum()) / 2
                self.error[size, column] += float(
                    (lacking.transpose(0, 1).flatten(1) @ weight.flatten(0, 1)).square().sum()
                )
        if not state:
            self.nats[:, 1], self.error[:, 1] = torch.inf, torch.inf
        whole = layer.heads[row][:, queries].transpose(0, 1).flatten(1) @ projection.flatten(0, 1)
        self.power += float(whole.square().sum())
        self.queries += len(queries)

    def score(self) -> torch.Tensor:
        """[S, 2]: the geometric mean of nats a token and of the relative error."""
        return (self.nats / self.queries * self.error / max(self.power, 1e-30)).sqrt()
