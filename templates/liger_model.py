"""The model: the family's own, with its attention layers run by `LigerAttention` and a cache that fits them.

The classes that a folder's `modeling_liger_*.py` names are these mixins before the family's own. transformers gives a
family's model no say in the classes of its parts, so a part is built as the family's and its class changed afterwards.
"""

import torch
from transformers import Cache
from transformers.utils import logging

from .liger_attention import MODES, LigerAttention, turns_halves
from .liger_cache import LigerCacheLayer, adapt_cache, cache_for, room
from .liger_config import check_heads, layer_specs
from .liger_export import DecodingStep
from .liger_extras import NAMES
from .liger_rows import document_positions, pack_rows, row_layout, token_positions
from .liger_transformers import CACHE, GenericForSequenceClassification, note_outputs

logger = logging.get_logger(__name__)

NO_CONTINUOUS_BATCHING = (
    "continuous batching keeps keys and values in pages, which have no place for the recurrent state of a Liger "
    "layer: use `generate` with padded batches"
)


class LigerDecoder:
    """Mixed in before the family's decoder (`Qwen3Model`, ...): brings the padding mask and the cache to the layers.

    Attributes:
        liger_attention: the class of its attention layers.
    """

    liger_attention: type[LigerAttention]
    _is_stateful = True
    _can_compile_fullgraph = True
    # A server that puts its own attention into a model would run this one without its state.
    _supports_attention_backend = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.linearize()

    def linearize(self) -> None:
        """Make the family's attention layers Liger's, as `config.liger` says; their weights stay where they are."""
        config = self.config
        specs = layer_specs(getattr(config, "liger", None), config.num_hidden_layers)
        check_heads(specs, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        for layer, spec in zip(self.layers, specs, strict=True):
            attention = layer.self_attn
            attention.__class__ = self.liger_attention
            attention.liger_spec = spec
            attention.liger_mode = "liger"
            attention.turns_halves = turns_halves(attention._family_module())
            attention.add_extra_parameters()
        extras = {name.rpartition(".")[2] for name, _ in self.named_parameters()} & set(NAMES)
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | extras

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ):
        """As the family's; `attention_mask` is the [B, S] padding mask or None, the cache comes by either name.

        Packed documents (see `liger_rows`) neither see nor remember one another.

        Raises:
            ValueError: a mask that is not [B, S], since a recurrence has no pairs of positions to mask; packed
                documents and a cache, which goes on from one text a row.
        """
        self._say_what_is_not_there(kwargs.get("output_attentions"))
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
            raise ValueError(
                "a Liger model takes a padding mask of shape [batch, tokens], not a prepared attention mask"
            )
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        padding, starts, told = row_layout(attention_mask, position_ids, length)
        if length == 1 and padding is not None and padding.device.type == "cpu" and not torch.compiler.is_compiling():
            padding = None if padding.all() else padding  # a step waits for no GPU
            told = padding is not None and bool(padding[:, -1].all())
        cache = past_key_values if cache is None else cache
        if starts is not None and (use_cache or cache is not None):
            raise ValueError("packed documents cannot fill a cache, which goes on from one text a row: use_cache=False")
        if starts is not None:
            use_cache = False
            position_ids = document_positions(starts) if position_ids is None else position_ids
        elif padding is not None and position_ids is None and self._turns_features():
            position_ids = token_positions(padding, length)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if use_cache and cache is None:
            cache = cache_for(self.config)
        if cache is not None:
            adapt_cache(cache, self.liger_attentions())
            told = told or (length == 1 and padding is not None and padding.shape[1] == room(cache, whole=True))
        return super().forward(
            input_ids=input_ids,
            attention_mask=pack_rows(padding, starts, told),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )

    def _say_what_is_not_there(self, output_attentions: bool | None) -> None:
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        if wanted and any(attention.keeps_state for attention in self.liger_attentions()):
            logger.warning_once(
                "output_attentions: Liger layers have no attention weights; `attentions` holds those of other layers"
            )

    def _turns_features(self) -> bool:
        """Whether a recurrence reads rotated queries and keys: a feature map of them depends on where a text begins."""
        attentions = (attention for attention in self.liger_attentions() if attention.keeps_state)
        return any(attention.liger_spec.positions == "rope" and attention.liger_mix > 0 for attention in attentions)

    def _init_weights(self, module):
        """The family's, and initial values for extra parameters that a checkpoint does not have."""
        super()._init_weights(module)
        if isinstance(module, LigerAttention):
            for name in (name for name in NAMES if name in module._parameters):
                if not getattr(getattr(module, name), "_is_hf_initialized", False):
                    module.init_extra_parameter(name)

    def liger_attentions(self) -> list[LigerAttention]:
        """The attention modules in order."""
        return [layer.self_attn for layer in self.layers]


