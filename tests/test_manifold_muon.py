"""StiefelMuon and HypersphereMuon: their step restated, the constraint at every step, bad input, exact state."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_weights import parameters, set_gradients, steps

from blueberry.errors import UsageError
from blueberry.manifolds import Sphere, Stiefel
from blueberry.optim import ComposedOptimizer, HypersphereMuon, StiefelMuon
from blueberry.optim.manifold_weights import rounding_bound
from blueberry.optim.splits import Layout
from blueberry.stiefel import steepest_tangent_step

FAMILIES = [(12, 12), (20, 8), (8, 20), (3, 12, 6), (2, 6, 12), (5, 7, 7), (1, 9), (9, 1), (1, 1)]


def errors(weight: torch.Tensor, radius: float = 1.0) -> float:
    return Stiefel(radius).orthogonality_error(weight.detach()).max().item()


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_a_stiefel_step_is_momentum_then_the_steepest_tangent_direction_then_the_polar_retraction(radius):
    (weight,) = parameters((10, 4), dtype=torch.float64)
    optimizer = StiefelMuon([weight], lr=0.1, momentum=0.9, radius=radius)
    point, buffer, dual = weight.detach().clone(), torch.zeros(10, 4).double(), None
    for seed in range(3):
        set_gradients([weight], seed)
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * weight.grad
        direction = 0.1 * weight.grad + 0.9 * buffer
        step = steepest_tangent_step(point[None] / radius, direction[None], dual)
        dual = step.dual_variable
        u, _, vh = torch.linalg.svd(point - 0.1 * step.direction[0], full_matrices=False)
        point = radius * u @ vh
        torch.testing.assert_close(weight.detach(), point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", FAMILIES, ids=str)
@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_every_matrix_family_stays_on_the_manifold_at_every_step(shape, lr):
    (weight,) = parameters(shape)
    optimizer = StiefelMuon([weight], lr=lr)
    start = weight.detach().clone()
    for seed in range(20):
        steps(optimizer, [weight], range(seed, seed + 1))
        assert errors(weight) < 1e-5
    assert (min(shape[-2:]), max(shape[-2:])) == (1, 1) or not torch.equal(weight, start)


@given(st.integers(1, 10), st.integers(1, 10), st.floats(1e-4, 3.0), st.floats(-20, 20), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_no_learning_rate_and_no_gradient_scale_breaks_the_constraint(out, columns, lr, exponent, seed):
    (weight,) = parameters((out, columns), seed=seed)
    optimizer = StiefelMuon([weight], lr=lr)
    for number in range(3):
        set_gradients([weight], seed + number)
        weight.grad *= 10**exponent
        optimizer.step()
        assert errors(weight) < 1e-4


def test_a_step_descends_the_loss_to_first_order():
    (weight,) = parameters((16, 6), dtype=torch.float64)
    optimizer = StiefelMuon([weight], lr=1e-3, momentum=0)
    set_gradients([weight], 0)
    gradient, before = weight.grad.clone(), weight.detach().clone()
    optimizer.step()
    moved = weight.detach() - before
    tangent = Stiefel().projection(before, gradient)
    assert (gradient * moved).sum() < -1e-3 * 0.5 * torch.linalg.matrix_norm(tangent, "nuc")


def test_initialization_is_the_polar_factor_and_leaves_points_of_the_manifold_bit_for_bit():
    (weight,) = parameters((8, 5), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    StiefelMuon([weight])
    torch.testing.assert_close(weight.detach(), u @ vh)
    again = weight.detach().clone()
    StiefelMuon([weight])
    assert torch.equal(weight, again)


def test_fused_and_transposed_weights_keep_each_matrix_orthonormal_and_step_as_alone():
    layout = Layout(transposed=True, shape=(3, -1))
    (fused,) = parameters((6, 12), dtype=torch.float64)
    alone = [nn.Parameter(part.detach().clone()) for part in fused.T.reshape(3, 4, 6)]
    optimizers = [StiefelMuon([fused], layout=layout), StiefelMuon(alone)]
    for seed in range(3):
        set_gradients([fused], seed)
        for parameter, gradient in zip(alone, fused.grad.T.reshape(3, 4, 6), strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.detach().T.reshape(3, 4, 6), torch.stack([p.detach() for p in alone]))


def test_unequal_parts_are_each_orthonormal_with_a_dual_variable_of_their_own():
    (fused,) = parameters((18, 8))
    optimizer = StiefelMuon([fused], layout=Layout(shape=(-1,), sizes=(12, 6)))
    steps(optimizer, [fused], range(3))
    assert max(errors(fused[:12]), errors(fused[12:])) < 1e-5
    state = optimizer.state[fused]
    assert state["dual_variable"].shape == (8, 8) and state["dual_variable_1"].shape == (6, 6)


def test_experts_matrices_and_threads_do_not_change_what_a_matrix_gets(monkeypatch):
    """A stack, its experts alone, one thread and two, large batches and small: the same weights."""
    results = []
    for threads, elements in ((1, 2**19), (2, 200)):
        stack, *others = parameters((5, 12, 6), (9, 9), (12, 6), seed=3)
        monkeypatch.setattr("blueberry.optim.stiefel_muon._BATCH_ELEMENTS", {"cpu": elements})
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        steps(StiefelMuon([stack, *others], tangency_tolerance=0.0), [stack, *others], range(3))
        results.append([p.detach().clone() for p in (stack, *others)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["stiefel", "per_row", "per_column", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_and_go_on_gives_the_weights_of_never_stopping(kind, dtype):
    def make(params):
        return StiefelMuon(params) if kind == "stiefel" else HypersphereMuon(params, mode=kind)

    straight, stopped = (parameters((12, 6), (3, 8, 8), dtype=dtype) for _ in range(2))
    steps(make(straight), straight, range(6))
    first = make(stopped)
    steps(first, stopped, range(3))
    saved, weights = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in stopped]
    resumed = parameters((12, 6), (3, 8, 8), seed=9, dtype=dtype)
    second = make(resumed)  # built before the weights are loaded, as the Trainer does
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    second.load_state_dict(saved)
    steps(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_bfloat16_weights_have_a_float32_copy_that_keeps_the_constraint_and_are_its_rounding():
    (weight,) = parameters((64, 32), dtype=torch.bfloat16)
    optimizer = StiefelMuon([weight], lr=0.1)
    for seed in range(10):
        steps(optimizer, [weight], range(seed, seed + 1))
        master = optimizer.state[weight]["master_weight"]
        assert master.dtype == torch.float32 and errors(master) < 1e-5
        assert torch.equal(weight, master.bfloat16())
        assert errors(weight) < 1e-5 + rounding_bound(weight)  # 2 u sqrt(32) + u^2 32, u = 2^-8: 0.045
    ((_, _, values),) = optimizer.constraint_errors()
    assert values.max() < 1e-5


def test_a_copied_or_pickled_optimizer_goes_on_as_the_original():
    params = parameters((12, 6))
    optimizer = StiefelMuon(params)
    steps(optimizer, params, range(2))
    twin_params, twin = copy.deepcopy((params, optimizer))
    steps(optimizer, params, range(2, 4))
    steps(twin, twin_params, range(2, 4))
    assert torch.equal(params[0], twin_params[0])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("make", [StiefelMuon, HypersphereMuon])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(make, bad):
    params = parameters((12, 6), (4, 4))
    optimizer = make(params)
    steps(optimizer, params, range(2))
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(params, 5)
    params[1].grad[0, 0] = bad
    optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 1
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for index, tensors in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in tensors.items())


def test_weights_that_were_loaded_off_the_manifold_are_projected_with_a_warning_or_refused():
    for repair in (True, False):
        (weight,) = parameters((12, 6))
        on_manifold = StiefelMuon([weight])  # projects
        optimizer = StiefelMuon([weight], init_on_manifold=repair)
        optimizer.load_state_dict(on_manifold.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]})
        with torch.no_grad():
            weight.mul_(1.5)
        set_gradients([weight], 0)
        if repair:
            with pytest.warns(UserWarning, match=r"params\[0\] was off its manifold by 3.06 after loading: projected"):
                optimizer.step()
            assert errors(weight) < 1e-5
        else:
            with pytest.raises(UsageError, match=r"params\[0\] is off its manifold by 3.06, more than 0.0001"):
                optimizer.step()


@pytest.mark.parametrize("mode", ["per_row", "per_column", "whole"])
def test_a_sphere_step_restates_riemannian_gradient_momentum_and_retraction(mode):
    (weight,) = parameters((6, 5), dtype=torch.float64)
    optimizer = HypersphereMuon([weight], lr=0.1, momentum=0.9, nesterov=False, beta2=0, mode=mode)
    dims = {"per_row": (1,), "per_column": (0,), "whole": (0, 1)}[mode]
    norm = lambda x: x.square().sum(dims, keepdim=True).sqrt()
    radius, point, buffer = norm(weight.detach()), weight.detach().clone(), torch.zeros(6, 5).double()
    tangent = lambda z: z - point * (point * z).sum(dims, keepdim=True) / radius**2
    for seed in range(3):
        set_gradients([weight], seed)
        optimizer.step()
        buffer = 0.9 * tangent(buffer) + 0.1 * tangent(weight.grad)
        moved = point - 0.1 * radius * buffer / norm(buffer)
        point = moved * radius / norm(moved)
        torch.testing.assert_close(weight.detach(), point, rtol=0, atol=1e-12)


@given(st.sampled_from(["per_row", "per_column", "whole"]), st.floats(1e-3, 2.0), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_sphere_radii_are_kept_to_a_millionth_at_any_learning_rate(mode, lr, seed):
    (weight,) = parameters((7, 5), seed=seed)
    radius = Sphere(mode).norm(weight.detach()).clone()
    optimizer = HypersphereMuon([weight], lr=lr, mode=mode)
    for number in range(5):
        steps(optimizer, [weight], range(seed + number, seed + number + 1))
        assert Sphere(mode, radius).radius_error(weight.detach()) < 1e-6


def test_rare_gradients_move_a_row_less_and_rows_without_any_stay():
    (weight,) = parameters((3, 8))
    before = weight.detach().clone()
    optimizer = HypersphereMuon([weight], lr=0.1, momentum=0)
    weight.grad = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [1.0], [0.0]])
    optimizer.step()
    weight.grad = weight.grad * torch.tensor([[1.0], [0.01], [0.0]])
    middle = weight.detach().clone()
    optimizer.step()
    moved = (weight.detach() - middle).norm(dim=1)
    assert moved[1] < 0.05 * moved[0]
    assert torch.equal(weight[2], before[2])


def test_a_padding_row_of_zeros_stays_zero_unless_a_radius_is_given():
    embedding = nn.Embedding(5, 4, padding_idx=0)
    optimizer = HypersphereMuon([("embedding", embedding.weight)])
    steps(optimizer, [embedding.weight], range(2))
    assert torch.equal(embedding.weight[0], torch.zeros(4))
    with pytest.raises(UsageError, match=r"embedding has a zero vector \(number 0\).*use radius=None"):
        HypersphereMuon([("embedding", nn.Embedding(5, 4, padding_idx=0).weight)], radius=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: StiefelMuon([{"params": p, "weight_decay": 1}]), "weight_decay=1 has no effect on StiefelMuon"),
        (lambda p: HypersphereMuon([{"params": p, "weight_decay": 0.1}]), "has no effect on HypersphereMuon"),
        (lambda p: StiefelMuon(p, lr=-1.0), r"lr=-1\.0 is no step size"),
        (lambda p: HypersphereMuon(p, lr=float("nan")), "lr=nan is no step size"),
        (lambda p: StiefelMuon(p, tangency_tolerance=-1.0), r"tangency_tolerance=-1\.0 is below 0"),
        (lambda p: StiefelMuon(p, momentum=1.0), r"momentum=1\.0 is outside \[0, 1\)"),
        (lambda p: StiefelMuon(p, radius=0.0), r"radius=0\.0 is not a positive number"),
        (lambda p: StiefelMuon(p, radius=-1.0), r"radius=-1\.0 is not a positive number"),
        (lambda p: HypersphereMuon(p, radius=0.0), r"radius=0\.0 is not a positive number"),
        (lambda p: HypersphereMuon(p, beta2=1.0), r"beta2=1\.0 is outside \[0, 1\)"),
        (lambda p: HypersphereMuon(p, mode="rows"), "mode='rows' is unknown"),
        (lambda p: StiefelMuon(p, solver="exact"), "solver='exact' is unknown"),
        (lambda p: StiefelMuon(p, dual_steps=0), "dual_steps=0 is no number of iterations"),
        (lambda p: StiefelMuon(p, init_on_manifold=False), r"params\[0\] is off its manifold .*init_on_manifold=True"),
        (lambda p: StiefelMuon([("bias", nn.Parameter(torch.ones(3)))]), r"bias has shape \(3,\).*give it to AdamW"),
        (lambda p: HypersphereMuon([("bias", nn.Parameter(torch.ones(3)))]), r"bias has shape \(3,\)"),
        (lambda p: StiefelMuon([("w", nn.Parameter(torch.zeros(3, 2)))]), "w: a matrix of shape .* is zero"),
        (lambda p: StiefelMuon([("w", nn.Parameter(torch.ones(2, 2).cfloat()))]), "w is torch.complex64"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line_with_value_and_remedy(make, message):
    with pytest.raises(UsageError, match=message) as error:
        make(parameters((4, 3)))
    assert "\n" not in str(error.value)


def test_the_composition_reports_what_was_knocked_off_the_manifold():
    (weight,), (rows,) = parameters((8, 4)), parameters((5, 3))
    optimizer = ComposedOptimizer({"stiefel_muon": StiefelMuon([weight]), "hypersphere_muon": HypersphereMuon([rows])})
    steps(optimizer, [weight, rows], range(2))
    assert optimizer.check_constraints()["total_violations"] == 0
    with torch.no_grad():
        weight.mul_(1.1)
        rows[0] *= 1.01
    report = optimizer.check_constraints()
    assert report["total_violations"] == 2
    assert report["by_type"]["stiefel_muon"]["max_violation"] == pytest.approx(0.21 * 4**0.5, rel=1e-4)
    assert report["by_type"]["hypersphere_muon"]["max_violation"] == pytest.approx(0.01, rel=1e-3)
    assert optimizer.log_metrics("o")["o/weights/sigma_max"] == pytest.approx(1.1, rel=1e-5)
