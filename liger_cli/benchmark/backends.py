"""What runs the kernels of each gate and of the window, and why: for `liger doctor` and `liger bench`."""

from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES


def gate_backend(spec: LayerSpec, head_dim: int, on_cuda: bool, wanted: str) -> dict:
    """`{"backend", "why"}` of one layer's recurrence. `wanted`: auto, torch or fla. May raise LigerBackendError."""
    import torch

    from liger_cli.templates.liger_backend import choose

    gate = GATES[spec.gate]
    q, k, v = (torch.zeros(1, 1, 1, head_dim) for _ in range(3))
    inputs = gate.inputs(q, k, v, gate.pool(k, spec), spec)
    choice = choose(gate.rule, *gate.rule.kind(inputs.q, inputs.log_decay), on_cuda, wanted)
    return {"backend": choice.backend, "why": choice.why}


def device_backends(on_cuda: bool, head_dim: int = 128) -> dict:
    """What each gate and the window would run on here: `{"requested", "gates", "window", "obstacle"}`.

    `obstacle` says why what LIGER_BACKEND asks for cannot be had; then the gates are those of `auto`.
    """
    from liger_cli.templates.liger_backend import LigerBackendError, requested

    obstacle, wanted = None, "auto"
    try:
        wanted = requested()
        gates = {name: gate_backend(LayerSpec(gate=name), head_dim, on_cuda, wanted) for name in GATES}
    except LigerBackendError as error:
        obstacle, wanted = str(error), "auto"
        gates = {name: gate_backend(LayerSpec(gate=name), head_dim, on_cuda, wanted) for name in GATES}
    return {"requested": wanted, "gates": gates, "window": _window(on_cuda, wanted), "obstacle": obstacle}


def model_backends(model) -> dict:
    """What the layers of a loaded model run on: `{"requested", "gates", "window"}`, a row for each gate it has."""
    from liger_cli.templates.liger_backend import requested

    attentions = [layer for layer in model.get_decoder().liger_attentions() if layer.liger_spec.kind == "liger"]
    on_cuda, gates, wanted = model.device.type == "cuda", {}, "auto"
    for layer in attentions:
        wanted = requested(layer.liger_spec.backend)
        gates[layer.liger_spec.gate] = gate_backend(layer.liger_spec, layer.head_dim, on_cuda, wanted)
    return {"requested": wanted, "gates": gates, "window": _window(on_cuda, wanted)}


def _window(on_cuda: bool, wanted: str) -> dict:
    from liger_cli.templates.liger_backend import describe_window

    return dict(zip(("backend", "why"), describe_window(on_cuda, wanted), strict=True))
