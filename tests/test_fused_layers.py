"""The fused norm and the head's loss without logits equal their definitions, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.losses_blueberry import can_fuse_head, head_cross_entropy
from blueberry.norm_blueberry import BlueberryRMSNorm


def norm(size: int, dtype: torch.dtype = torch.float64) -> BlueberryRMSNorm:
    module = BlueberryRMSNorm(size, 1e-6).to(dtype)
    nn.init.normal_(module.weight, mean=1.0)
    return module


def test_rms_norm_is_its_definition():
    module, x = norm(6), torch.randn(2, 3, 6, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=str)
def test_rms_norm_has_the_right_gradients(shape):
    module, x = norm(5), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x,)),
                                    (x, module.weight))  # fmt: skip


def test_rms_norm_of_half_precision_is_computed_in_float32():
    module, x = norm(64, torch.bfloat16), 100 * torch.randn(8, 64).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(module(x), module.weight * wide.bfloat16())


def test_rms_norm_of_zeros_is_zero_with_finite_gradients():
    x = torch.zeros(3, 4, requires_grad=True)
    module = norm(4, torch.float32)
    module(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(module.weight.grad).all()


@pytest.mark.parametrize("num_items", [None, 17])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_without_logits_equals_the_plain_loss_and_so_do_its_gradients(num_items, shifted):
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 700, 16, requires_grad=True), nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (3, 700)).masked_fill(torch.rand(3, 700) < 0.3, -100)
    targets = labels if shifted else F.pad(labels, (0, 1), value=-100)[:, 1:]
    plain = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    plain = plain / ((targets != -100).sum() if num_items is None else num_items)
    given = {"shift_labels": labels} if shifted else {"labels": labels}
    fused = head_cross_entropy(hidden, head.weight, **given, num_items_in_batch=num_items)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head.weight)) for x in (fused, plain)), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_model_gives_the_same_loss_and_gradients_with_and_without_logits():
    torch.manual_seed(0)
    config = BlueberryConfig.from_preset("tiny", vocab_size=60, hidden_size=16, num_hidden_layers=2,
                                         moe_intermediate_size=8)  # fmt: skip
    model, ids = BlueberryForCausalLM(config).double(), torch.randint(0, 60, (2, 20))
    results = []
    for skip in (False, True):
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, skip_logits=skip)
        output.loss.backward()
        results.append((output.loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        assert (output.logits is None) == skip
    # transformers' plain loss rounds the logits to float32
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_heads_that_are_more_than_a_matrix_keep_their_logits():
    hidden = torch.randn(2, 3, 4)
    assert can_fuse_head(hidden, nn.Linear(4, 5, bias=False))
    assert not can_fuse_head(hidden, nn.Linear(4, 5))
    assert not can_fuse_head(hidden, nn.Sequential(nn.Linear(4, 5, bias=False)))
    assert not can_fuse_head(hidden.bfloat16(), nn.Linear(4, 5, bias=False).bfloat16())
