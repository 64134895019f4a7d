"""LoRA adapters of PEFT: their factors go to Muon, stacked expert factors expert by expert."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from blueberry.errors import UsageError
from blueberry.optim import assign_parameters, build_optimizer
from blueberry.optim.param_groups import Assignment, check_holds_trainable_parameters
from blueberry.optim.splits import cut

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
         "num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 32}  # fmt: skip
MOE = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
CONFIGS = {"llama": SIZES, "qwen3_moe": MOE | {"num_experts": 4}, "gpt_oss": MOE | {"num_local_experts": 4}}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name]), dtype=torch.float32)


def with_lora(name: str, **settings) -> nn.Module:
    return get_peft_model(base_model(name), LoraConfig(**({"r": 3, "init_lora_weights": False} | settings)))


def trained(model: nn.Module) -> dict[str, Assignment]:
    found = assign_parameters(model)
    return {a.name.removeprefix("base_model.model."): a for a in found if a.optimizer != "frozen"}


def test_factors_go_to_muon_as_matrices_of_their_own():
    found = trained(with_lora("llama", target_modules=["q_proj", "down_proj"]))
    assert set(found) == {
        f"model.layers.0.{layer}.lora_{factor}.default.weight"
        for layer in ("self_attn.q_proj", "mlp.down_proj")
        for factor in "AB"
    }
    assert all(a.optimizer == "muon" and a.group == "lora" and a.layout is None for a in found.values())


def test_copies_of_modules_keep_their_roles():
    saved = ["lm_head", "embed_tokens", "gate_proj"]
    found = trained(with_lora("llama", target_modules=["q_proj"], modules_to_save=saved, use_dora=True))
    groups = {name.removesuffix(".default.weight"): a.group for name, a in found.items()}
    assert groups == {
        "lm_head.modules_to_save": "head",
        "model.embed_tokens.modules_to_save": "embeddings",
        "model.layers.0.mlp.gate_proj.modules_to_save": "matrices",
        "model.layers.0.self_attn.q_proj.lora_A": "lora",
        "model.layers.0.self_attn.q_proj.lora_B": "lora",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector": "vectors",
    }


def test_factors_of_heads_embeddings_and_routers_go_to_adamw():
    found = trained(with_lora("llama", target_modules=["lm_head", "embed_tokens", "q_proj"]))
    assert {name.split(".lora_")[0] for name, a in found.items() if a.optimizer == "adamw"} == {
        "lm_head",
        "model.embed_tokens",
    }
    found = trained(with_lora("qwen3_moe", target_modules=[], target_parameters=["mlp.gate.weight"]))
    assert {a.group for a in found.values()} == {"router"}


def test_factors_of_rank_one_are_vectors():
    found = trained(with_lora("qwen3_moe", r=1, target_modules=[], target_parameters=EXPERTS))
    assert {a.group for a in found.values()} == {"vectors"}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_stacked_factors_are_cut_into_those_of_each_expert(name):
    model = with_lora(name, target_modules=[], target_parameters=EXPERTS)
    found = trained(model)
    layers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    assert len(layers) == 2 and len(found) == 4
    for layer in layers:
        by_id = {id(a.parameter): a for a in found.values()}
        a, b = (by_id[id(factors["default"].weight)] for factors in (layer.lora_A, layer.lora_B))
        (down,), (up,) = cut(a.parameter, a.layout), cut(b.parameter, b.layout)  # (experts, 3, in), (experts, out, 3)
        delta = layer.get_delta_weight("default")  # (experts, out, in) or, in gpt-oss, (experts, in, out)
        product = up @ down * layer.scaling["default"]
        torch.testing.assert_close(product.mT if name == "gpt_oss" else product, delta)


def test_an_optimizer_built_before_the_adapters_is_found_out():
    model = base_model("llama")
    early = build_optimizer(model)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=r"holds 0 of 2 trainable parameters, .*lora_A.*get_peft_model"):
        check_holds_trainable_parameters(early, model)
    check_holds_trainable_parameters(build_optimizer(model), model)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ],
)
def test_adapters_learn(name, settings):
    model = with_lora(name, init_lora_weights=True, **settings)
    optimizer = build_optimizer(model, muon_lr=0.05)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1  # the head is frozen and small: 0.2 is what 30 steps bring
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
