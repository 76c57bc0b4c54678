"""The three objectives against their definitions, and the teacher that is the same weights."""

from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from liger_cli.commands import convert
from liger_cli.templates.liger_gates import GATES
from liger_cli.training import objectives
from liger_cli.training.data import IGNORED, Example
from liger_cli.training.packing import Collator
from liger_cli.training.recipes import Stage


@pytest.fixture
def trained(tiny_base, tmp_path):
    """trained(softmax_layers, family, settings, **load) -> (model with a LoRA that does something, the original)."""

    def make(softmax_layers="none", family="qwen3", **load):
        settings = {"window": 8, **load.pop("settings", {})}
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from liger_cli.checkpoint.model_code import load_model

        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        base = tiny_base(family)
        convert.convert(str(base), str(folder), settings=settings, softmax_layers=softmax_layers)
        model = load_model(folder, dtype=torch.float32, **load)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5)
        model.__class__ = objectives.TrainedModel
        return model.train(), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    return make


def documents(lengths=(40, 23, 31)):
    torch.manual_seed(2)
    ids = [torch.randint(4, 128, (length,)) for length in lengths]
    return [Example(one.numpy(), np.where(np.arange(len(one)) < 5, IGNORED, one.numpy())) for one in ids]


def batch(lengths=(40, 23, 31)):
    """A document a row."""
    return Collator(0)([[[one] for one in documents(lengths)]])


def loss_of(model, stage, inputs):
    return objectives.objective_sum(model, stage, **inputs)


def loss_and_gradients(model, stage, batches):
    model.zero_grad()
    total = sum(loss_of(model, stage, inputs) for inputs in batches)
    total.backward()
    return total.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        # float32 sums of terms up to 1e3 in another order, through four layers; torch 2.7's reach 2.5e-4
        torch.testing.assert_close(one, other, rtol=2e-4, atol=5e-4)


@pytest.mark.parametrize("gate", sorted(GATES))
def test_documents_in_a_row_are_documents_alone(trained, gate):
    """Packing leaks nothing: loss and gradients are the sums of the documents' own, for every gate and objective."""
    model, _ = trained(settings={"gate": gate, "sinks": 2})
    docs = documents((40, 23, 31, 3, 1))
    packed = Collator(0)([[docs[:2], docs[2:]]])
    assert packed["position_ids"].diff(dim=1).min() < 0
    for objective in ("ce", "distill"):
        found = loss_and_gradients(model, Stage(objective), [packed])
        alone = [Collator(0)([[[one]]]) for one in docs]
        assert_same(found, loss_and_gradients(model, Stage(objective), alone))
    # Transfer is relative to the micro-batch's mean square, so that it is the same micro-batch, side by side.
    for objective in ("transfer", "transfer-heads"):
        found = loss_and_gradients(model, Stage(objective), [packed])
        assert_same(found, loss_and_gradients(model, Stage(objective), [Collator(0)([[[one] for one in docs]])]))


