"""Fused norms, attention by blocks and the head's loss without logits equal their definitions, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from blueberry import BlueberryConfig, BlueberryForCausalLM, attention_blueberry
from blueberry.attention_blueberry import BLOCK, LONGEST, can_attend_in_blocks, causal_attention, cut, share
from blueberry.losses_blueberry import can_fuse_head, head_cross_entropy, logits_cross_entropy
from blueberry.norm_blueberry import BlueberryHeadRMSNorm, BlueberryRMSNorm
from blueberry.products_blueberry import linear
from blueberry.threads_blueberry import blas_threads


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


def test_norms_take_inputs_and_gradients_of_any_layout():
    module, x = norm(6), torch.randn(6, 4, dtype=torch.float64).t().requires_grad_()
    for direction in (torch.ones(()).double().expand(4, 6), torch.randn(6, 4, dtype=torch.float64).t()):
        kept = direction.clone()
        actual = torch.autograd.grad(module(x), (x, module.weight), direction)
        plain = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight
        for one, other in zip(actual, torch.autograd.grad(plain, (x, module.weight), kept), strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(direction, kept)  # gradients of others are not written to


def test_rms_norm_of_half_precision_is_computed_in_float32():
    module, x = norm(64, torch.bfloat16), 100 * torch.randn(8, 64).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(module(x), module.weight * wide.bfloat16())


def test_rms_norm_of_zeros_is_zero_with_finite_gradients():
    x = torch.zeros(3, 4, requires_grad=True)
    module = norm(4, torch.float32)
    module(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(module.weight.grad).all()


def test_rms_norm_under_autocast_gives_the_dtype_of_the_products_that_follow():
    module, x = norm(64, torch.float32), torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert torch.equal(output, module(x).bfloat16())
    output.sum().backward()
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """The definition, by complex numbers: the halves of x (batch, seq, heads, size) are real and imaginary parts."""
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angles).unsqueeze(2)
    return torch.cat((turned.real, turned.imag), dim=-1).transpose(1, 2)


def head_norm(size: int) -> BlueberryHeadRMSNorm:
    module = BlueberryHeadRMSNorm(size, 1e-6).double()
    nn.init.normal_(module.weight, mean=1.0)
    return module


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_are_normalized_and_turned_by_their_angles(batch: int):
    x, angles = torch.randn(2, 5, 3, 6, dtype=torch.float64), 7 * torch.randn(batch, 5, 3, dtype=torch.float64)
    module = head_norm(6)
    expected = rotated(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight, angles)
    torch.testing.assert_close(module(x, angles.cos(), angles.sin()), expected, rtol=1e-12, atol=1e-12)


def test_normalized_and_turned_heads_have_the_right_gradients():
    x, angles = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, 2).double()
    module = head_norm(4)
    turns = angles.cos(), angles.sin()
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(module, {"weight": weight}, (x, *turns)), (x, module.weight)
    )


def attention_inputs(seq: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    return [3 * torch.randn(2, count, seq, 6, dtype=dtype).requires_grad_() for count in heads]


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("seq", [1, 5, BLOCK, 2 * BLOCK + 3])
def test_attention_by_blocks_is_causal_attention_and_so_are_its_gradients(seq, kv_heads, threads, monkeypatch):
    monkeypatch.setattr(attention_blueberry, "workers_pay", lambda multiplications: True)
    inputs = attention_inputs(seq, kv_heads)
    query, key, value = inputs[0], *(x.repeat_interleave(4 // kv_heads, dim=1) for x in inputs[1:])
    scores = (query @ key.transpose(2, 3) / 6**0.5).masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    direction = torch.randn_like(expected)
    with blas_threads(threads):
        actual = causal_attention(*inputs, 6**-0.5)
        gradients = torch.autograd.grad(actual, inputs, direction)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("batch", "enough", "threads", "pieces", "each"),
    [
        (4, True, 2, 4, 1),
        (1, True, 2, 2, 1),
        (4, True, 16, 16, 1),
        (4, 128 * 600 * 6 * 4, 16, 4, 4),  # parts of a sequence's heads would be too small
        (3, 128 * 600 * 6 * 4, 2, 3, 1),
        (4, False, 16, 4, 16),
        (0, True, 2, 0, 2),
    ],
)
def test_attention_is_shared_in_pieces_that_are_large_enough(batch, enough, threads, pieces, each, monkeypatch):
    pay = (lambda multiplications: enough) if isinstance(enough, bool) else (lambda count: count >= enough)
    monkeypatch.setattr(attention_blueberry, "workers_pay", pay)
    with blas_threads(threads):
        shared, threads_each = share(torch.zeros(batch, 4, 600, 6), kv_heads=4)
    assert (len(shared), threads_each) == (pieces, each)


def test_attention_to_no_sequences_is_empty():
    nothing = torch.zeros(0, 4, 5, 6, requires_grad=True)
    output = causal_attention(nothing, nothing, nothing, 1.0)
    assert output.shape == (0, 5, 4, 6)
    output.sum().backward()
    assert nothing.grad.shape == nothing.shape


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "workers", "pieces"),
    [(4, 8, 8, 2, 4), (1, 8, 8, 2, 2), (1, 8, 2, 16, 2), (3, 12, 6, 8, 9), (2, 6, 3, 5, 6), (1, 4, 1, 2, 1)],
)
def test_pieces_have_every_head_once_with_the_keys_that_it_reads(batch, heads, kv_heads, workers, pieces):
    seen = []
    cuts = cut(batch, heads, kv_heads, workers)
    for index, own, shared in cuts:
        queries, keys = range(heads)[own], range(kv_heads)[shared]
        assert [head // (heads // kv_heads) for head in queries] == [k for k in keys for _ in range(heads // kv_heads)]
        seen += [(index, head) for head in queries]
    assert sorted(seen) == [(index, head) for index in range(batch) for head in range(heads)]
    assert len(cuts) == pieces


def test_attention_by_blocks_takes_only_training_on_whole_sequences():
    query, key, _ = attention_inputs(5, 4)
    assert can_attend_in_blocks(query, key, None, dropout=0.0)
    assert not can_attend_in_blocks(query, key, torch.zeros(1, 1, 5, 5), dropout=0.0)
    assert not can_attend_in_blocks(query, key, None, dropout=0.1)
    assert not can_attend_in_blocks(query[:, :, :1], key, None, dropout=0.0)
    long = torch.zeros(1, 1, LONGEST + 1, 2, requires_grad=True)
    assert not can_attend_in_blocks(long, long, None, dropout=0.0)
    with torch.no_grad():
        assert not can_attend_in_blocks(query, key, None, dropout=0.0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 17])
def test_the_loss_of_logits_equals_that_of_transformers_and_so_does_its_gradient(dtype: torch.dtype, num_items):
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 70, 50)).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 70)).masked_fill(torch.rand(3, 70) < 0.3, -100)
    losses = [loss(logits, labels, 50, num_items) for loss in (logits_cross_entropy, ForCausalLMLoss)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    assert (ours - theirs).float().norm() <= rounding * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_is_a_matrix_product(dtype: torch.dtype, transposed: bool):
    x, weight = torch.randn(37, 20).to(dtype), torch.randn(20, 45).t().to(dtype)
    weight = weight if transposed else weight.contiguous()
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(linear(x, weight), (x.double() @ weight.double().t()).to(dtype), **tolerance)


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
    assert not can_fuse_head(hidden.bfloat16(), nn.Linear(4, 5, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        assert can_fuse_head(hidden.bfloat16(), nn.Linear(4, 5, bias=False))


def test_the_loss_without_logits_has_the_right_gradients():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 3), (7, 3)))
    labels = torch.tensor([[1, 2, -100, 6], [-100, 0, 3, 3]])
    assert torch.autograd.gradcheck(lambda h, w: head_cross_entropy(h, w, labels), (hidden, weight))


def test_the_loss_without_logits_survives_probabilities_that_underflow():
    hidden = torch.tensor([[[1.0], [1.0]]], requires_grad=True)
    weight = torch.tensor([[300.0], [-300.0], [0.0]], requires_grad=True)  # exp(-600) is zero in fp32
    loss = head_cross_entropy(hidden, weight, shift_labels=torch.tensor([[1, 0]]))
    loss.backward()
    assert loss.item() == 300.0  # (600 + 0) / 2
    assert weight.grad.flatten().tolist() == [0.5, -0.5, 0.0]


def test_the_loss_without_logits_can_be_differentiated_twice_over_the_same_graph():
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = head_cross_entropy(hidden, weight, torch.tensor([[0, 1, 2]]))
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, 3 * other)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_the_loss_without_logits_leaves_out_what_is_frozen(frozen: str):
    inputs = {"hidden": torch.randn(1, 3, 4), "weight": torch.randn(5, 4)}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    head_cross_entropy(**inputs, labels=torch.tensor([[0, 1, 2]])).backward()
    assert [tensor.grad is None for tensor in inputs.values()] == [name == frozen for name in inputs]


def test_under_autocast_the_loss_without_logits_equals_that_of_the_logits():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 700, 32, requires_grad=True), nn.Linear(32, 90, bias=False)
    labels = torch.randint(0, 90, (2, 700))
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        fused = head_cross_entropy(hidden, head.weight, labels)
    # the same bf16 logits, the rest in fp32
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head.weight)) for x in (fused, plain)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()  # both round the logits' gradient to bf16, 2^-9
