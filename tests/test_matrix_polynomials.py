"""Polynomials of symmetric matrices against their definition, and the memory that they work in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blueberry.matrix_polynomials import _octic_factors, polynomial
from blueberry.polar import COEFFICIENTS, newton_schulz
from blueberry.scratch import Scratch


def symmetric(seed: int, size: int = 12) -> torch.Tensor:
    """Two matrices with eigenvalues in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(2, size, size, generator=generator, dtype=torch.float64))[0]
    return (vectors * torch.rand(2, 1, size, generator=generator, dtype=torch.float64)) @ vectors.mT


def by_definition(gram: torch.Tensor, step: tuple[float, ...]) -> torch.Tensor:
    power, total = torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram), torch.zeros_like(gram)
    for coefficient in step:
        total, power = total + coefficient * power, power @ gram
    return total


@given(seed=st.integers(0, 100), degree=st.sampled_from([2, 4, 8]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_polynomial_of_a_matrix_is_the_sum_of_its_powers(seed, degree, data):
    coefficient = st.floats(-10, 10)
    leading = data.draw(st.floats(1, 10))
    step = (*data.draw(st.lists(coefficient, min_size=degree, max_size=degree)), leading)
    gram = symmetric(seed)
    found, expected = polynomial(gram, step), by_definition(gram, step)
    # The factors of degree 8 grow where a divisor of them nearly vanishes, and rounding errors with their square
    scale = max(1.0, factors_size(step))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * scale)


def factors_size(step: tuple[float, ...]) -> float:
    return max(map(abs, _octic_factors(step))) ** 2 if len(step) == 9 else 1e2


@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
def test_the_steps_of_every_set_are_evaluated_to_the_last_digits(coefficients):
    for step in COEFFICIENTS[coefficients]:
        gram = symmetric(0)
        largest = sum(map(abs, step))  # terms of up to 5e4 cancel to 12
        torch.testing.assert_close(polynomial(gram, step), by_definition(gram, step), rtol=0, atol=1e-14 * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 16, 24), (3, 64, 16), (2, 3, 8, 40)], ids=str)
def test_memory_that_is_used_again_changes_nothing(shape, dtype):
    scratch, generator = Scratch(), torch.Generator().manual_seed(0)
    for size in (slice(None), slice(1), slice(None)):
        matrices = torch.randn(shape, generator=generator).to(dtype)[size]
        kept = matrices.clone()
        found = newton_schulz(matrices, dtype=dtype, scratch=scratch)
        assert torch.equal(found, newton_schulz(matrices, dtype=dtype))
        assert torch.equal(matrices, kept)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (5, 2)], ids=str)
def test_newton_schulz_has_a_gradient(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(newton_schulz, matrix, atol=1e-4)
