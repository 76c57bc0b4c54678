"""How much a calibration reads at once, and what memory that takes. No torch."""

from liger_cli.conversion.plan import Plan, read_layer_bytes, trained_layer_bytes
from liger_cli.templates.liger_config import LayerSpec

SEQ_LEN = 2048  # tokens of a row that is fitted on
FIT_ROWS = 4  # all at once
QUERIES = 256  # of a row that stand for all
LOGITS_BYTES = 48 << 20  # of float32 logits at a time
LOGIT_COPIES = 6  # logits, their logarithms of probabilities, these, and the gradients


def calibration_bytes(plan: Plan, seq_len: int, width: int = 4) -> int:
    """Bytes that a calibration takes at most beside the weights, for rows of `seq_len` tokens.

    One layer's reading of all the rows that are fitted on; or of one row the inputs of all layers, and one layer with
    its gradients or some logits with theirs. With that the attention weights and the ranks of the keys for some
    queries, and an output projection in float32. An estimate on the safe side, of the tensors alone.

    Args:
        width: bytes of a weight.
    """
    sizes, config = plan.checkpoint.geometry, plan.checkpoint.config
    read = FIT_ROWS * seq_len * read_layer_bytes(config, sizes, width)
    inputs = seq_len * sizes.hidden_size * sizes.num_hidden_layers * width
    layer = 2 * seq_len * trained_layer_bytes(config, sizes, LayerSpec(), width)
    logits = LOGIT_COPIES * min(LOGITS_BYTES, 4 * seq_len * sizes.vocab_size)
    groups = sizes.num_attention_heads // sizes.num_key_value_heads
    scores = QUERIES * seq_len * (6 * 4 * groups + 4 * 8 * sizes.num_key_value_heads)
    projection = 2 * 4 * sizes.num_attention_heads * sizes.head_dim * sizes.hidden_size
    return max(read, inputs + max(layer, logits)) + scores + projection
