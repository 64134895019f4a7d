"""Muon against torch's own and the definition of the update."""

import copy

import pytest
import torch
from torch import nn
from toy_weights import parameters, set_gradients, steps

from blueberry.errors import UsageError
from blueberry.optim import Muon
from blueberry.optim.muon import normalize_neurons, update_scale
from blueberry.optim.splits import Layout
from blueberry.polar import newton_schulz


def test_muon_matches_torch_muon_step_for_step_with_the_same_coefficients():
    ours, theirs = parameters((24, 16), (16, 24)), parameters((24, 16), (16, 24))
    muon = Muon(ours, lr=0.02, coefficients="keller_jordan", weight_decay=0.1, ns_dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="original")
    for seed in range(5):
        for optimizer, params in ((muon, ours), (reference, theirs)):
            set_gradients(params, seed)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        # Both run Newton-Schulz in bfloat16 from inputs normalised in another order: 5 steps of lr times its noise
        torch.testing.assert_close(mine, other, rtol=0, atol=5 * 0.02 * 0.02)


def test_one_step_is_momentum_then_polar_factor_then_scale():
    (weight,) = parameters((12, 5), dtype=torch.float64)
    before, first, second = weight.detach().clone(), torch.randn(12, 5).double(), torch.randn(12, 5).double()
    muon = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    buffer = torch.zeros_like(first)
    for gradient in (first, second):
        weight.grad = gradient
        muon.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        direction = newton_schulz(0.9 * buffer + 0.1 * gradient)
        before = before * (1 - 0.1 * 0.5) - 0.1 * (12 / 5) ** 0.5 * direction
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-12)


def test_every_expert_of_a_stack_gets_the_update_it_would_get_alone():
    (stack,) = parameters((3, 8, 12), dtype=torch.float64)
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    gradient = torch.randn(3, 8, 12).double()
    stack.grad = gradient
    for parameter, part in zip(alone, gradient, strict=True):
        parameter.grad = part.clone()
    Muon([stack]).step()
    Muon(alone).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]), rtol=0, atol=1e-12)


def test_batching_by_bytes_changes_nothing():
    one, many = parameters(*[(6, 4)] * 5, dtype=torch.float64), parameters(*[(6, 4)] * 5, dtype=torch.float64)
    for params, size in ((one, 1), (many, 2**20)):
        set_gradients(params, 1)
        Muon(params, batch_bytes=size).step()
    torch.testing.assert_close(one, many, rtol=0, atol=1e-12)


def test_switches_for_the_ablations_do_what_they_say():
    (weight,) = parameters((4, 6), dtype=torch.float64)
    before, gradient = weight.detach().clone(), torch.randn(4, 6).double()
    weight.grad = gradient.clone()
    muon = Muon([weight], lr=0.5, momentum=0, orthogonalize=False)
    muon.step()
    torch.testing.assert_close(weight.detach(), before - 0.5 * gradient)
    assert not muon.state[weight]


@pytest.mark.parametrize(
    ("mode", "shape", "scale"),
    [("shape", (8, 2), 2.0), ("shape", (2, 8), 1.0), ("rms_match", (4, 16), 0.8), ("none", (9, 1), 1.0)],
)
def test_update_scale_follows_its_definition(mode, shape, scale):
    assert update_scale(mode, *shape) == pytest.approx(scale)


def test_rms_match_gives_updates_an_rms_of_a_fifth():
    update = newton_schulz(torch.randn(64, 256).double()) * update_scale("rms_match", 64, 256)
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.1)  # singular values are within 10% of 1


def test_gradients_are_never_written():
    params = parameters((5, 7), (3, 4, 4))
    set_gradients(params, 3)
    gradients = [parameter.grad.clone() for parameter in params]
    Muon(params).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))


def test_bfloat16_weights_keep_float32_momentum_through_save_and_load():
    params = parameters((6, 4), dtype=torch.bfloat16)
    muon = Muon(params)
    steps(muon, params, range(2))
    saved = copy.deepcopy(muon.state_dict())
    again = Muon(params)
    again.load_state_dict(saved)
    buffer = again.state[params[0]]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, saved["state"][0]["momentum_buffer"])


