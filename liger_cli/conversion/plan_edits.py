"""A plan with other layers: some softmax layers, or softmax heads."""

from dataclasses import replace

from liger_cli.conversion.plan import Plan
from liger_cli.system.errors import UsageError
from liger_cli.templates.liger_config import LayerSpec


def liger_layers(plan: Plan) -> list[int]:
    return [index for index, spec in enumerate(plan.specs) if spec.kind == "liger"]


def far_layers(plan: Plan) -> list[int]:
    """Liger layers that lose something beyond a window of theirs: those whose base looks beyond one."""
    return [index for index in liger_layers(plan) if plan.specs[index].window > 0 and plan.local_window(index) is None]


def with_softmax(plan: Plan, layers: list[int]) -> Plan:
    """The plan with these layers as softmax."""
    specs = tuple(LayerSpec(kind="softmax") if index in layers else spec for index, spec in enumerate(plan.specs))
    return replace(plan, specs=specs)


def with_heads(plan: Plan, heads) -> Plan:
    """The plan with these key/value heads as softmax; a layer that has no others becomes a softmax layer.

    Raises:
        UsageError: a head that is not there or is not linearized, or no linearized head left.
    """
    count = plan.checkpoint.geometry.num_key_value_heads
    specs = list(plan.specs)
    for layer, head in heads:
        if layer >= len(specs) or head >= count:
            raise UsageError(
                f"--softmax-heads names head {layer}:{head}, but the layers are 0 to {len(specs) - 1} and the "
                f"key/value heads 0 to {count - 1}"
            )
        if plan.specs[layer].kind != "liger":
            raise UsageError(f"--softmax-heads names head {layer}:{head}, but layer {layer} is not linearized")
        specs[layer] = replace(specs[layer], softmax_kv_heads=(*specs[layer].softmax_kv_heads, head))
    for index, spec in enumerate(specs):
        if len(spec.softmax_kv_heads) == count:
            specs[index] = LayerSpec(kind="softmax")
    if not any(spec.kind == "liger" for spec in specs):
        raise UsageError("--softmax-heads leaves no head to linearize; name fewer")
    return replace(plan, specs=tuple(specs))


def constant_bytes(plan: Plan) -> int:
    """Bytes of one sequence's constant cache, all Liger layers together."""
    return sum(plan.constant_bytes(layer, plan.specs[layer]) for layer in liger_layers(plan))
