"""What the model code uses of transformers beyond what its documentation promises. Nothing else imports such names.

Made for transformers 5.17 and newer: where a release has moved a name, loading says so in one sentence.
"""

from inspect import signature

import transformers

try:
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    raise ImportError(
        f"the model code of this Liger folder does not fit transformers {transformers.__version__} ({error}); it was "
        "made for 5.17 and newer: install another release, or renew the code with `liger convert FOLDER --refresh`"
    ) from error

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError:  # a transformers without this table looks at the class itself
    _CAN_RECORD_REGISTRY = {}

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE",
    "CacheLayerMixin",
    "DynamicLayer",
    "GenericForSequenceClassification",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "keep_weight_names",
    "note_outputs",
]

# What transformers calls a cache that it passes on: `cache` since 5.24.
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


def keep_weight_names(model_type: str, liger_model_type: str) -> None:
    """Read and write weights under the names of the family's files, where experts have others in memory.

    Raises:
        ImportError: transformers has the table of names elsewhere; without it every expert would start at random.
    """
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError as error:
        raise ImportError(
            f"transformers {transformers.__version__} does not say where liger's model code looks for it how the "
            f"experts of {model_type!r} are named in files ({error}); install another release, or renew the code with "
            "`liger convert FOLDER --refresh`"
        ) from error
    mapping = get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(liger_model_type, mapping, overwrite=True)


def note_outputs(model) -> None:
    """Note what can be recorded (hidden states, router logits) of a model whose class was changed after it was built:
    transformers does so by class name, when it builds one."""
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)
