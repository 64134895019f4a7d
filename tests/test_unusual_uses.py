"""What researchers do besides plain training gets the right numbers or an error, not silently others."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blueberry import BlueberryConfig, BlueberryForCausalLM, memory_blueberry
from blueberry.attention_blueberry import causal_attention
from blueberry.linear_blueberry import _Linear
from blueberry.losses_blueberry import head_cross_entropy, logits_cross_entropy
from blueberry.memory_blueberry import large_empty
from blueberry.norm_blueberry import BlueberryHeadRMSNorm, BlueberryRMSNorm

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
IDS = torch.randint(0, 60, (2, 20), generator=torch.Generator().manual_seed(0))


def model_of(**settings: Any) -> BlueberryForCausalLM:
    torch.manual_seed(0)
    return BlueberryForCausalLM(BlueberryConfig(**SIZES, **settings)).train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


TURN = torch.rand(1, 5, 3)
LABELS = torch.randint(0, 9, (2, 5))
OPERATIONS = {
    "norm": lambda: BlueberryRMSNorm(6, 1e-6)(leaf(2, 6)),
    "norm and rotation": lambda: BlueberryHeadRMSNorm(6, 1e-6)(leaf(2, 5, 4, 6), TURN, TURN),
    "attention": lambda: causal_attention(leaf(2, 4, 5, 6), leaf(2, 4, 5, 6), leaf(2, 4, 5, 6), 1.0),
    "linear": lambda: _Linear.apply(leaf(5, 6), leaf(8, 6)),
    "loss of the head": lambda: head_cross_entropy(leaf(2, 5, 6), leaf(9, 6), LABELS),
    "loss of logits": lambda: logits_cross_entropy(leaf(2, 5, 9), LABELS),
    "dense model": lambda: model_of()(input_ids=IDS, labels=IDS, skip_logits=True).loss,
    "mixture of experts": lambda: model_of(num_experts=4)(input_ids=IDS).logits,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_second_derivatives_are_refused_however_they_are_asked_for(operation: Callable[[], Tensor]):
    output = operation()
    leaves = [node.variable for node in nodes(output) if "AccumulateGrad" in node.name()]
    with pytest.raises(RuntimeError, match="create_graph=True: Blueberry's operations have no second derivatives"):
        torch.autograd.grad(output.sum(), leaves, create_graph=True)


def nodes(output: Tensor) -> set[Any]:
    found, new = set(), {output.grad_fn}
    while new:
        found |= new
        new = {after for node in new for after, _ in node.next_functions if after is not None} - found
    return found


@pytest.mark.parametrize("whose", ["the configuration's", "the layer's", "the call's"])
def test_attention_that_is_not_causal_is_so_in_training_too(whose: str):
    model = model_of()
    causal, inputs = model(input_ids=IDS).logits, {}
    if whose == "the configuration's":
        model.config.is_causal = False
    elif whose == "the layer's":
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    else:
        inputs["is_causal"] = False
    training = model(input_ids=IDS, **inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(training, model(input_ids=IDS, **inputs).logits)
    assert not torch.allclose(training, causal)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_experts", [0, 4])
def test_without_any_label_the_loss_is_nan_and_gradients_are_zero_as_in_torch(skip_logits: bool, num_experts: int):
    model = model_of(num_experts=num_experts)
    loss = model(input_ids=IDS, labels=torch.full_like(IDS, -100), skip_logits=skip_logits).loss
    loss.backward()
    assert loss.isnan()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("hidden_act", ["prelu", "xielu"])
def test_parameters_of_experts_activations_get_gradients(hidden_act: str):
    results = []
    for implementation in ("blueberry", "eager"):
        model = model_of(num_experts=4, hidden_act=hidden_act)
        model.set_experts_implementation(implementation)
        results.append(gradients(model))
    assert any("act_fn" in name for name in results[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("act", [nn.Mish(inplace=True), nn.Sequential(nn.SiLU(), nn.Dropout(0.5))], ids=["in place",
                                 "random"])  # fmt: skip
def test_activations_that_cannot_be_computed_twice_are_not(act: nn.Module):
    """Of a random one, the gradient along a direction is that of finite differences under the same numbers."""
    model = model_of(num_experts=4).double()
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = act
    weight = model.model.layers[0].mlp.experts.down_proj

    def loss(shift: float = 0.0) -> Tensor:
        torch.manual_seed(1)
        weight.data += shift * direction
        value = model(input_ids=IDS, labels=IDS, skip_logits=True).loss  # with logits the loss is in fp32
        weight.data -= shift * direction
        return value

    direction, step = torch.randn_like(weight), 1e-5
    difference = (loss(step) - loss(-step)).detach() / (2 * step)
    loss().backward()
    torch.testing.assert_close((weight.grad * direction).sum(), difference, rtol=1e-5, atol=1e-8)


def test_hooks_of_the_head_work_without_logits_too():
    model = model_of()
    plain = model(input_ids=IDS, labels=IDS, skip_logits=True).loss
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with_logits, without = (model(input_ids=IDS, labels=IDS, skip_logits=skip).loss for skip in (False, True))
    assert with_logits == without and without != plain


def test_a_backward_hook_of_the_experts_activation_is_called():
    model, calls = model_of(num_experts=4, hidden_act="silu"), []
    model.model.layers[0].mlp.experts.act_fn.register_full_backward_hook(lambda *_: calls.append(1))
    gradients(model)
    assert calls


def test_freed_blocks_are_kept_for_two_a_weight_and_no_more():
    weight, shape = torch.empty(1), (memory_blueberry.LARGE // 4 + 4,)
    many = [large_empty(weight, shape, torch.float32) for _ in range(10)]
    size = many[0].nbytes
    del many
    gc.collect()
    assert len(memory_blueberry._blocks[size].free) == 2
