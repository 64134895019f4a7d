"""`from_dense`: a mixture of experts that starts with the outputs of a trained dense model, and learns on."""

import copy

import pytest
import torch
from test_modeling import build, gradients, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from blueberry import BlueberryForCausalLM


@pytest.mark.parametrize(
    "overrides",
    [{}, {"hidden_act": "silu"}, {"tie_word_embeddings": False}, {"use_qk_norm": False}, {"num_key_value_heads": 4}],
    ids=str,
)
@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (3, 3), (1, 1), (8, 1)])
def test_the_upcycled_model_has_the_outputs_of_the_dense_one(overrides: dict, experts: int, chosen: int):
    dense, ids = build("dense", **overrides).double(), tokens(2, 9)
    before = copy.deepcopy(dense.state_dict())
    moe = BlueberryForCausalLM.from_dense(dense, experts, chosen)
    assert (moe.config.num_experts, moe.config.num_experts_per_tok) == (experts, chosen)
    assert moe.model.layers[0].mlp.experts.up_proj.shape == (experts, 64, 32)
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits)
    with torch.no_grad():  # nothing is shared
        for parameter in moe.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "blueberry"])
def test_the_outputs_do_not_depend_on_the_experts_implementation(implementation: str):
    dense, ids = build("dense"), tokens(2, 9)
    moe = BlueberryForCausalLM.from_dense(dense, 4)
    moe.set_experts_implementation(implementation)
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_dtype_mode_attention_and_generation_settings_are_kept():
    dense = build("dense", attn_implementation="eager").to(torch.bfloat16).train()
    dense.generation_config.top_k = 7
    moe = BlueberryForCausalLM.from_dense(dense, 4)
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.bfloat16}
    assert moe.training and not BlueberryForCausalLM.from_dense(dense.eval(), 4).training
    assert moe.config._attn_implementation == "eager" and moe.generation_config.top_k == 7
    assert moe.lm_head.weight is moe.model.embed_tokens.weight


def test_routers_are_those_of_a_new_model_and_follow_the_seed():
    dense, gates = build("dense"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        gates.append(BlueberryForCausalLM.from_dense(dense, 64).model.layers[0].mlp.gate.weight)
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])
    # 2048 values: the standard error of a deviation is 1.6%
    assert gates[0].std().item() == pytest.approx(dense.config.initializer_range, rel=0.08)


def test_noise_has_the_asked_deviation_and_its_own_draw_for_each_expert():
    dense = build("dense", intermediate_size=256)
    moe = BlueberryForCausalLM.from_dense(dense, 4, noise=0.05)
    for old, new in zip(dense.model.layers, moe.model.layers, strict=True):
        for name in ("up_proj", "down_proj"):
            weight = getattr(old.mlp, name).weight
            difference = getattr(new.mlp.experts, name) - weight
            # 4 x 8192 values: the standard error of the deviation is 0.4%, of a correlation 1.1%
            assert (difference.std() / weight.std()).item() == pytest.approx(0.05, rel=0.02)
            assert torch.corrcoef(difference.flatten(1)).fill_diagonal_(0).abs().max() < 0.06


def test_the_outputs_change_in_proportion_to_the_noise():
    dense, ids = build("dense").double(), tokens(2, 9)
    changes = []
    for noise in (1e-4, 1e-3):
        torch.manual_seed(0)
        changes.append((BlueberryForCausalLM.from_dense(dense, 4, noise=noise)(ids).logits - dense(ids).logits).norm())
    assert (changes[1] / changes[0]).item() == pytest.approx(10, rel=0.1)


def test_the_upcycled_model_survives_saving_and_trains(tmp_path):
    dense, ids = build("dense"), tokens(4, 16)
    moe = BlueberryForCausalLM.from_dense(dense, 4, router_aux_loss_coef=0.05)
    moe.save_pretrained(tmp_path)
    loaded = BlueberryForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.router_aux_loss_coef == 0.05
    torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    loaded.train()
    assert all(grad.any() for grad in gradients(loaded, ids).values())
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = loaded(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    experts = loaded.model.layers[0].mlp.experts.up_proj
    assert all((experts[0] - other).norm() > 0 for other in experts[1:])  # they part without noise


def test_what_cannot_be_upcycled_is_refused():
    dense = build("dense")
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))  # fmt: skip
    for arguments, options, message in [
        ((build("experts"), 4), {}, "num_experts=4: the model is a mixture of experts already"),
        ((llama, 4), {}, "model is a LlamaForCausalLM: give a dense BlueberryForCausalLM"),
        ((dense, 0), {}, "num_experts=0 must be at least 1"),
        ((dense, 2, 3), {}, "num_experts_per_tok=3 must lie between 1 and num_experts=2"),
        ((dense, 4), {"noise": -0.1}, "noise=-0.1 must not be negative"),
        ((dense, 4), {"noise": float("nan")}, "noise=nan must not be negative"),
        ((dense, 4), {"norm_topk_prob": False}, "option 'norm_topk_prob' is not one of router_aux_loss_coef"),
    ]:
        with pytest.raises(ValueError, match=message):
            BlueberryForCausalLM.from_dense(*arguments, **options)
