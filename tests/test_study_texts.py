"""The study's texts and frozen bases: generators, probes, records, and recall as recorded."""

import hashlib
import json
import re
from itertools import islice

import pytest

from liger_cli.shipped.probes import evaluate_recall
from liger_cli.shipped.text import TEST_SEED, VALIDATION_SEED
from liger_cli.system.errors import SetupError, UsageError
from study import base_folders, text_console, text_harbour, text_play
from study.base_folders import BASES, study_base
from study.sources import CONSOLE, HARBOUR, PLAY, SOURCES, source
from study.transcripts import sample_settings

FROZEN = [name for name in BASES if name != "stories" and (BASES[name].folder / "config.json").is_file()]
TRAINED = list(SOURCES)
TEXTS = {"console": text_console.TEXT, "harbour": text_harbour.TEXT, "play": text_play.TEXT}
OWN = list(TEXTS)


@pytest.fixture(scope="module")
def tokenizers():
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(BASES[name].folder) for name in ("stories", *FROZEN)}


def tokenizer_of(tokenizers, name):
    if name not in tokenizers:
        pytest.skip(f"the {name} base is not frozen yet")
    return tokenizers[name]


@pytest.mark.parametrize("name", TRAINED)
def test_generator_is_deterministic_and_seeds_differ(name):
    for kind in SOURCES[name].kinds:
        first, again, other = (
            set(islice(SOURCES[name].documents(seed, (kind,)), 30)) for seed in (5, 5, VALIDATION_SEED)
        )
        assert first == again, kind
        assert not first & other, kind


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="poem"):
        next(CONSOLE.documents(0, ("poem",)))
    with pytest.raises(ValueError, match="poem"):
        next(HARBOUR.documents(0, ("poem", "report")))
    with pytest.raises(UsageError, match="'novel'; choose from stories, console, harbour, play"):
        source("novel")
    with pytest.raises(UsageError, match="'fourth'"):
        study_base("fourth")


def test_missing_base_is_a_sentence(tmp_path, monkeypatch):
    missing = base_folders.StudyBase("console", tmp_path, CONSOLE, 512)
    monkeypatch.setitem(base_folders.BASES, "console", missing)
    with pytest.raises(SetupError, match="train it with python -m study.train_bases console"):
        study_base("console")


