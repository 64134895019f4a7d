"""The configuration: presets have the sizes they promise, and bad values are refused with a remedy."""

import re

import pytest
import torch
from transformers import AutoConfig

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.configuration_blueberry import PRESETS


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # embeddings + layers * (attention + feed-forward + norms) + final norm, counted by hand
        ("blueberry-88m", 49152 * 512 + 22 * (2 * 512 * (512 + 256) + 2 * 512 * 2048 + 2 * 512 + 2 * 64) + 512),
        (
            "blueberry-moe",
            49152 * 384 + 6 * (4 * 384**2 + 8 * 384 + 8 * 2 * 384 * 1536 + 2 * 384 + 2 * 48) + 384,
        ),
        (
            "blueberry-moe-12l",
            49152 * 512 + 12 * (4 * 512**2 + 8 * 512 + 8 * 2 * 512 * 2048 + 2 * 512 + 2 * 64) + 512,
        ),
        ("manifold-small", 10000 * 256 + 4 * (4 * 256**2 + 4 * 256 + 4 * 2 * 256 * 1024 + 2 * 256 + 2 * 64) + 256),
        ("tiny", 4096 * 128 + 3 * (2 * 128 * (128 + 64) + 8 * 128 + 8 * 2 * 128 * 256 + 2 * 128 + 2 * 32) + 128),
    ],
)
def test_presets_have_the_promised_number_of_parameters(preset: str, parameters: int):
    with torch.device("meta"):
        model = BlueberryForCausalLM(BlueberryConfig.from_preset(preset))
    assert model.num_parameters() == parameters


@pytest.mark.parametrize(("preset", "millions"), [("blueberry-88m", 88.6), ("blueberry-moe", 79.1), ("tiny", 2.2)])
def test_presets_have_the_documented_size(preset: str, millions: float):
    with torch.device("meta"):
        model = BlueberryForCausalLM(BlueberryConfig.from_preset(preset))
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_defaults_are_the_88m_preset():
    assert BlueberryConfig().to_dict() == BlueberryConfig.from_preset("blueberry-88m").to_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_configuration_survives_saving(preset: str, tmp_path):
    config = BlueberryConfig.from_preset(preset, router_noise=0.1, pad_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, BlueberryConfig)
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()


def test_overrides_replace_fields_of_a_preset():
    config = BlueberryConfig.from_preset("tiny", vocab_size=100, rope_parameters={"rope_theta": 500.0})
    assert (config.vocab_size, config.hidden_size) == (100, 128)
    assert config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 7}, "num_attention_heads=7 does not divide hidden_size=128"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie between 1 and num_experts=8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must lie between 1 and num_experts=8"),
        ({"num_experts": -1}, "num_experts=-1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"vocab_size": -5}, "vocab_size=-5 must be at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 must be at least 1"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"hidden_act": "rleu"}, "hidden_act='rleu' is unknown"),
        ({"router_noise": -0.1}, "router_noise=-0.1 must not be negative"),
        ({"hidden_szie": 64}, "unknown config key 'hidden_szie'"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_bad_values_are_refused_in_one_line(overrides: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        BlueberryConfig.from_preset("tiny", **overrides)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"unknown preset 'large': choose one of blueberry-88m, .*tiny"):
        BlueberryConfig.from_preset("large")


def test_heads_of_a_given_size_need_not_divide_the_hidden_size():
    assert BlueberryConfig.from_preset("tiny", num_attention_heads=6, head_dim=20).head_dim == 20  # 6 x 20 for 128


def test_a_single_expert_and_a_dense_model_are_valid():
    assert BlueberryConfig.from_preset("tiny", num_experts=1, num_experts_per_tok=1).num_experts == 1
    assert BlueberryConfig.from_preset("tiny", num_experts=0).num_experts == 0


@pytest.mark.parametrize("overrides", [{"num_experts": 0}, {}, {"gated_experts": True}], ids=str)
def test_every_entry_of_the_parallel_plans_names_a_module(overrides: dict):
    with torch.device("meta"):
        model = BlueberryForCausalLM(BlueberryConfig.from_preset("tiny", **overrides))
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    weights = {re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight") for name, _ in model.named_parameters()}
    assert model.tp_plan and model.tp_plan.keys() <= names | weights
    assert model.ep_plan.keys() <= names | weights
    experts = {name for name in weights if ".experts." in name}
    assert experts <= model.tp_plan.keys() and experts <= model.ep_plan.keys()
