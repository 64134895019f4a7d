"""transformers' own tests of its models, run on Blueberry.

They are not installed with transformers: its source distribution has them.

    pip download transformers==5.23.0 --no-deps --no-binary transformers && tar xf transformers-5.23.0.tar.gz
    pip install parameterized
    TRANSFORMERS_TESTS=transformers-5.23.0/tests python -m pytest -c /dev/null tests/test_transformers_suite.py

(`-c /dev/null`: their marks are not ours.)
"""

import os
import sys
import types
import unittest
from typing import Any, ClassVar

import pytest
import torch
from transformers.models.auto import modeling_auto

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.modeling_blueberry import BlueberryForSequenceClassification, BlueberryModel

SUITE = os.environ.get("TRANSFORMERS_TESTS")
if SUITE is None:
    pytest.skip("TRANSFORMERS_TESTS names no folder with transformers' tests", allow_module_level=True)


def module(name: str, **content: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


# As a package, with empty stand-ins for the parts that the source distribution leaves out.
module("tests", __path__=[SUITE])
module("tests.exporters")
module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
module("tests.generation")
module("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

CLASSES = (BlueberryModel, BlueberryForCausalLM, BlueberryForSequenceClassification)
# What a model of transformers itself has: the suite decides by these names which classes have labels.
modeling_auto.MODEL_MAPPING_NAMES["blueberry"] = "BlueberryModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["blueberry"] = "BlueberryForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["blueberry"] = "BlueberryForSequenceClassification"


class ModelTester:
    """A small model and inputs for it, under the names that the suite asks for."""

    config_class, base_model_class, causal_lm_class, sequence_classification_class = BlueberryConfig, *CLASSES
    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 99, 32, 2, 4, 2
    type_sequence_label_size, num_labels = 2, 3

    def __init__(self, **feed_forward: int):
        self.feed_forward = feed_forward

    def get_config(self) -> BlueberryConfig:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return BlueberryConfig(
            **{name: getattr(self, name) for name in sizes}, **self.feed_forward, max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[BlueberryConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class Suite(ModelTesterMixin, TrainingTesterMixin):
    all_model_classes = CLASSES
    pipeline_model_mapping: ClassVar = {"feature-extraction": BlueberryModel, "text-generation": BlueberryForCausalLM}
    test_generation_tester_mixin_inheritance = None  # that mixin is not in the source distribution


class MixtureOfExpertsTest(Suite, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = ModelTester(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


class DenseTest(Suite, unittest.TestCase):
    # asked of every class that can have experts
    test_eager_matches_batched_and_grouped_inference_0_fp16 = None
    test_eager_matches_batched_and_grouped_inference_1_fp32 = None
    test_eager_matches_batched_and_grouped_inference_2_bf16 = None
    test_output_router_logits_from_config = None

    def setUp(self) -> None:
        self.model_tester = ModelTester(num_experts=0, intermediate_size=37)


del Suite  # is collected through its subclasses
