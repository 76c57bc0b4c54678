"""The models that other projects' tests run over, as `liger convert` writes them, but for the weights: a Llama, a Qwen3
as a calibration makes it, and a hybrid with softmax layers, softmax heads and a delta rule."""

import json
from pathlib import Path

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import glue_name, model_files
from liger_cli.conversion.folder import AUTO_CLASSES
from liger_cli.templates.liger_config import LayerSpec, liger_block

LLAMA, CALIBRATED, HYBRID = "llama", "qwen3 with kept tokens", "hybrid"
MODELS = {
    LLAMA: ("llama", [LayerSpec(window=4)] * 2),
    CALIBRATED: ("qwen3", [LayerSpec(gate="none", mix=0.0, window=4, sinks=1, kept=3, rest=True)] * 2),
    HYBRID: ("llama", [LayerSpec(gate="gdn", window=4, softmax_kv_heads=(1,)), LayerSpec(kind="softmax")]),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def write(folder: Path, name: str) -> None:
    """The config and the code of one of `MODELS`."""
    model_type, layers = MODELS[name]
    family = FAMILIES[model_type]
    auto_map = {auto: f"{glue_name(family)}.Liger{family.prefix}{suffix}" for auto, suffix in AUTO_CLASSES.items()}
    config = {
        **SIZES,
        **{"intermediate_size": 37, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "model_type": f"liger_{model_type}"},
        **{"auto_map": auto_map, "liger": liger_block(layers)},
    }
    for file, text in {**model_files(family), "config.json": json.dumps(config)}.items():
        (folder / file).write_text(text, encoding="utf-8")
