"""The base, opened as the model that a conversion will make of it."""

import torch

from liger_cli.checkpoint.extras import extra_shapes, initial_values
from liger_cli.conversion.plan import Plan
from liger_cli.evaluation.finite import first_non_finite
from liger_cli.evaluation.subject import pick_device, pick_dtype
from liger_cli.system.errors import LigerError, ModelError
from liger_cli.system.memory import available
from liger_cli.templates.liger_extras import NAMES

MEMORY_SHARE = 0.8  # of the free memory that float32 weights may take on a CPU


def load_base(plan: Plan):
    """The model that the folder of `plan` would hold, from the base's own folder. float32 on a CPU where it fits.

    Raises:
        ModelError: the base cannot be loaded.
    """
    from transformers.utils import logging

    from liger_cli.checkpoint.model_code import model_classes, read_onto
    from liger_cli.conversion.folder import converted_config

    device = pick_device("auto")
    dtype = pick_dtype(device, "auto")
    free = available(device)
    if device == "cpu" and free is not None and 4 * plan.parameters() > MEMORY_SHARE * free:
        dtype = "auto"
    config_class, model_class = model_classes(plan.checkpoint.family)
    config = {name: value for name, value in converted_config(plan).items() if name != "auto_map"}
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # tensors that the conversion adds are not missing from the base
    try:
        config = config_class.from_dict(config)
        model = read_onto(device, model_class, plan.checkpoint.folder, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base {plan.checkpoint.folder} cannot be loaded to measure its layers: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
    set_extras(model, initial_values(extra_shapes(plan.specs, plan.checkpoint.geometry)))
    return model.eval()


def set_extras(model, values: dict) -> None:
    """Copy extra tensors, NumPy arrays by name, into a model."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))


def not_finite(model, ids, what: str) -> LigerError:
    """The sentence for figures that are none: where the base, or else the linearized model, leaves the finite numbers.

    Args:
        ids: [B, T], of which the first row is run again. what: was measured.
    """
    ids = ids[:1].to(model.device)
    advice = {"softmax": "the base's own; check its weights", "liger": "the linearized model's; choose another --gate"}
    for mode, whose in advice.items():
        model.set_attention_mode(mode)
        if where := first_non_finite(model, lambda: model(input_ids=ids, use_cache=False)):
            return LigerError(f"{what} gave numbers that are not finite, first in {where}: {whose}")
    return LigerError(f"{what} gave numbers that are not finite; use another text")


def extra_values(model) -> dict:
    """The extra parameters as float32 NumPy arrays, by their names in a checkpoint."""
    return {
        name: parameter.detach().float().cpu().numpy()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in NAMES
    }