@pytest.mark.parametrize(
    ("name", "digest"), [("console", "63f6471494ff059b"), ("harbour", "c58acb190f1ca7a4"), ("play", "3aecd5073e6ecc26")]
)
def test_generator_is_frozen(name, digest):
    """What a base was trained on and is probed with does not change under it."""
    written = list(islice(SOURCES[name].documents(1), 300)) + SOURCES[name].held_out_text(20_000)
    written += [json.dumps(record) for record in islice(SOURCES[name].instructions(1), 30)]
    assert hashlib.sha256("\0".join(written).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", OWN)
def test_documents_keep_to_the_length_asked_for(name):
    for kind in SOURCES[name].kinds:
        for text in islice(SOURCES[name].documents(3, (kind,), min_words=150, max_words=150), 20):
            assert 75 <= len(text.split()) <= 225, (kind, text)


def test_every_question_of_a_console_document_is_answered_by_its_settings():
    for kind in ("recall", "drill"):
        for text in islice(CONSOLE.documents(8, (kind,)), 30):
            made = set(re.findall(r"^(?:set|bind|pin|-) (.+)$", text, re.MULTILINE))
            # Questions for a counter are answered by its last total.
            asked = [line for line in re.findall(r"^\? (.+)$", text, re.MULTILINE) if line not in made]
            lines = text.splitlines()
            for line in asked:
                key = line.split()[0]
                before = lines[: lines.index(f"? {line}")]
                totals = [other for other in before if re.fullmatch(rf"(add|sub) \d {key} = \d+", other)]
                assert totals and totals[-1].endswith(line), (line, text)


def test_running_totals_and_the_stack_are_right():
    for text in islice(CONSOLE.documents(4, ("log",), 200, 260), 20):
        totals, stack = {}, []
        for line in text.splitlines():
            word, *rest = line.split()
            if word in ("add", "sub"):
                step, key, _, total = rest
                change = int(step) if word == "add" else -int(step)
                assert key not in totals or totals[key] + change == int(total), text
                totals[key] = int(total)
            elif word == "push":
                stack.append(rest[0])
            elif word == "pop":
                assert stack.pop() == rest[0], text


@pytest.mark.parametrize(
    ("source", "settled", "asked"),
    [(HARBOUR, "letter", "As noted,"), (PLAY, "act", "Chorus:")],
    ids=("harbour", "play"),
)
def test_everything_asked_for_was_stated_before(source, settled, asked):
    for kind in (settled, "recall", "drill"):
        for text in islice(source.documents(8, (kind,)), 30):
            for answer in re.finditer(rf"{asked} ([^.]+)\.", text):
                assert f" {answer[1]}." in text[: answer.start()].replace(asked, ""), text


def test_the_stores_the_decks_and_the_harbour_are_right():
    for text in islice(HARBOUR.documents(4, ("report",), 200, 260), 20):
        store, decks, bound, wind = {}, {}, {}, None
        for sentence in text.split(". "):
            if found := re.fullmatch(r"The store (took in|gave out) (\d) casks of (\w+) and holds (\d+)", sentence):
                change = int(found[2]) if found[1] == "took in" else -int(found[2])
                assert store.get(found[3], int(found[4]) - change) + change == int(found[4]), text
                store[found[3]] = int(found[4])
            elif found := re.match(r"The store still holds (\d+) casks of (\w+)", sentence):
                assert store[found[2]] == int(found[1]), text
            elif found := re.match(r"(\w+) went aboard (\w+)", sentence):
                decks[found[1]] = found[2]
            elif found := re.match(r"(\w+) left the deck of (\w+)", sentence):
                assert decks.pop(found[1]) == found[2], text
            elif found := re.match(r"(\w+) left for (\w+)", sentence):
                bound[found[1]] = found[2]
            elif found := re.match(r"(\w+) came in from (\w+)", sentence):
                assert bound.pop(found[1]) == found[2], text
            elif found := re.match(r"The wind turned from (\w+) to (\w+)", sentence):
                assert wind in (None, found[1]), text
                wind = found[2]


def test_the_stage_the_props_the_purses_and_the_candles_are_right():
    for text in islice(PLAY.documents(4, ("scene",), 200, 260), 20):
        away, holders, purses, candles = set(), {}, {}, None
        for sentence in re.split(r"[.?] ", text):
            if found := re.fullmatch(r"(\w+) (wins|loses) (\d) coins and counts (\d+)", sentence):
                change = int(found[3]) if found[2] == "wins" else -int(found[3])
                assert purses.get(found[1], int(found[4]) - change) + change == int(found[4]), text
                purses[found[1]] = int(found[4])
            elif found := re.fullmatch(r"(\w+) hands the (\w+) to (\w+)", sentence):
                assert holders.get(found[2], found[1]) == found[1] != found[3], text
                holders[found[2]] = found[3]
            elif found := re.match(r"(\w+) lifts the (\w+)", sentence):
                assert holders[found[2]] == found[1], text
            elif found := re.match(r"One light (more|less), (\d+) burn", sentence):
                change = 1 if found[1] == "more" else -1
                assert candles in (None, int(found[2]) - change), text
                candles = int(found[2])
            elif found := re.match(r"Exit (\w+)", sentence):
                assert found[1] not in away, text
                away.add(found[1])
            elif found := re.match(r"Enter (\w+)", sentence):
                away.remove(found[1])
        assert purses and holders and candles, text


def test_a_copied_block_is_copied_exactly():
    marks = {
        CONSOLE: (r"(?:begin|again)\n", "^end$"),
        HARBOUR: (r"The copy (?:begins|again)\.", " The copy ends"),
        PLAY: (r"The song (?:begins|again)\.", " The song ends"),
    }
    for text_source, (begin, end) in marks.items():
        for text in islice(text_source.documents(2, ("copy",)), 20):
            first, second = re.findall(f"{begin}(.*?){end}", text, re.MULTILINE | re.DOTALL)
            assert first == second


@pytest.mark.parametrize("text", TEXTS.values(), ids=OWN)
def test_settings_have_distinct_keys_and_values(text):
    from random import Random

    keys = list(text.keys)
    settings = sample_settings(Random(0), 16, keys, text.relations)
    assert len({one.prefix for one in settings}) == len({one.value for one in settings}) == 16
    with pytest.raises(ValueError, match="17"):
        sample_settings(Random(0), 17, keys, text.relations)
    assert len({one.value for one in sample_settings(Random(0), 32, keys, text.relations, most=40)}) == 32


@pytest.mark.parametrize(("source", "asked"), [(HARBOUR, "As noted,"), (PLAY, "Chorus:")], ids=("harbour", "play"))
def test_an_instruction_is_answered_by_its_input(source, asked):
    records = [record for record in islice(source.instructions(5), 60) if record["input"]]
    for record in records:
        key, verb = re.fullmatch(r"(?:What|Whom|How long) does (\w+) (\w+)\?", record["instruction"]).groups()
        answer = re.fullmatch(rf"{asked} ({key} {verb[:-1]}\w+ .+)", record["output"])[1]
        assert f" {answer}" in record["input"]
    assert records


@pytest.mark.parametrize("pairs", (1, 4, 16, 32))
@pytest.mark.parametrize("name", OWN)
def test_probe_distance_is_exact(tokenizers, name, pairs):
    tokenizer = tokenizer_of(tokenizers, name)
    for distance in (16, 64, 384):
        probes = SOURCES[name].recall_probe(tokenizer, distance, 6, pairs=pairs)
        assert len(probes) == 6
        assert probes == SOURCES[name].recall_probe(tokenizer, distance, 6, pairs=pairs)
        for prompt, answer in probes:
            end = len(prompt) - distance
            assert prompt[end - len(answer) : end] == answer
            assert tokenizer(tokenizer.decode(prompt), add_special_tokens=False)["input_ids"] == prompt


def test_probe_too_short_for_a_question(tokenizers):
    with pytest.raises(ValueError, match="distance of 2 tokens"):
        CONSOLE.recall_probe(tokenizer_of(tokenizers, "console"), 2, 1)


@pytest.mark.parametrize(
    ("name", "text", "answers"),
    [
        (
            "console",
            "set port = jade 42\nturn pump on\n? port = jade 42\nagain\nturn pump on\nend\npush jade\n",
            " port = jade 42\n\nturn pump on\nend",
        ),
        (
            "harbour",
            "Day 12 in Riga. Heron owes 42 crowns. As noted, Heron owes 42 crowns. Once more silk 42. The copy again. "
            "Swan left for Riga. The copy ends. Swan left for Riga.",
            ", Heron owes 42 crowns. silk 42.. Swan left for Riga. The copy ends",
        ),
        (
            "play",
            "Scene 12, the tent. Aside: Viola sleeps 42 hours. Chorus: Viola sleeps 42 hours. Refrain lace 42. The "
            "song again. Exit Paris. The song ends. Exit Paris.",
            ": Viola sleeps 42 hours. lace 42.. Exit Paris. The song ends",
        ),
    ],
)
def test_answers_are_what_follows_a_question(name, text, answers):
    import torch

    from study.trainer import answer_mask, train_tokenizer

    tokenizer = train_tokenizer(SOURCES[name], 960, num_documents=200)
    rows = torch.tensor([tokenizer(text)["input_ids"]])
    mask = answer_mask(SOURCES[name], tokenizer, rows)[:, :-1]
    assert tokenizer.decode(rows[:, 1:][mask]) == answers


@pytest.mark.parametrize("name", ("harbour", "play"))
def test_keys_and_values_are_single_tokens(tokenizers, name):
    tokenizer = tokenizer_of(tokenizers, name)
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in SOURCES[name].single_tokens)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_muon_in_float32_is_torchs(shape):
    import torch

    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")

    from study.trainer import Float32Muon

    torch.manual_seed(0)
    start = torch.randn(shape)
    gradients = torch.randn(3, *shape)
    ends = []
    for muon in (torch.optim.Muon, Float32Muon):
        param = torch.nn.Parameter(start.clone())
        optimizer = muon([param], lr=0.1, weight_decay=0.05, momentum=0.95)
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
        ends.append(param.detach())
    # torch's own rounds its update to bfloat16.
    assert (ends[0] - start).norm() > 0.1 and (ends[0] - ends[1]).abs().max() < 0.01


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_base_recalls_what_its_card_says(name, tokenizers):
    import torch
    from transformers import AutoModelForCausalLM

    base = study_base(name)
    assert sum(path.stat().st_size for path in base.folder.rglob("*")) <= 4 * 2**20
    config = json.loads((base.folder / "config.json").read_text())
    shipped = json.loads((BASES["stories"].folder / "config.json").read_text())
    assert config["model_type"] != shipped["model_type"]
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    recorded = base.evaluation()["recall_by_pairs"]
    card = (base.folder / "README.md").read_text()
    for pairs, distance, bar in ((4, 256, 0.95), (16, 384, 0.85)):
        share = recorded[str(pairs)][str(distance)]
        assert share >= bar and f"{share:.3f}" in card
        found = evaluate_recall(
            model, tokenizers[name], (distance,), 32, TEST_SEED, pairs=pairs, probe=base.source.recall_probe
        )
        # 32 of the 200 recorded probes: three binomial standard deviations below.
        assert found[distance] >= share - 3 * (max(share * (1 - share), 0.01) / 32) ** 0.5
