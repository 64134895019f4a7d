"""Muon and its composition with AdamW, against torch's own optimizers and the definition of the update."""

import copy

import pytest
import torch
from torch import nn

from blueberry.errors import UsageError
from blueberry.optim import ComposedOptimizer, Muon, build_optimizer
from blueberry.optim.muon import update_scale
from blueberry.polar import newton_schulz


def parameters(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(*parameter.shape, generator=generator).to(parameter.dtype)


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.out = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.out(torch.relu(self.hidden(self.embedding(ids)))))
        return (hidden @ self.embedding.weight.T).logsumexp(-1).mean()


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
        ({"lr": -0.1}, "lr=-0.1 is negative"),
        ({"momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ({"ns_steps": 21}, r"ns_steps=21 is outside 1\.\.20"),
        ({"weight_decay": -1}, "weight_decay=-1 is negative"),
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


def composed(model: nn.Module) -> ComposedOptimizer:
    return build_optimizer(model, muon_lr=0.1, adamw_lr=0.01, weight_decay=0.1, max_grad_norm=0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(11)).backward()
        optimizer.step()


def test_adamw_through_the_composition_matches_torch_adamw():
    torch.manual_seed(0)
    model = TinyModel()
    twin = copy.deepcopy(model)
    train(model, build_optimizer(model, optimizer="adamw", adamw_lr=0.01, weight_decay=0.1, max_grad_norm=0), 4)
    decayed = [p for p in twin.parameters() if p.ndim == 2]
    rest = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    train(twin, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95)), 4)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_resuming_from_a_state_dict_gives_the_same_weights_as_never_stopping():
    torch.manual_seed(0)
    straight = TinyModel()
    resumed = copy.deepcopy(straight)
    train(straight, composed(straight), 5)
    first = composed(resumed)
    train(resumed, first, 2)
    second = composed(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, second, 3)
    for mine, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_changed_learning_rate_reaches_every_part_even_after_loading():
    model = TinyModel()
    optimizer = composed(model)
    train(model, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_scheduler_keeps_the_ratio_of_learning_rates():
    optimizer = composed(TinyModel())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == pytest.approx(
        {"muon": 0.05, "adamw": 0.005, "adamw_vectors": 0.005}
    )


def test_only_groups_with_a_bound_are_clipped_by_their_common_norm():
    model = TinyModel()
    optimizer = build_optimizer(model, max_grad_norm=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    clipped = [p.grad for g in optimizer.param_groups if g["name"] != "muon" for p in g["params"]]
    assert torch.stack([gradient.norm() for gradient in clipped]).norm() == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(model.hidden.weight.grad, torch.ones(8, 6))


def test_unknown_settings_and_optimizers_are_refused():
    with pytest.raises(UsageError, match="setting 'nesterof' is unknown"):
        build_optimizer(TinyModel(), nesterof=False)
    with pytest.raises(UsageError, match="optimizer='sgd' is unknown"):
        build_optimizer(TinyModel(), optimizer="sgd")


def test_a_model_without_hidden_matrices_is_an_error_not_a_silent_adamw():
    with pytest.raises(UsageError, match="Muon would do nothing"):
        build_optimizer(nn.LayerNorm(4))


def test_adding_a_group_needs_the_name_of_a_part():
    optimizer = composed(TinyModel())
    with pytest.raises(UsageError, match='"optimizer" is None: name one of muon, adamw'):
        optimizer.add_param_group({"params": parameters((2, 2))})
