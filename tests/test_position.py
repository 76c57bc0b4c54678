"""Loss and KL by position, needles and second readings: against figures by hand, and models that know the answer."""

import math
from types import SimpleNamespace

import pytest
import torch

from liger_cli.checkpoint.model_code import load_model
from liger_cli.commands.convert import convert
from liger_cli.evaluation import position
from liger_cli.evaluation.position import buckets, make_needles, modes, needle, score_positions, second_reading
from liger_cli.evaluation.subject import padding_tokenizer
from liger_cli.shipped import BASE_DIR
from liger_cli.system.errors import LigerError


def test_buckets():
    assert buckets(40) == [(0, 40)]
    assert buckets(2048) == [(0, 64), (64, 256), (256, 1024), (1024, 2048)]
    assert buckets(9000)[3:] == [(1024, 2048), (2048, 4096), (4096, 8192), (8192, 9000)]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("gemma2", {"final_logit_softcapping": 0.5, "sliding_window": 64}),
    ],
)
def test_figures_by_hand(tiny_base, tmp_path, monkeypatch, family, settings):
    """Pieces of the logits, rows of unequal length and families that change the logits: as from all logits at once."""
    convert(str(tiny_base(family, **settings)), str(tmp_path / "out"), settings={"window": 8})
    model = load_model(tmp_path / "out", dtype=torch.float32).eval()
    monkeypatch.setattr(position, "PIECE_BYTES", 4 * 2 * 128 * 7)  # seven positions at a time
    monkeypatch.setattr(position, "EDGES", (16, 64))
    torch.manual_seed(0)
    ids, lengths = torch.randint(4, 128, (3, 81)), torch.tensor([80, 50, 80])
    columns = modes(model)
    found = score_positions(columns, ids, lengths, batch_size=2)
    assert list(found) == ["base", "model", "window_only"]
    log_p = {}
    for name, opened in columns.items():
        with opened(), torch.no_grad():
            log_p[name] = model(ids[:, :-1]).logits.double().log_softmax(-1)
    counted = torch.arange(80)[None] < lengths[:, None]
    for name, positions in found.items():
        loss = -log_p[name].gather(-1, ids[:, 1:, None])[..., 0]
        kl = (log_p["base"].exp() * (log_p["base"] - log_p[name])).sum(-1)
        for bucket, (first, last) in {"1-16": (0, 16), "17-64": (16, 64), "65-80": (64, 80)}.items():
            there = counted[:, first:last]
            for figure, values in (("loss", loss), ("kl", kl)):
                wanted = float(values[:, first:last][there].mean())
                assert positions.by_bucket(figure)[bucket] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert positions.mean("kl") == pytest.approx(float(kl[counted].mean()), rel=1e-4, abs=1e-6)
        same = log_p["base"].argmax(-1) == log_p[name].argmax(-1)
        assert positions.mean("top1") == pytest.approx(float(same[counted].double().mean()))
    assert found["model"].mean("kl") > 0.0001 > found["base"].mean("kl")
    assert model.get_decoder().liger_attentions()[0].liger_mode == "liger"
    assert "forward" not in model.get_decoder().__dict__


