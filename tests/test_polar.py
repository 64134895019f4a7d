"""newton_schulz and msign against an SVD in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry.polar import COEFFICIENTS, coefficient_steps, msign, newton_schulz

SHAPES = [(32, 32), (64, 16), (16, 64), (1, 8), (8, 1), (3, 24, 8)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_condition(rows: int, columns: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values spread geometrically over [1/condition, 1]."""
    short = min(rows, columns)
    u = torch.linalg.qr(gaussian(rows, short, seed=seed))[0]
    v = torch.linalg.qr(gaussian(columns, short, seed=seed + 1))[0]
    return u * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), short, dtype=torch.float64) @ v.T


def polynomial(sigma: torch.Tensor, coefficients: str, ns_steps: int | None = None) -> torch.Tensor:
    """The definition: the scalar iteration on each singular value."""
    for a, b, c in coefficient_steps(coefficients, ns_steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_applies_its_polynomial_to_the_singular_values(shape, coefficients):
    matrix = gaussian(*shape)
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    scaled = polynomial(sigma / torch.linalg.matrix_norm(matrix).unsqueeze(-1), coefficients)
    expected = (u * scaled.unsqueeze(-2)) @ vh
    torch.testing.assert_close(newton_schulz(matrix, coefficients=coefficients), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("keller_jordan", 0.65, 1.25), ("polar_express", 0.85, 1.15)]
)
def test_newton_schulz_brings_singular_values_of_gaussian_matrices_close_to_one(coefficients, low, high):
    sigma = torch.linalg.svdvals(newton_schulz(gaussian(256, 64), coefficients=coefficients))
    assert low < sigma.min() and sigma.max() < high


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), exponent=st.integers(-20, 20), seed=st.integers(0, 1000))
def test_newton_schulz_does_not_depend_on_scale(rows, columns, exponent, seed):
    matrix = gaussian(rows, columns, seed=seed, dtype=torch.float32)
    expected = newton_schulz(matrix, dtype=torch.float32)
    # float32 rounding of the scaled entries (6e-8 relative) grows by at most the polynomial's slope at 0 (about 1000)
    torch.testing.assert_close(
        newton_schulz(matrix * 10.0**exponent, dtype=torch.float32), expected, rtol=0, atol=5e-4
    )


def test_zero_in_gives_zero_out_and_the_input_is_never_written():
    stack = torch.stack([torch.zeros(6, 4), gaussian(6, 4, dtype=torch.float32)])
    before = stack.clone()
    factor = newton_schulz(stack)
    assert torch.equal(stack, before)
    assert torch.equal(factor[0], torch.zeros(6, 4)) and torch.isfinite(factor).all()


def test_each_matrix_of_a_stack_is_orthogonalized_by_itself():
    stack = gaussian(3, 12, 20)
    each = torch.stack([newton_schulz(matrix) for matrix in stack])
    torch.testing.assert_close(newton_schulz(stack), each, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_has_the_dtype_of_the_input(dtype):
    assert newton_schulz(torch.ones(4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_msign_is_the_polar_factor_to_ten_eps_times_condition(condition, dtype):
    matrix = with_condition(48, 24, condition).to(dtype)
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    error = (msign(matrix).double() - u @ vh).abs().max()
    assert error <= 10 * torch.finfo(dtype).eps * condition


def test_msign_of_a_rank_deficient_matrix_is_the_partial_isometry():
    matrix = gaussian(10, 3) @ gaussian(3, 8, seed=1)
    factor = msign(matrix)
    sigma = torch.linalg.svdvals(factor)
    torch.testing.assert_close(sigma, torch.tensor([1.0] * 3 + [0.0] * 5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(factor @ factor.mT @ matrix, matrix, rtol=0, atol=1e-12)
    assert torch.equal(msign(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_bad_arguments_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"coefficients='jordan'.*keller_jordan, polar_express"):
        newton_schulz(torch.ones(2, 2), coefficients="jordan")
    with pytest.raises(ValueError, match=r"ns_steps=0 is outside 1\.\.20"):
        newton_schulz(torch.ones(2, 2), ns_steps=0)
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        newton_schulz(torch.ones(3))
