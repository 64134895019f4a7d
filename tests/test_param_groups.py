"""Which parameter gets which optimizer: an exact partition by role."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
    ViTConfig,
)

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.errors import UsageError
from blueberry.optim import assign_parameters

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
         "vocab_size": 50, "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 32}  # fmt: skip


def models() -> dict[str, nn.Module]:
    """Small models of real architectures, on the meta device: only names, types and shapes matter."""
    moe = {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    gpt_oss = GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES)
    vit = ViTConfig(**{k: SIZES[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size")},
                    num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    bert = BertConfig(**{k: SIZES[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")},
                      num_attention_heads=2)  # fmt: skip
    with torch.device("meta"):
        return {
            "blueberry": BlueberryForCausalLM(BlueberryConfig.from_preset("tiny")),
            "llama": AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)),
            "qwen3_moe": AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **moe)),
            "gpt_oss": AutoModelForCausalLM.from_config(gpt_oss),
            "gpt2": AutoModelForCausalLM.from_config(gpt2),
            "vit": AutoModelForImageClassification.from_config(vit),
            "bert": AutoModelForMaskedLM.from_config(bert),
        }


# Names (without digits) of exactly the parameters that Muon gets, written down by hand from the architectures.
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPECTED = {
    "blueberry": ATTENTION | {"experts.up_proj", "experts.down_proj"},
    "llama": ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "qwen3_moe": ATTENTION | {"experts.gate_up_proj", "experts.down_proj"},
    "gpt_oss": ATTENTION | {"experts.gate_up_proj", "experts.down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "vit": {"q_proj", "k_proj", "v_proj", "o_proj", "mlp.fc1", "mlp.fc2"},
    "bert": {"self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense", "output.dense"},
}


@pytest.fixture(scope="module")
def small_models() -> dict[str, nn.Module]:
    return models()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_muon_gets_exactly_the_hidden_matrices(small_models, name):
    assignments = assign_parameters(small_models[name])
    muon = {re.sub(r"\.weight$", "", a.name) for a in assignments if a.optimizer == "muon"}
    assert muon and all(any(path.endswith(end) for end in EXPECTED[name]) for path in muon)
    assert all(any(path.endswith(end) for path in muon) for end in EXPECTED[name])


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_parameter_is_assigned_exactly_once(small_models, name):
    model = small_models[name]
    assignments = assign_parameters(model)
    assert [id(a.parameter) for a in assignments] == [id(p) for p in model.parameters()]
    assert all(a.reason for a in assignments)


def groups(model: nn.Module) -> dict[str, str]:
    return {a.name: a.group for a in assign_parameters(model)}


def test_roles_of_a_mixture_of_experts(small_models):
    roles = groups(small_models["qwen3_moe"])
    assert roles["model.embed_tokens.weight"] == "embeddings"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.layers.0.mlp.gate.weight"] == "router"
    assert roles["model.layers.0.mlp.experts.gate_up_proj"] == "experts"
    assert roles["model.layers.0.input_layernorm.weight"] == "vectors"


def test_biases_of_stacked_experts_and_attention_sinks_are_vectors(small_models):
    roles = groups(small_models["gpt_oss"])
    assert roles["model.layers.0.mlp.experts.gate_up_proj_bias"] == "vectors"
    assert roles["model.layers.0.self_attn.sinks"] == "vectors"
    assert roles["model.layers.0.mlp.router.weight"] == "router"


def test_patches_positions_and_classifier_of_a_vision_transformer_go_to_adamw(small_models):
    roles = groups(small_models["vit"])
    assert {role for name, role in roles.items() if "patch_embeddings.projection.weight" in name} == {"convolutions"}
    assert {role for name, role in roles.items() if "position_embeddings" in name} == {"other"}
    assert roles["classifier.weight"] == "head"


def test_the_head_of_a_plain_module_is_found_by_its_shape():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 7, bias=False))
    assert groups(model) == {"0.weight": "embeddings", "1.weight": "matrices", "2.weight": "head"}


def test_frozen_parameters_get_no_optimizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert [a.optimizer for a in assign_parameters(model)] == ["frozen", "frozen", "muon", "adamw"]


def test_rules_decide_first_and_say_so():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    first, second = assign_parameters(model, {r"^0\.": "adamw"})
    assert (first.optimizer, first.reason) == ("adamw", r"rule '^0\\.'")
    assert second.optimizer == "muon"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"decoder": "adamw"}, "rule 'decoder' matches no parameter"),
        ({"weight": "sgd"}, "rule 'weight' names optimizer 'sgd': use muon or adamw"),
        ({"bias": "muon"}, r"rule 'bias' gives Muon bias of shape \(4,\)"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(UsageError, match=message):
        assign_parameters(nn.Linear(4, 4), rules)
