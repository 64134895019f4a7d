"""create_manifold_optimizer: which component gets what, on Blueberry and on other decoders, and what it refuses."""

import math

import pytest
import torch
from conftest import SMALL_MODEL
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.errors import UsageError
from blueberry.optim import build_optimizer, create_manifold_optimizer
from blueberry.optim.manifold import FAMILIES, PRESETS


def blueberry(**changes) -> BlueberryForCausalLM:
    torch.manual_seed(0)
    settings = {name: value for name, value in SMALL_MODEL.items() if name != "model_type"}
    return BlueberryForCausalLM(BlueberryConfig(**settings | changes))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, tie_word_embeddings=False,
    ))  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    ids = torch.arange(32).view(2, 16) % 40 + 1
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        report = optimizer.check_constraints()
        assert report["total_violations"] == 0, report


def got(optimizer) -> dict[str, str]:
    return {row["name"]: row["optimizer"] for row in optimizer.audit()}


def test_every_component_of_a_mixture_of_experts_gets_its_manifold():
    model = blueberry()
    optimizer = create_manifold_optimizer(model)
    names = got(optimizer)
    for name, optimizer_name in names.items():
        if "norm" in name:
            assert optimizer_name == "adamw"
        elif "embed" in name or name.endswith("gate.weight"):
            assert optimizer_name == "hypersphere_muon"
        else:
            assert "_proj" in name and optimizer_name == "stiefel_muon"
    train(model, optimizer)
    report = optimizer.check_constraints()
    stacks = 2 * 4 * 2  # layers, experts, up and down
    assert report["by_type"]["stiefel_muon"]["matrices"] == 2 * 4 + stacks
    assert set(report["by_type"]["stiefel_muon"]["by_family"]) == {"stiefel_attention", "stiefel_feed_forward"}


@pytest.mark.parametrize(
    "make", [llama, gpt2, lambda: blueberry(num_experts=0), lambda: blueberry(gated_experts=True)]
)
def test_any_decoder_trains_on_its_manifolds(make):
    model = make()
    optimizer = create_manifold_optimizer(model, model.config)
    assert sum(name == "stiefel_muon" for name in got(optimizer).values()) >= 8
    train(model, optimizer)


def test_a_padding_row_stays_zero_and_an_untied_head_goes_to_adamw():
    model = llama()
    optimizer = create_manifold_optimizer(model)
    train(model, optimizer)
    assert got(optimizer)["lm_head.weight"] == "adamw"
    norms = model.get_input_embeddings().weight.detach().norm(dim=1)
    assert norms[0] == 0
    torch.testing.assert_close(norms[1:], torch.ones(49))


def test_tied_embeddings_are_one_parameter_on_the_sphere():
    optimizer = create_manifold_optimizer(gpt2())
    names = [row["name"] for row in optimizer.audit() if row["optimizer"] == "hypersphere_muon"]
    assert names == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(gpt2().parameters()))


def test_switches_send_a_family_to_what_build_optimizer_gives_it():
    plain = got(build_optimizer(blueberry()))
    chosen = got(create_manifold_optimizer(blueberry(), families=("attention",)))
    assert {name for name in plain if chosen[name] != plain[name]} == {
        n for n in plain if "attn" in n and "_proj" in n
    }
    for family, part in (("embeddings", "embed"), ("router", "gate"), ("feed_forward", "experts")):
        chosen = got(create_manifold_optimizer(blueberry(), families=set(FAMILIES) - {family}))
        assert {chosen[name] for name in plain if part in name} == {plain[name] for name in plain if part in name}
    ruled = got(create_manifold_optimizer(blueberry(), rules={r"k_proj": "adamw"}))
    assert {ruled[name] for name in plain if "k_proj" in name} == {"adamw"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_the_documents_say_and_arguments_win(preset):
    group = create_manifold_optimizer(blueberry(), preset=preset).param_groups[0]
    expected = {"conservative": (0.01, 15, 0.05), "balanced": (0.02, 10, 0.1), "aggressive": (0.03, 5, 0.2)}
    assert (group["lr"], group["dual_steps"], group["dual_lr"]) == expected[preset]
    group = create_manifold_optimizer(blueberry(), preset=preset, base_lr=0.5, dual_steps=3).param_groups[0]
    assert (group["lr"], group["dual_steps"]) == (0.5, 3)


def test_modular_scaling_multiplies_the_step_by_depth_and_aspect_and_is_not_zero_in_layer_0():
    model = blueberry()
    optimizer = create_manifold_optimizer(model, modular_lr=True)
    for group in optimizer.param_groups[:2]:
        for name, parameter, scale in zip(group["param_names"], group["params"], group["lr_scales"], strict=True):
            out, columns = parameter.shape[-2:]
            depth = (int(name.split("layers.")[1][0]) + 1) / 2
            assert scale == pytest.approx(depth * math.sqrt(out / columns))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, count=1)
    moved = {
        n: torch.linalg.matrix_norm(p.detach() - before[n], 2) for n, p in model.named_parameters() if p.ndim == 2
    }
    shallow, deep = (moved[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert deep / shallow == pytest.approx(2.0, rel=0.02)  # a chord of the retraction instead of its tangent
    assert shallow == pytest.approx(0.02 * 0.5, rel=0.02)


def test_bf16_models_keep_the_constraint_in_float32():
    model = blueberry().bfloat16()
    optimizer = create_manifold_optimizer(model)
    train(model, optimizer)
    state = optimizer.state[model.model.layers[0].self_attn.q_proj.weight]
    assert state["master_weight"].dtype == torch.float32


def test_a_bad_gradient_skips_the_step_and_leaves_every_weight_on_its_manifold():
    model = blueberry()
    optimizer = create_manifold_optimizer(model)
    train(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    next(model.parameters()).grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.check_constraints()["total_violations"] == 0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.log_metrics()["optimizer/skipped_steps"] == 1


def test_metrics_are_flat_floats_with_the_range_of_singular_values_and_the_solver():
    model = blueberry()
    optimizer = create_manifold_optimizer(model)
    train(model, optimizer)
    metrics = optimizer.log_metrics(prefix="optimizer")
    assert all(type(value) is float and name.startswith("optimizer/") for name, value in metrics.items())
    assert 0.9999 < metrics["optimizer/stiefel_attention/sigma_min"] <= 1 + 1e-6
    assert 1 - 1e-6 <= metrics["optimizer/stiefel_feed_forward/sigma_max"] < 1.0001
    assert 1 <= metrics["optimizer/stiefel_feed_forward/dual_iterations"] <= 10
    assert metrics["optimizer/stiefel_muon/max_violation"] < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "fast"}, "preset='fast' is unknown: use one of conservative, balanced, aggressive"),
        ({"muon_lr": 0.1}, "setting 'muon_lr' is unknown"),
        ({"families": ["embeddings"]}, "no matrix would be on the Stiefel manifold"),
        ({"families": ["attention", "norms"]}, "family 'norms' is unknown: choose from attention, feed_forward"),
        ({"radius": 0.0}, r"radius=0\.0 is not a positive number"),
        ({"hypersphere_radius": -1.0}, r"radius=-1\.0 is not a positive number"),
        ({"init_on_manifold": False}, "is off its manifold .*use init_on_manifold=True"),
        ({"rules": {"nothing": "adamw"}}, "rule 'nothing' matches no parameter"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        create_manifold_optimizer(blueberry(), **settings)


def test_a_zero_embedding_is_refused_by_name():
    model = blueberry()
    nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.raises(UsageError, match=r"embed_tokens\.weight is zero, so its rows cannot get norm 1\.0"):
        create_manifold_optimizer(model)
