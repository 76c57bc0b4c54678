"""Trains the study's bases from nothing.

    python -m liger_cli.study.train_bases console --output DIR

An interrupted run goes on from `DIR/training_state.pt`. See `bases/*/README.md` for what came of it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from liger_cli.shipped.trainer import Recipe, Stage, add_options, run, train_tokenizer
from liger_cli.study.base_folders import EVALUATION
from liger_cli.study.sources import CONSOLE, MIXED

DISTANCES = (16, 32, 64, 128, 256, 384)


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights: 6 layers, 4 query and 2 key/value heads of 32 channels."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=384,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_olmo2(tokenizer: PreTrainedTokenizerFast) -> Olmo2ForCausalLM:
    """An OLMo 2 with random weights: 6 layers of 4 heads of 32 channels, norms after the branches and over q and k."""
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=384,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


PROSE = {"story": 0.15, "facts": 0.1, "program": 0.1, "log": 0.15}

CONSOLE_CURRICULUM = (
    Stage(600_064, 64, 2048, {"echo": 1.0}, 0.1),
    Stage(399_360, 128, 2048, {"drill": 0.7, "echo": 0.3}, 0.1),
    Stage(401_408, 256, 4096, {"drill": 0.4, "recall": 0.4, "echo": 0.1, "copy": 0.1}, 0.2),
    Stage(
        401_408, 256, 4096, {"recall": 0.4, "drill": 0.1, "program": 0.15, "log": 0.2, "copy": 0.1, "chat": 0.05}, 0.3
    ),
    Stage(1_204_224, 512, 8192, {"recall": 0.35, "program": 0.2, "log": 0.25, "copy": 0.1, "chat": 0.1}, 0.5),
)

MIXED_CURRICULUM = (
    Stage(400_000, 64, 2048, {"echo": 1.0}, 0.1),
    Stage(700_000, 128, 2048, {"drill": 0.8, "echo": 0.2}, 0.1),
    Stage(700_000, 256, 4096, {"drill": 0.4, "recall": 0.4, "echo": 0.1, "copy": 0.1}, 0.2),
    Stage(900_000, 256, 4096, {"recall": 0.4, "drill": 0.1} | PROSE | {"copy": 0.05, "chat": 0.05}, 0.3),
    Stage(2_000_000, 512, 8192, {"recall": 0.35} | PROSE | {"copy": 0.1, "chat": 0.1}, 0.5),
)

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The study's {name} base

A {family} model of {{parameters:.2f}} M parameters ({{layers}} layers, hidden size {{hidden}}, {{heads}} query and
{{kv_heads}} key/value heads of {{head_dim}} channels, tied embeddings, byte-level BPE of {{vocab}} tokens), stored in
bfloat16. It was trained from nothing on {text}. It knows nothing else. Sequences had up to 512 tokens.
{role}

Trained in {{minutes:.0f}} minutes on one thread of a busy CPU with

    {{command}}

on {{tokens:.1f}} M tokens (seed 0, torch {{torch}}), in bfloat16 autocast. It and the generator are frozen: what is
measured on it was not chosen by changing it.

## Held-out evaluation

Float32, seeds that training never uses (`TEST_SEED`); the same figures are in `evaluation.json`.

- Perplexity of {held_out}, rows of 1024 tokens: {{perplexity:.3f}}
- Recall: {{count}} probes a distance, exact match of the whole answer, {{pairs}} settings in the document. The distance
  is the number of tokens between the end of the stated value and the start of the answer.

{{table}}
"""


def _recipe(name: str, **fields) -> Recipe:
    card = {key: fields.pop(key) for key in ("family", "text", "role", "held_out")}
    return Recipe(
        distances=DISTANCES,
        logged_distances=DISTANCES,
        command=f"python -m liger_cli.study.train_bases {name} --threads 1 --output DIR",
        card=CARD.format(name=name, **card),
        **fields,
    )


RECIPES = {
    "console": _recipe(
        "console",
        source=CONSOLE,
        curriculum=CONSOLE_CURRICULUM,
        build_tokenizer=partial(train_tokenizer, CONSOLE, 704),
        build_model=build_llama,
        family="Llama",
        text="the transcripts that `liger_cli/study/text_console.py` generates: logs, settings asked for later, copies",
        role="It is the second base of the study, another family and another kind of text than the shipped base.",
        held_out="logs and programs",
    ),
    "mixed": _recipe(
        "mixed",
        source=MIXED,
        curriculum=MIXED_CURRICULUM,
        build_tokenizer=partial(train_tokenizer, MIXED, 1280),
        build_model=build_olmo2,
        family="OLMo 2",
        text="a mixture of the shipped base's stories and the console base's transcripts",
        role="It is the third base of the study, trained last and evaluated once.",
        held_out="stories, facts, logs and programs",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", choices=RECIPES, help="which base")
    add_options(parser)
    args = parser.parse_args()
    figures = run(RECIPES[args.base], parser, args)
    evaluation = Path(args.output) / "base" / EVALUATION
    evaluation.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
