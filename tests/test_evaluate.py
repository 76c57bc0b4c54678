"""liger eval: the figures against independent ones, the columns, what is kept, and what is refused."""

import csv
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

from liger_cli.commands import convert, evaluate
from liger_cli.evaluation.harness import SUITES, parse_metadata, parse_tasks, run_tasks
from liger_cli.evaluation.recall import KINDS, generated, make_probes, teacher_forced
from liger_cli.evaluation.scoring import make_rows, read_texts, score
from liger_cli.evaluation.subject import COLUMNS, TUNED, open_subject
from liger_cli.shipped import BASE_DIR, prose
from liger_cli.shipped.probes import evaluate_recall, held_out_text
from liger_cli.system.errors import LigerError, SetupError, UsageError
from liger_cli.system.manifest import new_manifest, read_manifest, write_manifest
from liger_cli.training.files import local_rows

TEXT = held_out_text(3000)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped base, converted; tests must not write into it."""
    folder = tmp_path_factory.mktemp("eval") / "shipped"
    convert.convert(str(BASE_DIR), str(folder))
    return folder


@pytest.fixture(scope="module")
def subject(shipped):
    return open_subject(shipped)


@pytest.fixture
def tiny(tiny_base, tmp_path):
    """A converted tiny model in a folder of its own."""
    folder = tmp_path / "tiny-liger"
    convert.convert(str(tiny_base()), str(folder), settings={"window": 8})
    return folder


def _adapter(converted, folder):
    """A LoRA adapter with weights that change the model, as `liger finetune` leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from liger_cli.checkpoint.model_code import load_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(converted), config).save_pretrained(folder)
    write_manifest(folder, new_manifest("adapter", base={"path": str(converted)}))
    return folder


def _tokens_by_hand(model, tokenizer, texts):
    """Mean loss over a stream in one pass, by transformers' own loss."""
    import torch

    ids = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = torch.tensor([ids])
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=ids).loss), ids.shape[1] - 1


