"""The three objectives against their definitions, and the teacher that is the same weights."""

import pytest
import torch
import torch.nn.functional as F

from liger_cli import convert, objectives
from liger_cli.data import IGNORED
from liger_cli.recipes import Stage
from liger_cli.templates.liger_gates import GATES


@pytest.fixture
def trained(tiny_base, tmp_path):
    """trained(**settings) -> (model with a LoRA that does something, the original model)."""

    def make(**settings):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from liger_cli.modeling import load_model

        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        convert.convert(str(tiny_base()), str(folder), settings={"window": 8, **settings})
        model = load_model(folder, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5)
        model.__class__ = objectives.TrainedModel
        return model.train(), AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)

    return make


def batch(lengths=(40, 23, 31)):
    torch.manual_seed(2)
    input_ids = torch.randint(4, 128, (len(lengths), max(lengths)))
    labels = input_ids.clone()
    labels[:, :5] = IGNORED
    for row, length in enumerate(lengths):
        input_ids[row, length:], labels[row, length:] = 0, IGNORED
    return {"input_ids": input_ids, "labels": labels, "lengths": torch.tensor(lengths)}


def loss_of(model, stage, inputs):
    return objectives.objective_sum(model, stage, **inputs)


@pytest.mark.parametrize("gate", sorted(GATES))
def test_documents_side_by_side_are_documents_alone(trained, gate):
    """Packing leaks nothing: loss and gradients are the sums of the documents' own, for every gate and objective."""
    model, _ = trained(gate=gate)
    inputs = batch()
    for objective in ("ce", "distill"):
        gradients = []
        alone = []
        for length, *one in zip(inputs["lengths"], inputs["input_ids"], inputs["labels"], strict=True):
            ids, labels = (tensor[None, :length] for tensor in one)
            alone.append({"input_ids": ids, "labels": labels, "lengths": length[None]})
        for parts in ([inputs], alone):
            model.zero_grad()
            total = sum(loss_of(model, Stage(objective), part) for part in parts)
            total.backward()
            gradients.append((total.detach(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]))
        for together, separate in zip(*gradients, strict=True):
            torch.testing.assert_close(together, separate, rtol=2e-4, atol=2e-4)


def test_ce_is_the_models_own_loss(trained):
    model, _ = trained()
    inputs = batch()
    logits = model.get_base_model()(input_ids=inputs["input_ids"]).logits
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(loss_of(model, Stage("ce"), inputs), wanted)


def test_distill_is_the_kl_to_the_original_checkpoint(trained):
    model, original = trained()
    inputs = batch()
    wanted = 0.0
    with torch.no_grad():
        student = model.get_base_model()(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        teacher = original(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        for row, length in enumerate(inputs["lengths"]):
            kl = (teacher[row, :length].exp() * (teacher[row, :length] - student[row, :length])).sum()
            wanted += kl
    found = loss_of(model, Stage("distill"), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert found > 1
    modes = {module.liger_mode for module in model.get_base_model().get_decoder().liger_attentions()}
    assert modes == {"liger"}


@pytest.mark.parametrize("objective", ["distill", "transfer"])
def test_teacher_is_the_same_weights(trained, objective):
    """Both passes read the same storage, and the objective allocates nothing of a weight's size."""
    model, _ = trained()
    weight = model.get_base_model().get_decoder().layers[0].self_attn.q_proj.base_layer
    seen = []
    weight.register_forward_hook(lambda module, *_: seen.append(module.weight.data_ptr()))
    loss_of(model, Stage(objective), batch()).backward()
    assert len(seen) == 2 and len(set(seen)) == 1
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


def test_transfer_matches_layer_outputs_on_the_originals_inputs(trained):
    model, original = trained()
    inputs = batch((24, 24))
    outputs, arguments = {}, {}
    for index, layer in enumerate(original.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, index=index: (
                (
                    outputs.__setitem__(index, output[0]),
                    arguments.__setitem__(index, kwargs),
                )[:0]
                or None
            ),
            with_kwargs=True,
        )
    wanted = 0.0
    with torch.no_grad():
        original(input_ids=inputs["input_ids"])
        attentions = model.get_base_model().get_decoder().liger_attentions()
        for index, module in enumerate(attentions):
            kwargs = {name: arguments[index][name] for name in ("hidden_states", "position_embeddings")}
            found = module(**kwargs, attention_mask=None)[0]
            error = (found - outputs[index]).square().mean(-1).sum()
            wanted += error / outputs[index].square().mean() / len(attentions)
    found = loss_of(model, Stage("transfer"), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("objective", ["ce", "distill"])
def test_chunks_change_nothing(trained, objective, monkeypatch):
    model, _ = trained()
    inputs = batch()
    results = []
    for elements in (1 << 25, 128 * 7):
        monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", elements)
        model.zero_grad()
        loss = loss_of(model, Stage(objective, ce_weight=0.3), inputs)
        loss.backward()
        results.append((loss.detach(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)


def test_window_dropout_trains_the_recurrence_alone_and_is_undone(trained):
    model, _ = trained()
    inputs = batch()
    plain = loss_of(model, Stage("ce"), inputs)
    specs = [module.liger_spec for module in model.get_base_model().get_decoder().liger_attentions()]
    dropped = [loss_of(model, Stage("ce", window_dropout=0.99), inputs) for _ in range(3)]
    assert all((loss - plain).abs() > 1e-3 for loss in dropped)
    assert [module.liger_spec for module in model.get_base_model().get_decoder().liger_attentions()] == specs
    model.eval()
    torch.testing.assert_close(loss_of(model, Stage("ce", window_dropout=0.99), inputs), plain)
