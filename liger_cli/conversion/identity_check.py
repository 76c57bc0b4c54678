"""The identity check of `liger convert --experimental`: is the generic mechanism this model's own attention?

Not believed but measured: a tiny random model of the same config is run as the base's classes and as Liger's.
"""

from dataclasses import dataclass

from liger_cli.checkpoint.experimental import complete_config, settings_of, stock_config_class
from liger_cli.checkpoint.families import Family
from liger_cli.checkpoint.model_code import model_classes
from liger_cli.system.errors import ModelError
from liger_cli.templates.liger_config import LayerSpec, liger_block

LENGTH, WINDOW = 48, 7  # tokens of the text, and the shorter window of its second part
BAND_TOLERANCE = 1e-5
SEEN = 1e-3  # a shorter window has to change the base's logits by more than this, or the check would say nothing
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48,
    "sliding_window": 24,
}  # fmt: skip
MAX_LAYERS = 8
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class IdentityResult:
    """What the identity check measured on a tiny model, as largest differences of logits.

    Attributes:
        identity: mix 0 and a window that covers the text, against the base; has to be 0.
        band: mix 0 and a short window, against the base under an explicit band mask; at most 1e-5.
    """

    identity: float
    band: float

    def sentence(self) -> str:
        return (
            "experimental: on a tiny model of this config the identity check passed (largest difference "
            f"{self.identity:g}; {self.band:.1e} under a window of {WINDOW})"
        )


def check_identity(family: Family, config: dict) -> IdentityResult:
    """Measure a tiny random model of `config` and its Liger twin.

    Raises:
        ModelError: the model cannot be built or run that way, or the check fails; the sentence says by how much.
    """
    import torch

    generator_state = torch.get_rng_state()
    try:
        result = _measure(family, config)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"--experimental: the generic mechanism does not fit {family.model_type!r} "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    finally:
        torch.set_rng_state(generator_state)
    if result.identity != 0 or not result.band <= BAND_TOLERANCE:
        raise ModelError(
            f"--experimental: on a tiny model of {family.model_type!r} the identity check failed: logits differ by "
            f"{result.identity:g} (has to be 0), and by {result.band:g} under a window of {WINDOW} (at most "
            f"{BAND_TOLERANCE:g}), so nothing was written"
        )
    return result


def _measure(family: Family, config: dict) -> IdentityResult:
    import torch
    import transformers
    from transformers.masking_utils import create_causal_mask, sliding_window_overlay

    from liger_cli.templates.liger_transformers import CACHE

    tiny = _tiny(family, config)
    torch.manual_seed(0)
    base = getattr(transformers, f"{family.prefix}ForCausalLM")(tiny).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            # Away from neutral norms and near-uniform attention, which would hide a difference.
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif "attn" in name:
                parameter.mul_(8.0)
        ids = torch.randint(4, tiny.vocab_size, (1, LENGTH))
        covered = ids[:, : min(LENGTH, getattr(tiny, "sliding_window", None) or LENGTH)]
        band = create_causal_mask(
            config=tiny,
            inputs_embeds=base.get_input_embeddings()(ids),
            attention_mask=None,
            **{CACHE: None},
            and_mask_function=sliding_window_overlay(WINDOW),
        )
        if (base(ids).logits - base(ids, attention_mask=band).logits).abs().max() < SEEN:
            raise ModelError(f"--experimental: a tiny model of {family.model_type!r} hardly uses attention: no check")
        differences = []
        for window, text, mask in ((LENGTH, covered, None), (WINDOW, ids, band)):
            actual = _linearized(family, tiny, base, window)(text).logits
            differences.append((actual - base(text, attention_mask=mask).logits).abs().max().item())
    return IdentityResult(*differences)


def _linearized(family: Family, tiny, base, window: int):
    config_class, model_class = model_classes(family)
    values = {name: value for name, value in tiny.to_dict().items() if name != "model_type"}
    specs = [LayerSpec(window=window, mix=0.0)] * tiny.num_hidden_layers
    config = config_class(**values, liger=liger_block(specs))
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    model.load_state_dict(base.state_dict(), strict=True)
    return model


def _tiny(family: Family, config: dict):
    """The config with small sizes, at most `MAX_LAYERS` layers, and everything else as it is."""
    values = complete_config(family, config)
    count = values["num_hidden_layers"]
    layers = min(count, MAX_LAYERS)
    small = {name: value for name, value in TINY.items() if values.get(name) is not None}
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = 4 if kv_heads == heads else 1 if kv_heads == 1 else 2
    lists = {name: value[:layers] for name, value in values.items() if isinstance(value, list) and len(value) == count}
    tiny = stock_config_class(family)(**settings_of({**values, **lists, **small, **IDS, "num_hidden_layers": layers}))
    tiny._attn_implementation = "eager"
    return tiny
