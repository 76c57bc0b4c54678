"""Trains the study's bases from nothing.

    python -m study.train_bases console --output DIR

An interrupted run goes on from `DIR/training_state.pt`. See `bases/*/README.md` for what came of it.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SeedOssConfig,
    SeedOssForCausalLM,
)

from study.base_folders import EVALUATION
from study.sources import CONSOLE, HARBOUR, PLAY
from study.trainer import Recipe, Stage, add_options, run, train_tokenizer

DISTANCES = (16, 32, 64, 128, 256, 384)


def build(
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    tokenizer: PreTrainedTokenizerFast,
    **fields,
) -> PreTrainedModel:
    """A model with random weights: 6 layers, 4 query and 2 key/value heads of 32 channels; `fields` of its config."""
    config = config_class(
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
        **fields,
    )
    model = model_class(config)
    start_previous_token_head(model)
    return model


def start_previous_token_head(model: PreTrainedModel, scale: float = 1.3, frequencies: int = 6) -> None:
    """Lets the first head of the first layer begin by attending to the token before; training may change it.

    Recall needs such a head, and small models spend most of a short training on finding it. Channel 0 of the embedding
    starts as a constant, and query and key read it alone: after RoPE their product is a sum of cos((distance - 1) *
    frequency) over the highest `frequencies`, largest at distance 1.
    """
    attention = model.model.layers[0].self_attn
    dim = attention.head_dim
    angles = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    size = torch.zeros(dim // 2)
    size[:frequencies] = scale
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for weight, row in (
            (attention.q_proj.weight, torch.cat([size, torch.zeros(dim // 2)])),
            (attention.k_proj.weight, torch.cat([size * angles.cos(), size * angles.sin()])),
        ):
            weight[:dim] = 0
            weight[:dim, 0] = row


CONSOLE_CURRICULUM = (
    Stage(401_408, 64, 2048, {"echo": 1.0}, 0.1),
    Stage(301_056, 128, 2048, {"drill": 0.7, "echo": 0.3}, 0.1),
    Stage(401_408, 256, 4096, {"drill": 0.3, "recall": 0.5, "echo": 0.1, "copy": 0.1}, 0.2),
    Stage(1_802_240, 512, 8192, {"recall": 0.35, "program": 0.2, "log": 0.25, "copy": 0.1, "chat": 0.1}, 0.4),
    Stage(
        802_816, 512, 8192, {"recall": 0.4, "drill": 0.15, "program": 0.15, "log": 0.2, "copy": 0.05, "chat": 0.05}, 0.4
    ),
)

# Half the tokens of a step, so that fewer tokens suffice.
HARBOUR_CURRICULUM = (
    Stage(401_408, 64, 2048, {"echo": 1.0}, 0.1),
    Stage(401_408, 128, 2048, {"drill": 0.7, "echo": 0.3}, 0.1),
    Stage(401_408, 256, 4096, {"drill": 0.3, "recall": 0.5, "echo": 0.1, "copy": 0.1}, 0.2),
    Stage(
        1_204_224,
        512,
        4096,
        {"recall": 0.4, "drill": 0.15, "letter": 0.15, "report": 0.2, "copy": 0.05, "chat": 0.05},
        0.4,
    ),
)

PLAY_CURRICULUM = (
    *HARBOUR_CURRICULUM[:-1],
    replace(
        HARBOUR_CURRICULUM[-1],
        kinds={"recall": 0.4, "drill": 0.15, "act": 0.15, "scene": 0.2, "copy": 0.05, "chat": 0.05},
    ),
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

on {{tokens:.1f}} M tokens (seed 0, torch {{torch}}), in {precision}. The first head of its first layer started by
attending to the token before (`start_previous_token_head`); everything else started random. It and the generator are
frozen: what is measured on it was not chosen by changing it.

## Held-out evaluation

Float32, seeds that training never uses (`TEST_SEED`); the same figures are in `evaluation.json`.

- Perplexity of {held_out}, rows of 1024 tokens: {{perplexity:.3f}}
- Recall: {{count}} probes a distance, exact match of the whole answer, {{pairs}} settings in the document. The distance
  is the number of tokens between the end of the stated value and the start of the answer.

{{table}}
"""


def _recipe(name: str, options: str = "--threads 1 --adam-lr 0.0015", **fields) -> Recipe:
    card = {key: fields.pop(key) for key in ("family", "text", "role", "held_out", "precision")}
    return Recipe(
        distances=DISTANCES,
        logged_distances=DISTANCES,
        command=f"python -m study.train_bases {name} {options} --output DIR",
        card=CARD.format(name=name, **card),
        **fields,
    )


FLOAT32 = {"options": "--threads 1 --float32 --adam-lr 0.0015", "precision": "float32"}
RECIPES = {
    "console": _recipe(
        "console",
        source=CONSOLE,
        curriculum=CONSOLE_CURRICULUM,
        anneals=(sum(stage.tokens for stage in CONSOLE_CURRICULUM[:-1]),),
        build_tokenizer=partial(train_tokenizer, CONSOLE, 704),
        build_model=partial(build, LlamaForCausalLM, LlamaConfig),
        family="Llama",
        text="the transcripts that `tests/study/text_console.py` generates: logs, settings asked for later, copies",
        role="It is the second base of the study, another family and another kind of text than the shipped base.",
        held_out="logs and programs",
        precision="bfloat16 autocast",
    ),
    "harbour": _recipe(
        "harbour",
        source=HARBOUR,
        curriculum=HARBOUR_CURRICULUM,
        build_tokenizer=partial(train_tokenizer, HARBOUR, 960),
        build_model=partial(build, GemmaForCausalLM, GemmaConfig),
        family="Gemma",
        text="the day books that `tests/study/text_harbour.py` generates: reports, entries noted again, copies",
        role="It is the third base of the study, trained last and evaluated once.",
        held_out="reports and letters",
        **FLOAT32,
    ),
    "play": _recipe(
        "play",
        source=PLAY,
        curriculum=PLAY_CURRICULUM,
        build_tokenizer=partial(train_tokenizer, PLAY, 960),
        build_model=partial(build, SeedOssForCausalLM, SeedOssConfig, attention_dropout=0.0, residual_dropout=0.0),
        family="Seed-OSS",
        text="the plays that `tests/study/text_play.py` generates: scenes, asides sung again by a chorus, songs",
        role="It is the last base of the study, trained when everything that it measures stood, and evaluated once.",
        held_out="scenes and acts",
        **FLOAT32,
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