@pytest.mark.parametrize(
    "family, attention",
    [("qwen3", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager"), ("granitemoe", "sdpa"), ("cohere2", "sdpa")],
)
def test_softmax_layers_and_the_teacher_do_not_leak_either(trained, family, attention):
    """A hybrid of every kind of layer, under both implementations of softmax attention."""
    # Cohere 2's first three layers are local, and stay what they are.
    model, _ = trained("none" if family == "cohere2" else "1", family, attn_implementation=attention)
    docs = documents((40, 23, 31))
    for objective in ("ce", "distill", "transfer"):
        found = loss_and_gradients(model, Stage(objective), [Collator(0)([[docs]])])
        assert_same(found, loss_and_gradients(model, Stage(objective), [Collator(0)([[[one] for one in docs]])]))


def test_a_text_in_a_row_reads_nothing_of_the_one_before(trained):
    """Another first document leaves the second's hidden states as they were, bit for bit."""
    model, _ = trained("3")
    model.eval()
    first, second, other = documents((23, 31, 23))
    states = []
    for before in (first, other):
        inputs = Collator(0)([[[before, second]]])
        with torch.no_grad():
            states.append(objectives.hidden_states(model, inputs["input_ids"], inputs["position_ids"])[0, 23:])
    assert torch.equal(*states)


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


@pytest.mark.parametrize("objective", ["transfer", "transfer-heads"])
@pytest.mark.parametrize("settings", [{}, {"kept": 8, "rest": True, "gate": "none", "mix": 0.0, "sinks": 2}])
def test_transfer_with_gradient_checkpointing(trained, objective, settings):
    """Attentions run by themselves are computed again, too: the same loss and gradients, and nothing left hooked."""
    model, _ = trained(settings=settings)
    wanted = loss_and_gradients(model, Stage(objective), [batch()])
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(one.gradient_checkpointing for one in base.get_decoder().liger_attentions())
    assert_same(loss_and_gradients(model, Stage(objective), [batch()]), wanted)


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


@pytest.mark.parametrize("family", ["qwen3", "phi", "starcoder2"])
def test_transfer_of_heads_is_lolcats(trained, family):
    """1000 times the mean squared difference of what the output projections are given, both on the original's inputs;
    no gradient reaches those projections."""
    model, original = trained(family=family)
    inputs = batch((24, 24))
    wanted, given, arguments = [], {}, {}
    name = "dense" if family == "phi" else "o_proj"
    with torch.no_grad():
        for index, layer in enumerate(original.model.layers):
            keep = lambda module, args, index=index: given.__setitem__(index, args[0])  # noqa: E731
            getattr(layer.self_attn, name).register_forward_pre_hook(keep)
            keep = lambda module, args, kwargs, index=index: arguments.__setitem__(index, kwargs)  # noqa: E731
            layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
        original.eval()(input_ids=inputs["input_ids"])
        model.eval()
        for index, module in enumerate(model.get_base_model().get_decoder().liger_attentions()):
            found = []
            hook = getattr(module, name).register_forward_pre_hook(
                lambda module, args, found=found: found.append(args[0])
            )
            kwargs = {key: arguments[index][key] for key in ("hidden_states", "position_embeddings")}
            module(**kwargs, attention_mask=None)
            hook.remove()
            wanted.append(1000 * F.mse_loss(found[0], given[index]))
    loss = loss_of(model, Stage("transfer-heads"), inputs)
    torch.testing.assert_close(loss / inputs["lengths"].sum(), sum(wanted) / len(wanted), rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for key, p in model.named_parameters() if "lora_B" in key)


def test_the_mean_of_rows(trained):
    """Each row's mean over its own predicted tokens, whatever the micro-batches; a row without any does not count."""
    model, _ = trained()
    rows = [documents((40, 3)), documents((23,)), documents((31, 9))]
    silent = Example(np.arange(4, 24), np.full(20, IGNORED))
    batches = [Collator(0)([[[*rows[0]], [*rows[1]]]]), Collator(0)([[[*rows[2]], [silent]]])]
    means = []
    for row in rows:
        inputs = Collator(0)([[row]])
        means.append(loss_of(model, Stage("ce"), inputs) / objectives.counts(inputs["labels"], inputs["lengths"])[0])
    model.loss_mean = "rows"
    totals = torch.tensor([objectives.counts(one["labels"], one["lengths"]) for one in batches]).sum(0)
    found = sum(loss_of(model, Stage("ce"), one) for one in batches) / objectives.divisor(model, Stage("ce"), totals)
    torch.testing.assert_close(found, sum(means) / 3, rtol=1e-4, atol=1e-5)
    assert len({round(mean.item(), 3) for mean in means}) == 3


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
    attentions = model.get_base_model().get_decoder().liger_attentions()
    specs = [module.liger_spec for module in attentions]
    with objectives.window_dropout(model, 0.99, Random(0)):
        assert {module.liger_spec.mix for module in attentions} == {1.0}
        assert (loss_of(model, Stage("ce"), inputs) - plain).abs() > 1e-3
    assert [module.liger_spec for module in attentions] == specs
    torch.testing.assert_close(loss_of(model, Stage("ce"), inputs), plain, rtol=0, atol=0)
    dropped = 0
    for seed in range(100):
        with objectives.window_dropout(model, 0.25, Random(seed)):
            dropped += sum(module.liger_spec.mix == 1.0 for module in attentions)
    assert 70 < dropped < 130  # of 400 draws; 5 standard deviations are 43
