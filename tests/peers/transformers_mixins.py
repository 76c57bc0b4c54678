"""transformers' own modelling tests, of the installed release, over converted models: nox -f .noxfile.py -s peers.

LIGER_PEERS names a folder that holds transformers' `tests`: its source distribution, which has the modelling mixin, or
a checkout of the release, which has the generation mixin as well.

Every test of a mixin passes, or stands in `FAILS` with the reason why it cannot: then it has to fail.
"""

import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
from three_models import CALIBRATED, HYBRID, LLAMA, SIZES, write
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

# Test, or class and test -> why it cannot pass.
NO_WEIGHTS = "a Liger layer has no attention weights"
FAILS = {
    "test_attention_outputs": NO_WEIGHTS,
    "TestLlama.test_retain_grad_hidden_states_attentions": NO_WEIGHTS,
    "TestCalibrated.test_retain_grad_hidden_states_attentions": NO_WEIGHTS,
}

TESTS = os.environ["LIGER_PEERS"]
sys.path.insert(0, TESTS)
HAS_GENERATION = os.path.exists(os.path.join(TESTS, "tests", "generation", "test_utils.py"))


class Nothing:
    """Stands in for a mixin of transformers that a source distribution leaves out."""


def mixin(module: str, name: str) -> type:
    """A mixin of transformers' tests, or `Nothing` where they do not have its file."""
    path = os.path.join(TESTS, *module.split(".")) + ".py"
    if not os.path.exists(path):
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, Nothing)
        sys.modules[module] = stand_in
    return getattr(importlib.import_module(module), name)


mixin("tests.exporters.test_export", "ExportTesterMixin")
GenerationTesterMixin = mixin("tests.generation.test_utils", "GenerationTesterMixin")
ModelTesterMixin = mixin("tests.test_modeling_common", "ModelTesterMixin")


class Tester:
    """What the mixins ask of a model's tester: sizes, a config, and inputs of two rows, one of them padded."""

    batch_size, seq_length, is_training = 2, 7, True

    def __init__(self, folder: Path):
        self.folder = folder
        vars(self).update(SIZES)

    def get_config(self):
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=True)

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(input_ids)
        mask[0, :2] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


HEADS = {
    AutoModel: "MODEL_MAPPING_NAMES",
    AutoModelForCausalLM: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    AutoModelForSequenceClassification: "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


class Peers(ModelTesterMixin, GenerationTesterMixin):
    """The mixins over one converted model; a test that `FAILS` lists has to fail."""

    name: str
    test_can_init_all_missing_weights_before_2023 = True  # the model code names no year

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.directory = tempfile.TemporaryDirectory()
        cls.model_tester = Tester(Path(cls.directory.name))
        write(cls.model_tester.folder, cls.name)
        config = cls.model_tester.get_config()
        names = [config.auto_map[auto.__name__].rpartition("--")[2] for auto in HEADS]
        cls.all_model_classes = tuple(get_class_from_dynamic_module(name, cls.directory.name) for name in names)
        # The mixins look into transformers' tables for what a class is, and load what they saved without trusting it.
        AutoConfig.register(config.model_type, type(config), exist_ok=True)
        for (auto, table), model_class in zip(HEADS.items(), cls.all_model_classes, strict=True):
            getattr(modeling_auto, table)[config.model_type] = model_class.__name__
            auto.register(type(config), model_class, exist_ok=True)

    @classmethod
    def tearDownClass(cls):
        cls.directory.cleanup()
        super().tearDownClass()


class TestLlama(Peers, unittest.TestCase):
    name = LLAMA


class TestCalibrated(Peers, unittest.TestCase):
    name = CALIBRATED


class TestHybrid(Peers, unittest.TestCase):
    name = HYBRID


def _expect_failures(case: type) -> None:
    for name in (name for name in dir(case) if name.startswith("test_")):
        if reason := FAILS.get(name) or FAILS.get(f"{case.__name__}.{name}"):
            setattr(case, name, pytest.mark.xfail(reason=reason, strict=True)(getattr(case, name)))


for _case in (TestLlama, TestCalibrated, TestHybrid):
    _expect_failures(_case)
del _case
