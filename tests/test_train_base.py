"""What trains the shipped base: its answers' weights, its rows and its optimizer."""

import pytest
import torch

from liger_cli.shipped import BASE_DIR
from study.train_base import RECIPE
from study.trainer import Float32Muon, answer_mask, pack_rows


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_DIR)


def test_the_tokenizer_is_the_shipped_one(tokenizer):
    assert RECIPE.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_answers_are_what_follows_a_question(tokenizer):
    text = "Mia keeps a red cup. What does Mia keep? A red cup. Ben ran. Where is Ben? At the mill. Tom sat."
    rows = torch.tensor([tokenizer(text)["input_ids"]])
    mask = answer_mask(tokenizer, rows)[:, :-1]
    assert tokenizer.decode(rows[:, 1:][mask]) == " A red cup. At the mill."


def test_rows_hold_whole_documents(tokenizer):
    kinds = {"recall": 0.5, "story": 0.5}
    rows = pack_rows(tokenizer, 7, 4, 256, kinds)
    assert rows.shape == (4, 257) and torch.equal(rows, pack_rows(tokenizer, 7, 4, 256, kinds))
    for row in rows.tolist():
        ids = row[: row.index(tokenizer.pad_token_id)] if tokenizer.pad_token_id in row else row
        assert ids[-1] == tokenizer.eos_token_id and set(row[len(ids) :]) <= {tokenizer.pad_token_id}
        assert len(ids) > 100


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_muon_in_float32_is_torchs(shape):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
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
