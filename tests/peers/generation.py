"""What transformers and fla ask of generation, over converted models; written anew, as neither ships those tests.

transformers' `GenerationTesterMixin` is in its repository alone, as is fla's `run_test_generation`: see
`transformers_mixins` for the first, run from a checkout. Here is what they hold a model to: a cache changes nothing,
whatever searches or samples; padding changes nothing; outputs have their shapes; a text goes on from where its cache
ends. Logits are of size 1 and float32: 2e-5.
"""

import copy

import pytest
import torch
from three_models import MODELS, SIZES, write
from transformers import AutoConfig, AutoModelForCausalLM

TOLERANCE = {"atol": 2e-5, "rtol": 0}
NEW = 12
SETTINGS = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
SEARCHES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 10},
    "rules": {"do_sample": False, "repetition_penalty": 1.2, "bad_words_ids": [[1, 0]], "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A model of random weights, the tensors that a calibration fits among them."""
    folder = tmp_path_factory.mktemp("model")
    write(folder, request.param)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.2)
    return made


def prompt(length: int = 9):
    """Two rows of token ids with their mask; the first row is padded on the left."""
    ids = torch.randint(3, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model, inputs: dict, **settings):
    torch.manual_seed(0)
    return model.generate(**inputs, **SETTINGS, **settings)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_cache_changes_nothing(model, search):
    with_cache, without = (generated(model, prompt(), **SEARCHES[search], use_cache=use) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)


def test_outputs(model):
    """Scores, logits and hidden states of every step are of the generated tokens, in their shapes."""
    found = generated(
        model, prompt(), do_sample=False, output_scores=True, output_logits=True, output_hidden_states=True
    )
    assert found.sequences.shape == (2, 9 + NEW)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == NEW
    assert all(step.shape == (2, SIZES["vocab_size"]) for step in (*found.scores, *found.logits))
    assert torch.equal(torch.stack([step.argmax(-1) for step in found.scores], 1), found.sequences[:, 9:])
    for length, step in zip([9] + [1] * (NEW - 1), found.hidden_states, strict=True):
        assert len(step) == 1 + SIZES["num_hidden_layers"]
        assert all(one.shape == (2, length, SIZES["hidden_size"]) for one in step)


def test_padding_changes_nothing(model):
    """A padded row generates what it does alone."""
    inputs = prompt()
    found = generated(model, inputs, do_sample=False, output_logits=True)
    alone = generated(model, {"input_ids": inputs["input_ids"][:1, 3:]}, do_sample=False, output_logits=True)
    assert torch.equal(found.sequences[0, 9:], alone.sequences[0, 6:])
    for step, wanted in zip(found.logits, alone.logits, strict=True):
        torch.testing.assert_close(step[:1], wanted, **TOLERANCE)


def test_embeddings_in_place_of_ids(model):
    inputs = prompt()
    wanted = generated(model, inputs, do_sample=False)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    found = generated(model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}, do_sample=False)
    assert torch.equal(found.sequences, wanted.sequences[:, 9:])


def test_a_text_goes_on_from_its_cache(model):
    """At once, and from a copy of the cache that a shorter generation left, which stays as it was."""
    inputs = prompt()
    whole = generated(model, inputs, do_sample=False)
    first = model.generate(**inputs, **SETTINGS | {"max_new_tokens": 5}, do_sample=False)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    for _ in range(2):
        cache = copy.deepcopy(first.past_key_values)
        rest = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": cache}
        found = model.generate(**rest, **SETTINGS | {"max_new_tokens": NEW - 5}, do_sample=False)
        assert torch.equal(found.sequences, whole.sequences)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_kinds_of_cache(model, kind):
    wanted = generated(model, prompt(), do_sample=False, use_cache=False)
    assert torch.equal(
        generated(model, prompt(), do_sample=False, cache_implementation=kind).sequences, wanted.sequences
    )


def test_what_would_roll_back_is_refused(model):
    """Speculation, by another model or by the prompt's own words, in a sentence of transformers'."""
    for asked in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="stateful"):
            generated(model, {"input_ids": prompt()["input_ids"][1:]}, do_sample=False, **asked)


def test_rows_padded_at_random_decode_as_alone(model):
    """fla's test: a quarter of the text at once, padded on the left, the rest token by token, through one cache."""
    length, rows, generator = 40, 4, torch.Generator().manual_seed(42)
    ids = torch.randint(3, SIZES["vocab_size"], (rows, length), generator=generator)
    first = torch.randint(1, length // 4 - 1, (rows,), generator=generator)
    mask = torch.arange(length) >= first[:, None]
    wanted = [model(input_ids=ids[row : row + 1, start:], use_cache=False).logits[0] for row, start in enumerate(first)]
    cache, found = None, []
    for start, end in [(0, length // 4), *((place, place + 1) for place in range(length // 4, length))]:
        output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    for row, logits in enumerate(torch.cat(found, 1)):
        torch.testing.assert_close(logits[first[row] :], wanted[row], **TOLERANCE)
