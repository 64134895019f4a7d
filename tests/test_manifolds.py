"""Stiefel and Sphere: each test restates a definition, in float64, or compares with geoopt."""

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry.errors import UsageError
from blueberry.manifolds import Sphere, Stiefel, orthonormalize

SHAPES = [(7, 7), (9, 4), (4, 9), (6, 1), (1, 6), (1, 1), (3, 8, 5), (2, 3, 5, 8)]
MODES = ["per_row", "per_column", "whole"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("radius", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_of_a_stiefel_point_are_the_radius(shape, radius):
    point = Stiefel(radius).random_point(*shape, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(point) / radius, torch.ones(*shape[:-2], min(shape[-2:])).double())
    assert Stiefel(radius).orthogonality_error(point).max() < 1e-13
    assert Stiefel(radius).distance(point).max() < 1e-13 * radius


@pytest.mark.parametrize("radius", [1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_stiefel_projection_is_tangent_and_the_rest_is_orthogonal_to_every_tangent_vector(shape, radius):
    manifold = Stiefel(radius)
    point = manifold.random_point(*shape, generator=generator(), dtype=torch.float64)
    vector, other = gaussian(*shape, seed=1), manifold.projection(point, gaussian(*shape, seed=2))
    tangent = manifold.projection(point, vector)
    w, a = (point.mT, tangent.mT) if shape[-1] > shape[-2] else (point, tangent)
    torch.testing.assert_close(w.mT @ a + a.mT @ w, torch.zeros_like(w.mT @ a), rtol=0, atol=1e-13 * radius)
    torch.testing.assert_close(manifold.projection(point, tangent), tangent)
    assert ((vector - tangent) * other).sum().abs() < 1e-12


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_stiefel_retraction_agrees_with_the_straight_line_to_second_order(out, columns, seed):
    manifold = Stiefel()
    point = manifold.random_point(out, columns, generator=generator(seed), dtype=torch.float64)
    tangent = manifold.projection(point, gaussian(out, columns, seed=seed + 1))
    gaps = []
    for t in (1e-3, 1e-4):
        moved = manifold.retraction(point, t * tangent)
        assert manifold.orthogonality_error(moved) < 1e-12
        gaps.append((moved - point - t * tangent).norm() / t**2)
    bound = 2 * tangent.norm() ** 2 + 1e-6  # the second-order term of the polar retraction is W A^T A / 2
    assert max(gaps) < bound


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9)])
def test_stiefel_maps_match_geoopt(shape):
    ours, theirs = Stiefel(), geoopt.EuclideanStiefel()
    matrix, vector = gaussian(*shape), gaussian(*shape, seed=1)
    turn = (lambda x: x.mT) if shape[1] > shape[0] else (lambda x: x)  # geoopt wants them tall
    point = ours.nearest_point(matrix)
    torch.testing.assert_close(turn(point), theirs.projx(turn(matrix)))
    torch.testing.assert_close(turn(ours.projection(point, vector)), theirs.proju(turn(point), turn(vector)))


@pytest.mark.parametrize("mode", MODES)
def test_sphere_maps_match_geoopt_and_keep_the_radius(mode):
    matrix, vector = gaussian(5, 8), gaussian(5, 8, seed=1)
    ours, theirs = Sphere(mode), geoopt.Sphere()
    rows = {"per_row": lambda x: x, "per_column": lambda x: x.mT, "whole": lambda x: x.flatten()}[mode]
    point = ours.nearest_point(matrix)
    tangent = ours.projection(point, vector)
    torch.testing.assert_close(rows(point), theirs.projx(rows(matrix)))
    torch.testing.assert_close(rows(tangent), theirs.proju(rows(point), rows(vector)))
    torch.testing.assert_close(rows(ours.retraction(point, tangent)), theirs.retr(rows(point), rows(tangent)))


@pytest.mark.parametrize("mode", MODES)
def test_sphere_retraction_agrees_with_the_straight_line_to_second_order(mode):
    manifold = Sphere(mode, 3.0)
    point = manifold.random_point(2, 4, 6, generator=generator(), dtype=torch.float64)
    tangent = manifold.projection(point, gaussian(2, 4, 6, seed=1))
    gaps = [(manifold.retraction(point, t * tangent) - point - t * tangent).norm().item() / t**2 for t in (1e-3, 1e-4)]
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-2) and gaps[0] < tangent.norm() ** 2
    assert manifold.radius_error(manifold.retraction(point, tangent)).max() < 1e-14


def test_sphere_keeps_a_radius_of_its_own_for_every_vector_and_leaves_zero_vectors_alone():
    matrix = gaussian(4, 6)
    matrix[2] = 0
    manifold = Sphere("per_row", matrix.norm(dim=-1, keepdim=True))
    moved = manifold.retraction(matrix, manifold.projection(matrix, gaussian(4, 6, seed=1)) * torch.ones(4, 1))
    torch.testing.assert_close(moved[[0, 1, 3]].norm(dim=-1), matrix[[0, 1, 3]].norm(dim=-1))
    assert torch.equal(manifold.nearest_point(matrix)[2], torch.zeros(6).double())
    assert manifold.radius_error(manifold.nearest_point(matrix)) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 3.0, 1e4])
def test_orthonormalize_finds_the_polar_factor_however_far_away(size, dtype):
    """The oracle is U V^T of an SVD; the error allowed is a few rounding errors of the dtype."""
    matrix = Stiefel().random_point(3, 40, 12, generator=generator(), dtype=torch.float64)
    matrix = matrix + size * gaussian(3, 40, 12, seed=1)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    factor = orthonormalize(matrix.to(dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(factor.double(), u @ vh, rtol=0, atol=50 * eps)
    assert Stiefel().orthogonality_error(factor).max() < 100 * eps


def test_orthonormalize_returns_a_point_of_the_manifold_bit_for_bit():
    point = Stiefel().random_point(30, 20, generator=generator())
    assert orthonormalize(point) is point


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Stiefel(0.0), r"radius=0\.0 is not a positive number"),
        (lambda: Stiefel(float("nan")), "radius=nan is not a positive number"),
        (lambda: Sphere("per_row", -1.0), r"radius=-1\.0 is not a positive number"),
        (lambda: Sphere("rows"), "mode='rows' is unknown: use one of per_row"),
        (lambda: Stiefel().nearest_point(torch.zeros(4, 3)), r"shape \(4, 3\) is zero or not finite"),
        (lambda: Stiefel().nearest_point(torch.ones(4, 3)), "rank-deficient.*initialize it with random values"),
        (lambda: Stiefel().nearest_point(torch.full((2, 2), torch.nan)), "zero or not finite"),
    ],
)
def test_what_has_no_point_on_the_manifold_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
