"""NaN and overflow are reported with where they came from: the layer, its part, and the step of a training run."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import linearized_with_extras

from liger_cli.checkpoint.model_code import load_model
from liger_cli.commands import convert, finetune
from liger_cli.evaluation import scoring
from liger_cli.evaluation.finite import first_non_finite
from liger_cli.evaluation.scoring import make_rows, score
from liger_cli.evaluation.subject import open_subject
from liger_cli.system.errors import LigerError
from liger_cli.training import trainer as training


@pytest.fixture(scope="module")
def converted(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny-liger-gla"
    convert.convert(str(tiny_base()), str(folder), settings={"window": 8})
    return folder


@pytest.fixture
def model(converted):
    return load_model(converted, dtype=torch.float32).eval()


def found(model):
    ids = torch.arange(4, 24)[None]
    return first_non_finite(model, lambda: model(input_ids=ids, use_cache=False))


def test_the_first_of_them_is_named(model):
    assert found(model) is None
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
        assert found(model) == "the output layer, whose weight is not finite either"
        model.get_decoder().norm.weight[0] = float("inf")
        assert found(model).startswith("the model's end, whose ")
        model.get_decoder().layers[2].mlp.down_proj.weight[0, 0] = float("nan")
        assert found(model) == "layer 2 (mlp), whose down_proj.weight is not finite either"
        model.get_decoder().layers[1].self_attn.v_proj.weight.fill_(1e38)
        assert found(model) == "layer 1 (self_attn)"
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_what_was_fitted_on_nan_is_not_blamed(tiny_base):
    """Of a layer's weights the base's own come first: liger's are NaN because these are."""
    _, model = linearized_with_extras(tiny_base(), window=8, kept=4)
    attention = model.get_decoder().layers[1].self_attn
    with torch.no_grad():
        attention.keep_score.fill_(float("nan"))
        attention.q_proj.weight[0, 0] = float("nan")
        assert found(model) == "layer 1 (self_attn), whose q_proj.weight is not finite either"


def test_a_loss_beyond_what_a_float_holds():
    """exp(709) is the last that is a float: the perplexity is the largest one then, and no error."""
    assert scoring._exp(2.0) == pytest.approx(7.389, abs=1e-3)
    assert scoring._exp(1e5) == sys.float_info.max > scoring._exp(708.0)


def test_overflow_of_float16(converted):
    """Finite weights, a value beyond 65504 in one layer's feed-forward part: eval says which, and what to try."""
    subject = open_subject(converted, dtype="float16")
    with torch.no_grad():
        subject.model.get_decoder().layers[3].mlp.up_proj.weight.fill_(60000.0)
    rows = make_rows(subject.tokenizer, ["w5 w6 w7 w8 w9"], 8)
    with pytest.raises(LigerError, match=r"not finite in float16, first in layer 3 \(mlp\); try --dtype float32"):
        score(subject, rows)


def test_a_run_that_diverges(converted, tmp_path, monkeypatch):
    """The step at which the loss is lost, and the layer. The first update is infinitely large."""
    monkeypatch.setattr(training, "lr_factor", lambda *_: float("inf"))
    data = tmp_path / "text.jsonl"
    data.write_text(
        "".join(json.dumps({"text": " ".join(f"w{4 + i % 90}" for i in range(n, n + 40))}) + "\n" for n in range(40))
    )
    (tmp_path / "constant.yaml").write_text(
        "seq_len: 48\nbatch_size: 4\nmicro_batch_size: 2\nheld_out: 0\nschedule: constant\n"
    )
    recipe = str(tmp_path / "constant.yaml")
    with pytest.raises(LigerError, match=r"at step 2, first in layer 0 \(self_attn\), whose .*lora_\w.* is not"):
        finetune.run(converted, data=str(data), output=tmp_path / "out", max_steps=4, recipe=recipe, quiet=True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"calibrate": True, "settings": {"window": 4, "kept": 8}}, "the calibration"),
        ({"softmax_layers": "auto:1", "settings": {"window": 4}}, "the measurement"),
        (
            {"calibrate": True, "calibration_data": "self", "settings": {"window": 4, "kept": 8}},
            "writing a text to calibrate on",
        ),
    ],
)
def test_a_base_that_overflows_while_it_is_measured(tiny_base, tmp_path, options, what):
    """Finite weights, an infinite product: the layer is named, and nothing is written."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i % 90}" for i in range(4000)))
    with pytest.raises(LigerError, match=rf"{what} gave numbers .* first in layer 1 \(mlp\): the base's own"):
        convert.convert(str(base), str(tmp_path / "out"), **{"calibration_data": str(text), **options})
    assert not (tmp_path / "out").exists()
