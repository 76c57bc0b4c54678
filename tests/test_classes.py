"""The classes of a converted folder: plain ones, which pickle, map to auto classes, and refuse what they cannot do."""

import ast
import inspect
import multiprocessing
import pickle
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import transformers
from test_model import close, linearized, tokens
from test_precision import linearized_with_extras
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from liger_cli import templates
from liger_cli.checkpoint.families import FAMILIES
from liger_cli.checkpoint.model_code import MODULES, load_model, model_files
from liger_cli.commands.convert import convert

TEMPLATES = Path(templates.__file__).parent


@pytest.fixture(scope="module")
def folder(tiny_base, tmp_path_factory):
    made = tmp_path_factory.mktemp("classes") / "made"
    convert(str(tiny_base("llama")), str(made), settings={"window": 8, "sinks": 2})
    return made


def load(folder, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


def _logits_elsewhere(data: bytes, queue) -> None:
    queue.put(pickle.loads(data)(tokens(20)).logits.detach().numpy())


@pytest.mark.parametrize("loader", [load, load_model], ids=["the folder's code", "liger's own code"])
def test_models_pickle(folder, tmp_path, loader):
    """In one process, by torch.save, and into a worker started anew."""
    model = loader(folder).eval()
    expected = model(tokens(20)).logits
    data = pickle.dumps(model)
    assert torch.equal(pickle.loads(data)(tokens(20)).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(tokens(20)).logits, expected)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_logits_elsewhere, args=(data, queue))
    worker.start()
    found = queue.get(timeout=600)
    worker.join()
    assert torch.equal(torch.from_numpy(found), expected)


def test_tracebacks_have_lines(folder):
    """Of the folder's classes and of liger's own, which are rendered when they are imported."""
    for model in (load(folder), load_model(folder)):
        for part in (model, model.model, model.model.layers[0].self_attn):
            assert type(part).__name__ in inspect.getsource(type(part))


@torch.no_grad()
def test_auto_model(folder, tmp_path):
    """AutoModel gives the decoder alone, and its saved folder loads again."""
    whole, decoder = load(folder), load(folder, AutoModel)
    assert type(decoder).__name__ == "LigerLlamaModel"
    hidden = decoder(tokens(30)).last_hidden_state
    assert torch.equal(whole.lm_head(hidden), whole(tokens(30)).logits)
    assert len(decoder(tokens(30), output_hidden_states=True).hidden_states) == 5
    decoder.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", AutoModel)(tokens(30)).last_hidden_state, hidden)


def test_sequence_classification(folder, tmp_path):
    """A head on the last token, as the base has: it sees no padding, trains, saves and loads again."""
    model = load(folder, AutoModelForSequenceClassification, num_labels=3)
    assert type(model).__name__ == "LigerLlamaForSequenceClassification"
    ids, mask = tokens(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    ids[1, 12:], mask[1, 12:] = 0, 0
    output = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    close(output.logits[1], model(ids[1:, :12]).logits[0])
    output.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", AutoModelForSequenceClassification)
    assert torch.equal(again(ids, attention_mask=mask).logits, output.logits)
    assert again.config.num_labels == 3


def test_generation_in_pages_is_refused(folder):
    model = load(folder)
    with pytest.raises(ValueError, match="no place for the recurrent state"):
        model.generate_batch(inputs=[tokens(5)[0].tolist()])
    with pytest.raises(ValueError, match="no place for the recurrent state"):
        model.init_continuous_batching()
    for part in (model, model.model, load(folder, AutoModelForSequenceClassification)):
        assert not part.is_backend_compatible()


def test_attention_weights_are_not_promised(folder, monkeypatch):
    said = []
    module = sys.modules[type(load(folder).model).__mro__[1].__module__]
    monkeypatch.setattr(module.logger, "warning_once", said.append, raising=False)
    model = load(folder)
    model.set_attn_implementation("eager")
    assert model(tokens(5), output_attentions=True).attentions == ()
    assert len(said) == 1 and "Liger layers have no attention weights" in said[0]
    model.set_attention_mode("softmax", layers=[1, 2])
    assert [x.shape for x in model(tokens(5), output_attentions=True).attentions] == [(1, 4, 5, 5)] * 2
    assert len(said) == 2
    model.set_attention_mode("softmax")
    assert len(model(tokens(5), output_attentions=True).attentions) == 4
    assert len(said) == 2


def test_only_parameters_that_are_there_are_kept_in_float32(tiny_base):
    _, plain = linearized(tiny_base())
    assert not plain._keep_in_fp32_modules_strict
    _, kept = linearized_with_extras(tiny_base(), window=8, kept=4, branch_scales=True)
    assert kept._keep_in_fp32_modules_strict == {"keep_score", "grm_scale", "swa_scale"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_of_a_family(model_type):
    """The classes that a folder's code imports are there, and weights are renamed where transformers renames them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    family = FAMILIES[model_type]
    module = sys.modules[getattr(transformers, f"{family.prefix}ForCausalLM").__module__]
    assert module.__name__.split(".")[-2] == (family.package or model_type)
    for name in (f"{family.prefix}Attention", family.decoder_class, f"{family.prefix}PreTrainedModel"):
        assert hasattr(module, name)
    assert family.renames_weights == (get_checkpoint_conversion_mapping(model_type) is not None)
    assert ("keep_weight_names" in model_files(family)[f"modeling_liger_{model_type}.py"]) == family.renames_weights


PUBLIC = {"transformers", "transformers.utils"}  # what the documentation names


def test_private_names_of_transformers_are_in_one_place():
    for module in MODULES:
        if module == "liger_transformers":
            continue
        for node in ast.walk(ast.parse((TEMPLATES / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert node.module in PUBLIC, (module, node.module)
                assert not any(alias.name.startswith("_") for alias in node.names)


def reloaded(name="liger_transformers_again"):
    spec = spec_from_file_location(name, TEMPLATES / "liger_transformers.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_transformers(monkeypatch):
    """Names that a release has moved: a sentence, or doing without."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers.masking_utils", None)
        with pytest.raises(ImportError, match=f"does not fit transformers {transformers.__version__} .*--refresh"):
            reloaded()
    monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    module = reloaded()
    with pytest.raises(ImportError, match="how the experts of 'mixtral' are named in files"):
        module.keep_weight_names("mixtral", "liger_mixtral")