class LigerForCausalLM:
    """Mixed in before the family's causal language model (`Qwen3ForCausalLM`, ...).

    Attributes:
        liger_decoder: the class of its decoder.
    """

    liger_decoder: type[LigerDecoder]
    _is_stateful = True
    _can_compile_fullgraph = True
    _supports_attention_backend = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        decoder = self.get_decoder()
        decoder.__class__ = self.liger_decoder
        decoder.linearize()
        note_outputs(decoder)
        self._keep_in_fp32_modules_strict.update(decoder._keep_in_fp32_modules_strict)

    def init_continuous_batching(self, *args, **kwargs):
        """Raises ValueError: `generate_batch` and servers' continuous batching have no place for a state."""
        raise ValueError(NO_CONTINUOUS_BATCHING)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds=None, attention_mask=None, past_key_values=None, **kwargs):
        """For caches of constant shape: each layer makes its own mask from the padding mask. Once a text was read Liger
        layers need none, and softmax layers one of a StaticCache's length: a compiled step sees nothing that grows."""
        step = inputs_embeds.shape[1] == 1 and not kwargs.get("is_first_iteration", True)
        layers = () if past_key_values is None else past_key_values.layers
        if not step or attention_mask is None or not layers or not all(one.is_initialized for one in layers):
            return attention_mask
        if all(isinstance(one, LigerCacheLayer) for one in layers):
            return None
        missing = room(past_key_values) - attention_mask.shape[1]
        return torch.nn.functional.pad(attention_mask, (0, max(missing, 0)), value=1)

    def decoding_step(self, cache: Cache) -> DecodingStep:
        """One token behind those that `cache` has read, as a module for `torch.export` (see `liger_export`)."""
        return DecodingStep(self, cache)

    def set_attention_mode(self, mode: str, layers: list[int] | None = None) -> None:
        """Run Liger layers as `liger`, as the original `softmax` attention, or as a control. No reload.

        Softmax heads inside a layer stay softmax in every mode.

        Args:
            mode: `liger`, `softmax`, `window` (window and sinks alone) or `exact` (and kept tokens: all but the
                recurrent branch and the rest state).
            layers: 0-based indices; None means all. Layers that are not Liger's stay softmax in every mode.
        Raises:
            ValueError: an unknown mode or layer.
        """
        if mode not in MODES:
            raise ValueError(f"attention mode is {mode!r}, but has to be one of {', '.join(MODES)}")
        attentions = self.get_decoder().liger_attentions()
        for index in range(len(attentions)) if layers is None else layers:
            if not 0 <= index < len(attentions):
                raise ValueError(f"there is no layer {index}; the model has {len(attentions)}")
            attentions[index].liger_mode = mode


class LigerForSequenceClassification(GenericForSequenceClassification):
    """Mixed in before the family's pretrained model: a decoder and one linear map of its last token's output."""

    liger_decoder: type[LigerDecoder]
    _supports_attention_backend = False

    def __init__(self, config):
        super(GenericForSequenceClassification, self).__init__(config)  # whose own asks AutoModel for the decoder
        self.num_labels = config.num_labels
        self.model = self.liger_decoder(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
