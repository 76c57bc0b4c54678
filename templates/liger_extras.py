"""Tensors that a Liger layer may have beside its family's own, only where the config asks for them. No torch here.

Each is a float32 parameter of the layer's attention: its shape and its initial value, at which the layer computes what
it would compute without it (but for `gate_init: random` and feature maps, which start at random as published).
"""

import math
from dataclasses import dataclass

from .liger_gates import GATES

# Every name, for loading in float32, counting, and telling them from the family's own.
NAMES = (
    "grm_scale",
    "swa_scale",
    "window_factor",
    "keep_score",
    "rest_mass",
    "rest_slope",
    "feature_q",
    "feature_k",
    "feature_q_bias",
    "feature_k_bias",
    "gate_down",
    "gate_up",
    "gate_bias",
)


@dataclass(frozen=True)
class Extra:
    """Shape and initial value of one tensor.

    Attributes:
        shape: of the parameter.
        init: a number to fill it with, or the numbers of its last dimension; `normal` or `uniform` for a random
            distribution around 0; or the name of the layer's tensor whose values it starts with.
        width: standard deviation of `normal`, largest value of `uniform`.
    """

    shape: tuple[int, ...]
    init: float | str | tuple[float, ...] = 0.0
    width: float = 0.0


def extra_tensors(spec, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> dict[str, Extra]:
    """The extra tensors of a layer of these settings, by name.

    - `grm_scale`, `swa_scale` [Hq] (`branch_scales`): coefficients of the two branches, for each query head.
    - `keep_score` [Hkv, D] (`kept`): weights of the score of a key; from zero, at which the latest tokens are kept.
    - `rest_mass` [Hq, D + 3] and `rest_slope` [Hq] (`rest`): what corrects the mass of the rest state, from the mean
      logit alone, and the slope of its expansion, from 1 (see `liger_rest`).
    - `window_factor` [Hq] (`normalizer: joint-max`): its sigmoid is the coefficient of the window.
    - `feature_q` and `feature_k` [Hq, F, D] (`feature_params: learned`): linear maps before the feature map, for the
      queries and the keys of each query head. Uniform as torch's `kaiming_uniform_` fills a [D, F] tensor of H heads,
      keys as queries: so LoLCATs' code.
    - `feature_q` [Hq * D, Hq * D] and `feature_q_bias` (`feature_params: dense`): a linear map across heads, for
      queries and keys alike; where there are fewer key/value heads, keys have `feature_k` [Hkv * D, Hkv * D] and
      `feature_k_bias`. Uniform as in torch's `Linear`: so SUPRA's code.
    - `gate_down` [R, D_model], `gate_up` [Hkv, W, R], `gate_bias` [Hkv, W] (`gate_params: learned`): a low-rank
      projection of the hidden state, added to the pooled gate (`gate_init: pooled`) or in its place (`random`).
    """
    if spec.kind != "liger":
        return {}
    found = {}
    if spec.branch_scales:
        found["grm_scale"] = Extra((num_heads,), float(spec.mix))
        found["swa_scale"] = Extra((num_heads,), float(1 - spec.mix))
    if spec.normalizer == "joint-max":
        mix = min(max(spec.mix, 1e-6), 1 - 1e-6)  # a branch that is off needs no factor, but keeps the tensor
        found["window_factor"] = Extra((num_heads,), math.log((1 - mix) / mix))
    if spec.kept:
        found["keep_score"] = Extra((num_key_value_heads, head_dim))
    if spec.rest:
        found["rest_mass"] = Extra((num_heads, head_dim + 3), (0.0, 1.0, *[0.0] * (head_dim + 1)))
        found["rest_slope"] = Extra((num_heads,), 1.0)
    if spec.feature_params == "learned":
        width = spec.feature_dim or head_dim
        shape = (num_heads, width, head_dim)
        found["feature_q"] = Extra(shape, "uniform", math.sqrt(6 / (width * head_dim)))
        found["feature_k"] = Extra(shape, "feature_q")
    elif spec.feature_params == "dense":
        for name, heads in (("feature_q", num_heads), ("feature_k", num_key_value_heads)):
            if name == "feature_q" or heads != num_heads:
                width = heads * head_dim
                found[name] = Extra((width, width), "uniform", width**-0.5)
                found[f"{name}_bias"] = Extra((width,), "uniform", width**-0.5)
    if spec.gate_params == "learned":
        width = GATES[spec.gate].width(spec, head_dim)
        random = spec.gate_init == "random"
        found["gate_down"] = Extra((spec.gate_rank, hidden_size), "normal", hidden_size**-0.5)
        up = ("normal", spec.gate_rank**-0.5) if random else (0.0, 0.0)
        found["gate_up"] = Extra((num_key_value_heads, width, spec.gate_rank), *up)
        found["gate_bias"] = Extra((num_key_value_heads, width))
    return found
