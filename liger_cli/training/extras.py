"""Training the tensors that liger adds to a model (learned gates, feature maps, branch coefficients) beside LoRA.

They are small and start as they are, so they are trained whole and saved in the adapter's file under their own names,
where PEFT's loading finds them.
"""

from pathlib import Path

from liger_cli.checkpoint.adapters import ADAPTER_WEIGHTS, PREFIX, is_extra


def extra_parameters(model) -> dict:
    """The extra parameters of a causal language model under an adapter, by their names in the base's checkpoint."""
    return {name: one for name, one in model.get_base_model().named_parameters() if is_extra(name)}


def set_trained(model, train: str) -> None:
    """Let gradients reach what a stage trains: `lora`, `extra` or `both`. The rest keeps its value, and has none."""
    for name, parameter in model.named_parameters():
        if is_extra(name):
            parameter.requires_grad_(train != "lora")
        elif ".lora_" in name:
            parameter.requires_grad_(train != "extra")


def save_beside_lora(model, folder: Path, state_dict: dict | None = None) -> None:
    """Add the extra parameters to an adapter's file that PEFT has just written. It appears whole or stays as it was."""
    from safetensors.torch import load_file, save_file

    path = Path(folder, ADAPTER_WEIGHTS)
    names = extra_parameters(model)
    if not names or not path.is_file():
        return
    if state_dict is None:
        values = {PREFIX + name: parameter.detach().cpu() for name, parameter in names.items()}
    else:
        values = {PREFIX + name: state_dict[PREFIX + name].cpu() for name in names}
    partial = path.with_suffix(".partial")
    save_file(load_file(path) | values, partial, metadata={"format": "pt"})
    partial.replace(path)
