"""`liger convert --experimental`: models that no row of `families.FAMILIES` describes.

Whether Llama's attention with the model's own projections, norms and rotary embedding is this model's attention is not
believed but measured: a tiny random model of the same config goes through the identity check before anything is
written. Only classes of transformers are used; no code of the model's folder is run.
"""

from dataclasses import replace

from liger_cli.checkpoint import family_tensors
from liger_cli.checkpoint.families import FAMILIES, Family, ministral_local_layers
from liger_cli.system.errors import ModelError


def experimental_family(model_type: str, config: dict | None = None) -> Family:
    """A row for a model type that transformers has a causal language model for.

    Args:
        config: the config.json to complete with what its config class assumes; None where its sizes are not needed.
    Raises:
        ModelError: transformers has no such model, or its config class refuses `config`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type))
    config_name = str(CONFIG_MAPPING_NAMES.get(model_type))
    if not architecture.endswith("ForCausalLM") or not config_name.endswith("Config"):
        raise ModelError(
            f"transformers has no causal language model of type {model_type!r}, and code of a model's own folder is "
            "never run; --experimental cannot convert it"
        )
    family = Family(
        model_type,
        architecture.removesuffix("ForCausalLM"),
        ministral_local_layers,
        "experimental",
        config_prefix=config_name.removesuffix("Config"),
        package=model_type_to_module_name(model_type),
        renames_weights=True,
        qkv_bias=False,
        output_bias=False,
        feed_forward=family_tensors.anything,
        norms=(),
        final_norm="",
    )
    return family if config is None else replace(family, defaults=complete_config(family, config))


def family_of(model_type: str) -> Family:
    """The family of a folder that liger made: a row of `FAMILIES`, or the generic one of `--experimental`.

    Args:
        model_type: the base's, without liger's prefix.
    Raises:
        ModelError: neither liger nor transformers knows it.
    """
    return FAMILIES.get(model_type) or experimental_family(model_type)


def complete_config(family: Family, config: dict) -> dict:
    """config.json and every field that the config class adds. Raises ModelError where the class refuses it."""
    try:
        return settings_of(stock_config_class(family)(**settings_of(config)).to_dict())
    except Exception as error:
        raise ModelError(
            f"config.json is refused by transformers' {family.config_class} ({str(error)[:200]})"
        ) from error


def stock_config_class(family: Family):
    """The config class of transformers."""
    import transformers

    return getattr(transformers, family.config_class)


def settings_of(config: dict) -> dict:
    """The fields of a config.json that a config class takes."""
    not_settings = ("model_type", "auto_map", "architectures", "transformers_version")
    return {name: value for name, value in config.items() if name not in not_settings}
