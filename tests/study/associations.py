"""How many associations one recurrent state holds, apart from any model: random keys and values, written and read."""

from dataclasses import dataclass

from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # associations
TRIALS = 8
NO_DECAY = 1e6  # divisor of the log gate


@dataclass(frozen=True)
class Memory:
    """A kind of state: its name in table and plot, and the settings of `LayerSpec`."""

    name: str
    settings: dict

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec(**self.settings)


MEMORIES = (
    Memory("sum, no decay, phi = softmax", {"gate": "none"}),
    Memory("sum, no decay, phi = identity", {"gate": "none", "feature_map": "none"}),
    Memory("gla, phi = softmax", {"gate": "gla"}),
    Memory("gla, phi = identity", {"gate": "gla", "feature_map": "none"}),
    Memory("gdn, pooled decay", {"gate": "gdn"}),
    Memory("gdn, no decay", {"gate": "gdn", "gate_normalizer": NO_DECAY}),
)


def read_back(spec: LayerSpec, head_dim: int, size: int, trials: int = TRIALS, seed: int = 0) -> float:
    """Share of `size` associations that are read back from a state of one head.

    Keys and values are independent normal numbers of variance 1, [trials, 1, size, head_dim]. They are written in a row
    by the gate's own recurrence, the decay pooled from the keys as in an untrained model; then every key is the query
    once. What is read counts where the right value has the largest inner product with it of all that were written,
    each scaled to length 1.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(trials, 1, size, head_dim, generator=random) for _ in range(2))
    gate = GATES[spec.gate]
    inputs = gate.inputs(k, k, v, gate.pool(k, spec), spec)
    state = gate.rule.forms.chunk(*gate.rule.arguments(inputs))[1]
    found = inputs.q @ state  # [trials, 1, size, head_dim]
    guess = (found @ torch.nn.functional.normalize(v, dim=-1).mT).argmax(-1)
    return float((guess == torch.arange(size)).double().mean())


def curves(head_dim: int, sizes: tuple[int, ...] = SIZES, trials: int = TRIALS) -> dict[str, dict[str, float]]:
    """`{name of the memory: {associations: share read back}}`, for states of head_dim x head_dim."""
    return {
        memory.name: {str(size): read_back(memory.spec, head_dim, size, trials) for size in sizes}
        for memory in MEMORIES
    }
