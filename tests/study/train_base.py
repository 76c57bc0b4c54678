"""Trains the shipped base model from nothing: tokenizer, model, held-out evaluation, model card.

    python -m study.train_base --output DIR

An interrupted run goes on from `DIR/training_state.pt`. The shipped checkpoint took 9.0 M tokens and 31 minutes on two
shared CPU cores with avx512_bf16 (one resumption), and reached, on held-out seeds, a perplexity of 2.36 and a recall of
0.995 or more at every distance from 16 to 768 tokens among 1, 4 and 16 facts; `base/README.md` has the table.
"""

import argparse
from functools import partial

from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from liger_cli.shipped.probes import DISTANCES
from study.trainer import Recipe, Stage, add_options, run, train_tokenizer

CURRICULUM = (
    Stage(1_440_000, 64, 4096, {"drill": 1.0}, 0.1),
    Stage(1_200_000, 128, 4096, {"drill": 0.6, "recall": 0.4}, 0.1),
    Stage(2_000_000, 256, 4096, {"recall": 0.5, "drill": 0.1, "facts": 0.15, "story": 0.2, "chat": 0.05}, 0.3),
    Stage(2_000_000, 512, 8192, {"recall": 0.45, "facts": 0.2, "story": 0.25, "chat": 0.1}, 0.5),
    Stage(2_360_000, 1024, 8192, {"recall": 0.4, "facts": 0.2, "story": 0.3, "chat": 0.1}, 0.5),
)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The base with random weights: 2.9 M parameters, 6 layers, 4 query and 2 key/value heads of 64 channels."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The base model of `liger demo`

A Qwen3 model of {parameters:.2f} M parameters ({layers} layers, hidden size {hidden}, {heads} query and {kv_heads}
key/value heads of {head_dim} channels, tied embeddings, byte-level BPE of {vocab} tokens), stored in bfloat16. It was
trained from nothing on text that `liger_cli/shipped/text.py` generates: short stories, facts asked for later, key-value
recall. It knows nothing else. Sequences had up to 1024 tokens; `max_position_embeddings` is larger so that speed can
be measured on longer ones.

Trained in {minutes:.0f} minutes on two shared CPU cores with

    {command}

on {tokens:.1f} M tokens (seed 0, torch {torch}), in bfloat16 autocast.

## Held-out evaluation

Float32, seeds that training never uses (`TEST_SEED`).

- Perplexity of stories and facts, rows of 1024 tokens: {perplexity:.3f}
- Recall: {count} probes a distance, exact match of the whole answer, {pairs} facts in the document. The distance is
  the number of tokens between the end of the stated value and the start of the answer.

{table}
"""

RECIPE = Recipe(
    curriculum=CURRICULUM,
    build_tokenizer=partial(train_tokenizer, 1024),
    build_model=build_model,
    distances=DISTANCES,
    logged_distances=(32, 64, 128, 256, 512, 768),
    command="python -m study.train_base --output DIR",
    card=CARD,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    run(RECIPE, parser, parser.parse_args())


if __name__ == "__main__":
    main()