def test_a_parameter_without_gradient_is_left_alone():
    params = parameters((4, 4), (4, 4))
    params[0].grad = torch.ones(4, 4)
    before = params[1].detach().clone()
    Muon(params).step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1 is no step size"),
        ({"momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ({"ns_steps": 21}, r"ns_steps=21 is outside 1\.\.20"),
        ({"weight_decay": -1}, "weight_decay=-1 is no share"),
        ({"scale_mode": "rms"}, "scale_mode='rms' is unknown: use one of shape"),
        ({"coefficients": "best"}, "coefficients='best' is unknown"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(UsageError, match=message):
        Muon(parameters((2, 2)), **settings)


def test_a_vector_is_refused_by_name():
    with pytest.raises(UsageError, match=r"layer\.bias has shape \(3,\).*give it to AdamW"):
        Muon([("layer.bias", nn.Parameter(torch.zeros(3)))])


def test_cautious_decay_shrinks_only_what_the_update_shrinks():
    (weight,) = parameters((6, 4), dtype=torch.float64)
    before = weight.detach().clone()
    weight.grad = torch.randn(6, 4).double()
    update = newton_schulz(0.05 * weight.grad * 1.95)  # scale does not matter
    Muon([weight], lr=0.1, weight_decay=0.5, cautious=True, scale_mode="none").step()
    kept = torch.where(update * before > 0, before * (1 - 0.1 * 0.5), before)
    torch.testing.assert_close(weight.detach(), kept - 0.1 * update, rtol=0, atol=1e-9)


def test_normuon_equalizes_the_rows_and_keeps_the_norm():
    update, moment = torch.randn(5, 8).double() * torch.tensor([[1.0], [2], [3], [4], [5]]), torch.zeros(5, 1).double()
    normalized = normalize_neurons(update, moment, beta=0.95)
    rows = normalized.norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand(5))
    assert normalized.norm() == pytest.approx(update.norm().item())
    torch.testing.assert_close(moment, 0.05 * update.square().mean(1, keepdim=True))


def test_a_stack_of_experts_cut_by_batch_bytes_steps_as_one():
    whole, cut = parameters((7, 6, 4), dtype=torch.float64), parameters((7, 6, 4), dtype=torch.float64)
    for params, size in ((whole, 2**20), (cut, 1500)):
        optimizer = Muon(params, batch_bytes=size, neuron_beta=0.9)
        steps(optimizer, params, range(2))
    assert len(list(optimizer._pieces(optimizer.param_groups[0]))) > 2
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-12)


def test_fused_and_transposed_weights_step_as_their_matrices_would_alone():
    layout = Layout(transposed=True, shape=(3, -1))  # stored (in, 3 out): query, key, value side by side
    (fused,) = parameters((6, 12), dtype=torch.float64)
    alone = [nn.Parameter(part.detach().clone()) for part in fused.T.reshape(3, 4, 6)]
    fused.grad = torch.randn(6, 12).double()
    for parameter, gradient in zip(alone, fused.grad.T.reshape(3, 4, 6), strict=True):
        parameter.grad = gradient.clone()
    Muon([{"params": [fused], "layout": tuple(layout)}]).step()
    Muon(alone).step()
    torch.testing.assert_close(fused.detach().T.reshape(3, 4, 6), torch.stack([p.detach() for p in alone]))


def test_unequal_parts_keep_their_own_scale():
    layout = Layout(shape=(-1,), sizes=(16, 2))
    (fused,) = parameters((18, 4), dtype=torch.float64)
    before = fused.detach().clone()
    fused.grad = torch.randn(18, 4).double()
    Muon([fused], lr=1.0, layout=layout).step()
    direction = fused.grad  # newton_schulz does not depend on scale
    expected = torch.cat([newton_schulz(direction[:16]) * (16 / 4) ** 0.5, newton_schulz(direction[16:])])
    torch.testing.assert_close(before - fused.detach(), expected, rtol=0, atol=1e-9)