def test_perplexity_is_that_of_transformers(subject):
    """Base and model columns against the losses transformers computes on the same tokens."""
    from transformers import AutoModelForCausalLM

    rows = make_rows(subject.tokenizer, TEXT, seq_len=4096)  # one row: nothing is cut
    found = score(subject, rows)["perplexity"]
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32").eval()
    loss, count = _tokens_by_hand(base, subject.tokenizer, TEXT)
    assert rows.tokens == count
    assert found["base"]["token"] == pytest.approx(math.exp(loss), rel=1e-4)
    nbytes = sum(len(text.encode()) for text in TEXT)
    assert found["base"]["byte"] == pytest.approx(math.exp(loss * count / nbytes), rel=1e-4)
    loss, _ = _tokens_by_hand(subject.model, subject.tokenizer, TEXT)
    assert found["model"]["token"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["window_only"]["token"] < found["model"]["token"]


def test_buckets_make_up_the_whole(subject):
    rows = make_rows(subject.tokenizer, TEXT, seq_len=200)
    found = score(subject, rows, agreement=False)["perplexity"]["base"]
    assert list(found["by_position"]) == ["1-64", "65-200"]
    counts = [0, 0]
    for length in rows.lengths.tolist():
        for index, (first, last) in enumerate(((0, 64), (64, 200))):
            counts[index] += max(0, min(length, last) - first)
    mean = sum(n * math.log(x) for n, x in zip(counts, found["by_position"].values(), strict=True)) / sum(counts)
    assert math.exp(mean) == pytest.approx(found["token"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(subject, batch_size):
    rows = make_rows(subject.tokenizer, TEXT, seq_len=150)
    alone, batched = (score(subject, rows, batch_size=size) for size in (7, batch_size))
    for column in COLUMNS:
        for part, name in (("perplexity", "token"), ("agreement", "kl"), ("agreement", "top1")):
            assert batched[part][column][name] == pytest.approx(alone[part][column][name], rel=1e-4, abs=1e-5)


def test_agreement_by_hand(subject):
    import torch

    rows = make_rows(subject.tokenizer, TEXT[:1], seq_len=100)
    found = score(subject, rows)["agreement"]
    log_p = {}
    for column in ("base", "model"):
        with subject.column(column) as model, torch.inference_mode():
            log_p[column] = model(input_ids=rows.ids[:, :-1]).logits.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_p["model"], log_p["base"], log_target=True, reduction="none").sum(-1)
    same = log_p["model"].argmax(-1) == log_p["base"].argmax(-1)
    counted = torch.arange(100)[None] < rows.lengths[:, None]
    assert found["model"]["kl"] == pytest.approx(float(kl[counted].mean()), rel=1e-4)
    assert found["model"]["top1"] == pytest.approx(float(same[counted].double().mean()))
    assert found["model"]["by_position"]["65-100"] == pytest.approx(float(kl[:, 64:][counted[:, 64:]].mean()), rel=1e-4)
    assert found["base"] == {"kl": 0.0, "top1": 1.0, "by_position": {"1-64": 0.0, "65-100": 0.0}}


def test_recall_needs_the_base(subject):
    """The base answers from beyond the window, where the window alone finds nothing; both probes agree."""
    probes = make_probes("key_value", subject.tokenizer, 128, 8)
    with subject.column("base") as model:
        assert teacher_forced(model, probes, subject.tokenizer) == 8
        assert generated(model, probes, subject.tokenizer) == 8
        assert evaluate_recall(model, subject.tokenizer, (128,), 8)[128] == 1
    with subject.column("window_only") as model:
        assert teacher_forced(model, probes, subject.tokenizer) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_what_teacher_forcing_says(subject, kind):
    """Right answers in one pass are right answers when written token by token from the left-padded cache."""
    probes = make_probes(kind, subject.tokenizer, 40, 6)
    for column in COLUMNS:
        with subject.column(column) as model:
            for probe in probes:
                last = type(probe)(probe.tokens, probe.spans[-1:])
                assert teacher_forced(model, [last], subject.tokenizer) == generated(model, [last], subject.tokenizer)
            lasts = [type(probe)(probe.tokens, probe.spans[-1:]) for probe in probes]
            assert teacher_forced(model, lasts, subject.tokenizer) == generated(model, lasts, subject.tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_probes_stand_at_their_distance(subject, kind):
    tokenizer = subject.tokenizer
    for probe in make_probes(kind, tokenizer, 100, 4):
        assert probe.spans[-1][1] == len(probe.tokens)
        first, last = probe.spans[0]
        answer = probe.tokens[first:last]
        if kind == "copy":
            assert probe.tokens[first - 100 : last - 100] == answer
        elif kind != "multi":
            assert probe.tokens[first - 100 - len(answer) : first - 100] == answer
        else:
            text = tokenizer.decode(probe.tokens)
            assert len(probe.spans) == 4
            for a, b in probe.spans:
                assert text.count(tokenizer.decode(probe.tokens[a:b]).strip()) >= 2


def test_adapter_columns(tiny, tmp_path):
    """With LoRA off and softmax on, an adapter's base column is the base, to the last bit."""
    import torch
    from transformers import AutoModelForCausalLM

    adapter = _adapter(tiny, tmp_path / "lora")
    opened = open_subject(adapter)
    assert opened.has_recovery and opened.kind == "adapter"
    ids = torch.arange(4, 44)[None]
    original = AutoModelForCausalLM.from_pretrained(read_manifest(tiny)["base"]["path"]).eval()
    with torch.inference_mode():
        wanted = original(ids).logits
        with opened.column("base") as model:
            assert torch.equal(model(ids).logits, wanted)
        with opened.column("model") as model:
            assert not torch.allclose(model(ids).logits, wanted)
            assert opened.liger_model.get_decoder().layers[0].self_attn.liger_mode == "liger"


def _merged(converted, folder, fingerprint, changed="model.layers.0.self_attn.q_proj.weight"):
    """A folder with other weights than its base's, as `liger merge` leaves it."""
    import torch

    from liger_cli.checkpoint.model_code import load_model

    model = load_model(converted)
    with torch.no_grad():
        model.get_parameter(changed).mul_(2)
    shutil.copytree(converted, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
    base = read_manifest(converted)["base"]
    write_manifest(folder, new_manifest("merged", base={**base, "fingerprint": fingerprint}))
    return folder


@pytest.mark.parametrize("changed", ["a layer", "the head"])
def test_merged_model_finds_its_base(tiny, tmp_path, changed):
    """Its base column is the base to the last bit, by the tensors that differ; a second model only where the head does,
    which makes logits of hidden states when the base's weights are gone again."""
    import torch
    from transformers import AutoModelForCausalLM

    name = "lm_head.weight" if changed == "the head" else "model.layers.0.self_attn.q_proj.weight"
    folder = _merged(tiny, tmp_path / "merged", read_manifest(tiny)["fingerprint"], name)
    opened = open_subject(folder)
    base = Path(read_manifest(tiny)["base"]["path"])
    assert opened.has_recovery and opened.base_source == base.name
    assert (opened.original is None) == (changed == "a layer")
    if opened.other:
        assert len(opened.other.pairs) == 1
    ids = torch.arange(4, 44)[None]
    original = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        with opened.column("model") as model:
            before = model(ids).logits
        with opened.column("base") as model:
            assert torch.equal(model(ids).logits, original(ids).logits)
        with opened.column("model") as model:
            assert torch.equal(model(ids).logits, before)


def test_merged_model_without_its_base(tiny, tmp_path, capsys):
    """A base that has changed is not shown as one, and there is no recovery."""
    folder = _merged(tiny, tmp_path / "merged", {"digest": "another"})
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i % 100 + 4}" for i in range(200)))
    result = evaluate.run(str(folder), data=str(file), perplexity=True, seq_len=64)
    assert result["model"]["base_column"]["label"] == TUNED
    assert result["perplexity"]["recovery"] is None
    out = capsys.readouterr().out
    assert TUNED in out and "--against" in out
    base = read_manifest(tiny)["base"]["path"]
    against = evaluate.run(str(folder), data=str(file), perplexity=True, seq_len=64, against=base)
    assert against["perplexity"]["recovery"] is not None


def test_a_base_of_other_tokens(tiny, tiny_base, tmp_path):
    """Ids that mean something else cannot be compared: a sentence, no figures and no traceback."""
    with pytest.raises(UsageError, match=r"--against .* knows 100 tokens, .* 128; name its own base"):
        open_subject(tiny, against=str(tiny_base(vocab_size=100)))
    other = shutil.copytree(read_manifest(tiny)["base"]["path"], tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w5"', '"other"').replace('"w6"', '"w5"'))
    with pytest.raises(UsageError, match="has another tokenizer than"):
        open_subject(tiny, against=str(other))
    assert open_subject(tiny, against=read_manifest(tiny)["base"]["path"]).has_recovery


def test_changed_weights_are_no_base(tiny):
    """A converted folder whose weights were overwritten has lost its base."""
    from safetensors.torch import load_file, save_file

    weights = tiny / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()  # it may be a link to the base's
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert open_subject(tiny).base_label == TUNED


@pytest.fixture
def words(tmp_path):
    """A text file of 2,000 words that the tiny models' tokenizer knows."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{(7 * n * n + n) % 100 + 4}" for n in range(2000)))
    return str(file)


def test_run_keeps_results_and_card(tiny, words, capsys):
    card = (tiny / "README.md").read_text()
    result = evaluate.run(str(tiny), data=words, perplexity=True, seq_len=96, output_format="json")
    assert json.loads(capsys.readouterr().out) == result
    assert set(result) >= {"perplexity", "agreement", "model", "versions", "command", "seed"} and "recall" not in result
    nats = [math.log(result["perplexity"][column]["token"]) for column in COLUMNS]
    closed = None if nats[2] - nats[0] <= 0.01 else pytest.approx((nats[2] - nats[1]) / (nats[2] - nats[0]))
    assert result["perplexity"]["recovery"]["token"] == closed
    kl = [result["agreement"][column]["by_position"]["65-96"] for column in COLUMNS]
    assert kl[0] == 0 < kl[1]
    kept = json.loads((tiny / "results.json").read_text())
    assert kept["eval"]["perplexity"] == result["perplexity"]
    once = (tiny / "README.md").read_text()
    assert once.startswith(card.rstrip()) and once.count("## Results") == 1
    recalled = evaluate.run(str(tiny), data=words, recall=True, recall_count=2)
    assert "second_reading" in recalled["recall"]["model"]
    capsys.readouterr()
    kept = json.loads((tiny / "results.json").read_text())
    assert kept["eval"]["perplexity"].pop("measured")["created"] == result["created"]
    assert kept["eval"]["perplexity"] == result["perplexity"] and "recall" in kept["eval"]
    twice = (tiny / "README.md").read_text()
    assert twice.count("## Results") == 1 and "evaluation.png" in twice
    assert (tiny / "evaluation.svg").stat().st_size > 1000


def test_a_base_that_fails_is_one_line(shipped, capsys, monkeypatch):
    """The shipped base knows no such questions: it alone is asked for the nearest; a sentence stands for the rows."""
    from liger_cli.evaluation import position

    asked = []
    real = position.needle

    def needle(columns, **options):
        asked.append((list(columns), options["distances"]))
        return real(columns, **options)

    monkeypatch.setattr(position, "needle", needle)
    recall = evaluate.run(str(shipped), recall=True, recall_count=2, save=False)["recall"]
    assert asked == [(["base"], (128,))] and recall["base_fails"] == "128"
    assert recall["model"]["needle"] == recall["window_only"]["needle"] == recall["recovery"]["needle"] == {}
    out = capsys.readouterr().out
    assert "the base itself answers 0 of 2 a mere 128 tokens back" in out and "a code stated" not in out


def test_a_base_that_finds_its_needles(subject, monkeypatch):
    """Every column is asked for every distance, and the recovery is that of the gap."""
    from liger_cli.evaluation import position

    shares = {"base": 1.0, "model": 0.5, "window_only": 0.0}

    def needle(columns, *, distances, **_):
        return {name: {str(one): {"exact": shares[name], "digits": 1.0} for one in distances} for name in columns}

    monkeypatch.setattr(position, "needle", needle)
    recall = evaluate.evaluate(subject, parts=("recall",), texts=TEXT, distances=(32, 64))["recall"]
    assert recall["base_fails"] is None and recall["recovery"]["needle"] == {"32": 0.5, "64": 0.5}
    assert all(list(recall[column]["needle"]) == ["32", "64"] for column in COLUMNS)


def test_no_longer_than_the_bases_context(tiny, words, capsys):
    """The tiny models are made for 512 tokens: rows and needles stay within, which is said, unless asked otherwise."""
    options = {"data": words, "perplexity": True, "recall": True, "seq_len": 1000, "recall_count": 1, "save": False}
    result = evaluate.run(str(tiny), **options, recall_distances=(64, 400))
    err = capsys.readouterr().err
    assert "the base's context is 512 tokens, so rows have 512; --beyond-context goes further" in err
    assert "no needles 400 tokens back" in err
    assert result["perplexity"]["text"]["seq_len"] == 512
    assert result["recall"]["gap"] == 512 - 64 - 400
    result = evaluate.run(str(tiny), **options, recall_distances=(64, 400), beyond_context=True)
    assert result["perplexity"]["text"]["seq_len"] == 1000 and "context" not in capsys.readouterr().err


def test_default_distances():
    assert evaluate.default_distances(2048) == (128, 512, 1700)
    assert evaluate.default_distances(32768) == (128, 512, 2048, 8192, 32400)
    assert evaluate.default_distances(512) == (128, 200)
    assert evaluate.default_distances(256) == ()


def test_some_rows_of_a_long_text(subject):
    """At even distances, so that no part of the text decides; bytes are counted for what was read."""
    rows = make_rows(subject.tokenizer, TEXT, 64)
    some = make_rows(subject.tokenizer, TEXT, 64, most=3)
    first = [index * len(rows.ids) // 3 for index in range(3)]
    assert some.ids.tolist() == rows.ids[first].tolist() and some.tokens == 3 * 64 and some.stream == rows.stream
    assert some.nbytes == pytest.approx(rows.nbytes * some.tokens / rows.tokens, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(100, 600))},
        {"stop_strings": ["the"]},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0},
    ],
)
def test_generation_is_greedy_whatever_the_folder_says(shipped, tmp_path, settings):
    """generation_config.json neither changes nor ends a greedy generation, of the model or of a base of its own."""
    from liger_cli.evaluation.samples import write_samples

    folder = shutil.copytree(shipped, tmp_path / "c", copy_function=os.link)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **settings}))
    base = shutil.copytree(BASE_DIR, tmp_path / "b", copy_function=shutil.copyfile)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **settings}))
    columns = ("base", "model")
    plain = write_samples(open_subject(shipped), TEXT, 1, columns)
    assert write_samples(open_subject(folder, against=str(base)), TEXT, 1, columns) == plain


@pytest.mark.parametrize("name", ["text.jsonl", "TEXT.JSONL"])
def test_texts_as_training_reads_them(tmp_path, name):
    """A byte order mark, line separators inside of a string, the suffix in any case, Windows' line ends."""
    texts = ["one\u2028two\x85three", "four"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / name).write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    assert read_texts(tmp_path / name) == texts
    assert [row["text"] for row in local_rows(tmp_path / name)] == texts
    (tmp_path / "text.txt").write_bytes("\ufeffplain".encode())
    assert read_texts(tmp_path / "text.txt") == ["plain"]


def test_the_default_text_is_none_that_was_fitted_on(shipped, capsys, monkeypatch):
    """A calibration reads Moby-Dick: what `eval` reads without --data is the other document, and is called so."""
    read = []
    monkeypatch.setattr(evaluate, "make_rows", lambda tokenizer, texts, *rest: read.append(texts) or make_rows(
        tokenizer, texts, *rest))  # fmt: skip
    report = evaluate.run(shipped, seq_len=64, rows=1, perplexity=True, save=False, quiet=True)
    assert read == [prose()[1:]] and "Ishmael" not in read[0][0]
    assert report["perplexity"]["text"]["name"] == "shipped prose (Opticks)"


def test_what_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="--format is 'xml'"):
        evaluate.run(str(tiny), output_format="xml")
    with pytest.raises(UsageError, match="nowhere.txt is not a file"):
        evaluate.run(str(tiny), data=str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(LigerError, match="holds no text"):
        read_texts(tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(LigerError, match="field `text`"):
        read_texts(tmp_path / "bad.jsonl")
    with pytest.raises(UsageError, match="--recall-distances is '3,x'"):
        evaluate.parse_distances("3,x")
    with pytest.raises(UsageError, match="--seq-len is 0"):
        evaluate.run(str(tiny), seq_len=0)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UsageError, match="has no liger.json"):
        evaluate.run(str(tmp_path / "plain"))


def test_loss_that_is_not_finite(tiny):
    import torch

    opened = open_subject(tiny)
    with torch.no_grad():
        opened.model.get_decoder().norm.weight.fill_(float("nan"))
    rows = make_rows(opened.tokenizer, ["w5 w6 w7 w8"], 8)
    with pytest.raises(LigerError, match="not finite"):
        score(opened, rows)


@pytest.fixture
def pets(tmp_path):
    """A local task of the harness with local data: the continuation that the context names is the right one."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = []
    for name, right, wrong in (
        ("Mia", "dog", "cat"),
        ("Tom", "owl", "fox"),
        ("Ben", "frog", "pig"),
        ("Ivy", "hen", "crow"),
    ):
        question = f"{name} has a kind {right}. It was cold. What pet does {name} have? {name} has a kind"
        lines.append(json.dumps({"question": question, "choices": [wrong, right], "answer": 1}))
    (folder / "pets.jsonl").write_text("\n".join(lines))
    task = {
        "task": "liger_pets",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "pets.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "pets.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_changes_no_task(shipped, pets, monkeypatch, tmp_path, side):
    """Whatever side the tokenizer pads on, and however many sequences a pass holds: the same figures."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    opened = open_subject(shipped)
    alone = run_tasks(opened, ("liger_pets",), include_path=str(pets), batch_size=1)
    opened.tokenizer.padding_side = side
    assert run_tasks(opened, ("liger_pets",), include_path=str(pets), batch_size=4) == alone
    assert run_tasks(opened, ("liger_pets",), include_path=str(pets)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_hub_task_without_network(shipped, liger, tmp_path, offline):
    """One sentence and exit code 4, whether the user said that there is no network or it is found out."""
    pytest.importorskip("lm_eval")
    # Nothing listens on the discard port: the hub cannot be reached, whatever the machine's own network.
    cut_off = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "")
    ran = liger("eval", shipped, "--tasks", "piqa", "--limit", 1, "--no-save", env={**cut_off, **proxies, **offline})
    assert ran.returncode == 4 and not ran.stdout
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("liger:")]
    assert sentence.startswith("liger: the data of piqa could not be had from the hub; check the network")
    assert "Traceback" not in ran.stderr


@pytest.mark.slow
def test_suites_are_in_the_harness():
    tasks = pytest.importorskip("lm_eval.tasks")
    known = tasks.TaskManager().all_tasks
    assert all(name in known for names in SUITES.values() for name in names)


@pytest.mark.slow
def test_ruler(shipped, monkeypatch):
    """Its tasks write their texts themselves, as long as asked for, by the model's own tokenizer."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("wonderwords")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_: False)
    found = run_tasks(open_subject(shipped), ("niah_single_1",), limit=1, metadata={"max_seq_lengths": [512]})
    assert set(found["base"]["niah_single_1"]) == {"512"}


@pytest.mark.slow
def test_local_task_offline(shipped, pets, capsys, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    options = {"tasks": "liger_pets", "include_path": str(pets), "save": False, "output_format": "json"}
    result = evaluate.run(str(shipped), batch_size=2, **options)
    assert json.loads(capsys.readouterr().out) == result
    values = result["tasks"]
    assert values["base"]["liger_pets"]["acc"]["value"] == 1
    assert values["chance"]["liger_pets"]["acc"] == 0.5 and set(values["recovery"]["liger_pets"]) == {"acc"}
    assert values["base"]["liger_pets"]["acc"]["higher_is_better"] is True
    assert values["details"]["liger_pets"]["examples"] == 4 and values["harness"]["lm_eval"]
    one = evaluate.run(str(shipped), batch_size=1, **options)["tasks"]
    assert [one[column] for column in COLUMNS] == [values[column] for column in COLUMNS]
    with pytest.raises(UsageError, match="liger_pet'.*did you mean liger_pets"):
        evaluate.run(str(shipped), **{**options, "tasks": "liger_pet"})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach the hub"), "could not be had from the hub"),
        (KeyError("x"), "the harness failed"),
        (ImportError("Please install wonderwords"), "needs a package that is missing (Please install wonderwords)"),
    ],
)
def test_failures_of_the_harness_are_sentences(error, words):
    from liger_cli.evaluation.harness import _as_sentence

    assert words in str(_as_sentence(error, ["piqa"]))


def test_suites():
    from liger_cli.evaluation.harness import _by_fewshot

    assert parse_tasks("paper, mine") == (
        "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu", "mine",
    )  # fmt: skip
    assert _by_fewshot(parse_tasks("piqa,mmlu"), None) == {None: ["piqa"], 5: ["mmlu"]}
    assert _by_fewshot(("piqa", "mmlu"), 2) == {2: ["piqa", "mmlu"]}
    with pytest.raises(UsageError, match="--tasks"):
        parse_tasks(",")


@pytest.fixture
def no_harness(monkeypatch):
    """lm-eval as far as its list of tasks, which is [piqa]; opening a model fails the test."""
    from types import SimpleNamespace

    from liger_cli.evaluation import harness

    tasks = SimpleNamespace(TaskManager=lambda include_path=None: SimpleNamespace(all_tasks=["piqa"]))
    monkeypatch.setattr(harness, "_import", lambda: (None, tasks, None))
    monkeypatch.setattr(evaluate, "open_subject", lambda *_, **__: pytest.fail("the model was opened"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": -3.0}, "--limit is -3"),
        ({"limit": 0.0}, "--limit is 0,"),
        ({"limit": 1.5}, "--limit is 1.5"),
        ({"limit": float("nan")}, "--limit is nan"),
        ({"limit": float("inf")}, "--limit is inf"),
        ({"num_fewshot": -1}, "--num-fewshot is -1"),
        ({"include_path": "nowhere"}, "--include-path names nowhere"),
        ({"tasks": "piqa,piqua"}, "--tasks names 'piqua'.*did you mean piqa"),
        ({"samples": -1}, "--samples is -1"),
        ({"recall_count": 0}, "--recall-count is 0"),
    ],
)
def test_refused_before_anything_is_measured(tiny, no_harness, options, words):
    """An evaluation takes hours; that a name is wrong is not found out at its end."""
    with pytest.raises(UsageError, match=words):
        evaluate.run(str(tiny), **{"tasks": "piqa", "recall": True, **options})


def test_a_missing_harness_is_found_out_first(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(evaluate, "open_subject", lambda *_, **__: pytest.fail("the model was opened"))
    with pytest.raises(SetupError, match="--tasks needs lm-evaluation-harness"):
        evaluate.run(str(tiny), tasks="piqa", recall=True)


def test_recovery_of_a_task_goes_by_what_is_better(subject, monkeypatch):
    def found(accuracy, perplexity):
        return {
            "t": {
                "acc": {"value": accuracy, "stderr": 0.01, "higher_is_better": True},
                "word_perplexity": {"value": perplexity, "stderr": None, "higher_is_better": False},
            }
        }

    columns = {"base": found(0.8, 4.0), "model": found(0.65, 8.0), "window_only": found(0.5, 16.0)}
    about = {"chance": {"t": {"acc": 0.5, "word_perplexity": 0.0}}, "details": {}, "harness": {}}
    monkeypatch.setattr(evaluate, "run_tasks", lambda *_, **__: {**columns, **about})
    measured = lambda: evaluate.evaluate(subject, parts=(), tasks=("t",))["tasks"]["recovery"]["t"]  # noqa: E731
    assert measured() == {"acc": pytest.approx(0.5), "word_perplexity": pytest.approx(0.5)}
    columns["model"] = found(0.44, None)
    assert measured() == {"acc": pytest.approx(-0.2), "word_perplexity": None}
    columns["base"] = found(0.51, 4.0)  # within two standard errors of chance
    assert measured()["acc"] is None


def test_chance_of_a_task():
    """1 / choices of the examples that ran, 0 where text is scored, unknown where a metric counts no right answers."""
    from liger_cli.evaluation.harness import _chance

    sample = lambda choices: {"filtered_resps": [0] * choices}  # noqa: E731
    results = {
        "configs": {
            "two": {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]},
            "some": {"output_type": "multiple_choice"},
            "twice": {"output_type": "multiple_choice", "metric_list": [{"metric": "acc_mutual_info"}]},
            "own": {"output_type": "multiple_choice", "process_results": "a function"},
            "words": {"output_type": "loglikelihood"},
        },
        "samples": {
            "two": [sample(2)] * 3, "some": [sample(4), sample(5)], "twice": [sample(8)], "own": [sample(2)],
        },
        "group_subtasks": {"both": ["two", "some"], "mixed": ["two", "own"]},
        "n-samples": {"two": {"effective": 3}, "some": {"effective": 2}, "own": {"effective": 1}},
    }  # fmt: skip
    assert _chance(results, "two", "acc") == 0.5 and _chance(results, "two", "f1") is None
    assert _chance(results, "some", "acc_norm") == pytest.approx(0.225)
    assert _chance(results, "twice", "acc") == 0.25 and _chance(results, "own", "acc") is None
    assert _chance(results, "words", "acc") == 0.0
    assert _chance(results, "both", "acc") == pytest.approx((3 * 0.5 + 2 * 0.225) / 5)
    assert _chance(results, "mixed", "acc") is None


def test_what_the_harness_says_of_a_task():
    from liger_cli.evaluation.harness import _details, _of_task

    results = {
        "results": {"t": {"alias": "t", "acc,none": 1.0, "acc_stderr,none": "N/A", "ppl,none": float("inf")}},
        "higher_is_better": {"t": {"acc": True, "ppl": False}},
        "n-shot": {"t": 5},
        "versions": {"t": 1.0},
        "n-samples": {"t": {"original": 9, "effective": 3}},
    }
    assert _of_task(results, "t") == {
        "t": {
            "acc": {"value": 1.0, "stderr": None, "higher_is_better": True},
            "ppl": {"value": None, "stderr": None, "higher_is_better": False},
        }
    }
    assert _details(results, "t") == {"num_fewshot": 5, "version": 1.0, "examples": 3}
    results["group_subtasks"] = {"group": ["part", "t"], "part": ["t"], "t": []}
    assert _details(results, "group") == {"num_fewshot": None, "version": None, "examples": 6}


def test_groups_without_figures_give_those_of_their_tasks():
    from liger_cli.evaluation.harness import _of_task

    results = {
        "results": {"ruler": {"4096,none": -1, "4096_stderr,none": "N/A"}, "a": {"8192,none": 0.5, "4096,none": -1}},
        "group_subtasks": {"ruler": ["a"], "a": []},
    }
    assert _of_task(results, "ruler") == {"a": {"8192": {"value": 0.5, "stderr": None, "higher_is_better": None}}}


def test_automatic_batch_size_is_bounded(subject):
    """On a CPU it follows from the logits' memory; the harness's own search would take all there is."""
    from types import SimpleNamespace

    import torch

    from liger_cli.evaluation.harness import _automatic_batch_size

    assert 1 <= _automatic_batch_size(subject.liger_model) <= 16
    config = SimpleNamespace(max_position_embeddings=131072, vocab_size=128256)
    assert _automatic_batch_size(SimpleNamespace(device=torch.device("cpu"), config=config)) == 1
    assert _automatic_batch_size(SimpleNamespace(device=torch.device("cuda"), config=config)) == "auto"


def test_options_as_text():
    assert evaluate.parse_batch_size("auto") is None and evaluate.parse_batch_size("8") == 8
    with pytest.raises(UsageError, match="--batch-size is '0'"):
        evaluate.parse_batch_size("0")
    assert parse_metadata('{"max_seq_lengths": [512]}') == {"max_seq_lengths": [512]} and parse_metadata(None) is None
    for wrong in ("[1]", "{"):
        with pytest.raises(UsageError, match="--metadata"):
            parse_metadata(wrong)


@pytest.mark.parametrize("kind", ["key_value", "multi"])
def test_recall_is_the_same_in_any_batch(subject, kind):
    """Prompts of unlike lengths, padded on the left to generate and on the right to score."""
    probes = make_probes(kind, subject.tokenizer, 90, 3) + make_probes(kind, subject.tokenizer, 40, 3)
    for column in COLUMNS:
        with subject.column(column) as model:
            for way in (teacher_forced, generated):
                alone = sum(way(model, [probe], subject.tokenizer) for probe in probes)
                assert way(model, probes, subject.tokenizer) == alone


def test_samples_as_rows(shipped, capsys):
    evaluate.run(str(shipped), samples=1, save=False, output_format="csv")
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["prompt", "base", "model", "window only"] and len(rows) == 2 and all(rows[1])


def test_samples_of_a_single_text(subject, tmp_path):
    """A plain text is one document: further prompts stand further on in it, as many as there are."""
    from liger_cli.evaluation.samples import PROMPT_TOKENS, write_samples

    text = " ".join(held_out_text(4000))
    pieces = len(subject.tokenizer(text).input_ids) // PROMPT_TOKENS
    samples = write_samples(subject, [text, "Mia has a dog"], 2 + pieces, columns=("base",))
    prompts = [sample["prompt"] for sample in samples]
    assert pieces > 2 and len(prompts) == 1 + pieces and prompts[1] == "Mia has a dog"
    assert "".join([prompts[0], *prompts[2:]]) == text[: sum(map(len, prompts)) - len(prompts[1])]


def test_samples_are_greedy_generations(shipped, capsys):
    import torch

    result = evaluate.run(str(shipped), samples=1, save=False)
    (sample,) = result["samples"]
    out = capsys.readouterr().out
    assert sample["prompt"][:20] in out and "window only:" in out
    opened = open_subject(shipped)
    ids = opened.tokenizer(sample["prompt"], return_tensors="pt").input_ids
    with opened.column("base") as model, torch.inference_mode():
        for _ in range(5):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert sample["base"].startswith(opened.tokenizer.decode(ids[0, -5:]))