def test_a_column_that_is_not_finite(tiny_base, tmp_path):
    convert(str(tiny_base()), str(tmp_path / "out"))
    model = load_model(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_decoder().layers[2].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(LigerError, match=r"the base column of here has a loss that is not finite .* layer 2 \(mlp\)"):
        score_positions(modes(model), torch.arange(4, 24)[None], whose=" of here")


class Oracle(torch.nn.Module):
    """Predicts the next token of a row for sure where `knows(row, position)`, else an evenly unlikely one."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, vocabulary, knows):
        super().__init__()
        self.vocabulary, self.knows = vocabulary, knows
        self.decoder = torch.nn.Identity()

    def get_decoder(self):
        return self.decoder

    def forward(self, input_ids, use_cache, logits_to_keep):
        ids = self.decoder(input_ids)
        logits = torch.zeros(len(ids), len(logits_to_keep), self.vocabulary)
        for row in range(len(ids)):
            for index, place in enumerate(logits_to_keep.tolist()):
                if place + 1 < ids.shape[1] and self.knows(ids[row].tolist(), place):
                    logits[row, index, ids[row, place + 1]] = 50.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def opened():
    """opened(model): a column."""
    from contextlib import nullcontext

    return lambda model: lambda: nullcontext(model)


@pytest.fixture(scope="module")
def tokenizer():
    return padding_tokenizer(BASE_DIR, None)


def test_needles_stand_at_their_distance(tokenizer):
    text = tokenizer("Lily walked to the old mill and found a small red box. " * 200)["input_ids"]
    rows = make_needles(tokenizer, text, 300, 6, seed=1)
    begins = set()
    for row in rows:
        answer = row.tokens[-row.answer :]
        places = [i for i in range(len(row.tokens)) if row.tokens[i : i + row.answer] == answer]
        assert len(places) == 2 and places[1] - places[0] - row.answer == 300
        assert tokenizer.decode(answer).strip().isdigit()
        begins.add(places[0])
        assert places[0] > position.BEFORE[0]  # out of the reach of sinks
    assert len(begins) == 6
    assert make_needles(tokenizer, text, 300, 6, seed=1) == rows != make_needles(tokenizer, text, 300, 6, seed=2)
    with pytest.raises(ValueError, match="needle 8 tokens back"):
        make_needles(tokenizer, text, 8, 1, seed=0)
    with pytest.raises(ValueError, match="needle 900 tokens back"):
        make_needles(tokenizer, text[:900], 900, 1, seed=0)


def test_a_tokenizer_without_digits(tiny_base, opened, capsys):
    """Codes that come out as unknown words would all look alike: nothing is asked."""
    tokenizer = padding_tokenizer(tiny_base(), None)
    with pytest.raises(ValueError, match="does not spell"):
        make_needles(tokenizer, [5] * 900, 128, 1, seed=0)
    assert needle({"base": opened(None)}, tokenizer, [5] * 900, distances=(128,), count=1) == {"base": {}}
    assert "left out: needles 128 tokens back, since the tokenizer does not spell" in capsys.readouterr().err


def test_needles_found(tokenizer, opened):
    """One model knows all, one all but the answer's last token, one nothing; what does not fit is left out."""
    text = tokenizer("Lily walked to the old mill and found a small red box. " * 60)["input_ids"]
    size = len(tokenizer)
    tokens = [row.tokens for row in make_needles(tokenizer, text, 128, 4, seed=3)]
    ends = {tuple(row): len(row) for row in tokens}

    def but_last(row, place):
        mine = next(whole for whole in ends if tuple(row[: len(whole)]) == whole)
        return place + 1 < ends[mine] - 1

    columns = {
        "all": opened(Oracle(size, lambda row, place: True)),
        "but_last": opened(Oracle(size, but_last)),
        "nothing": opened(Oracle(size, lambda row, place: False)),
    }
    found = needle(columns, tokenizer, text, distances=(128, 5000), count=4, seed=3)
    assert all(list(values) == ["128"] for values in found.values())
    assert found["all"]["128"] == {"exact": 1.0, "digits": 1.0}
    assert found["nothing"]["128"] == {"exact": 0.0, "digits": 0.0}
    assert found["but_last"]["128"]["exact"] == 0.0
    assert 0.5 <= found["but_last"]["128"]["digits"] < 1.0


def test_second_reading(opened):
    """A model that copies from 500 tokens back loses nothing; one that knows nothing loses log V."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 1000, (2000,), generator=generator).tolist()
    copies = Oracle(1000, lambda row, place: place >= 500 and row[place + 1 - 500] == row[place + 1])
    columns = {"copies": opened(copies), "nothing": opened(Oracle(1000, lambda row, place: False))}
    found = second_reading(columns, text, gap=300, count=2, seed=0)
    assert found["copies"] < 1e-6
    assert found["nothing"] == pytest.approx(math.log(1000), rel=1e-4)
    with pytest.raises(ValueError, match="100 tokens"):
        second_reading(columns, text[:100])
