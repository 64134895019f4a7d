"""Three quarters of a symmetric product against the whole one, and the polar factor that is made of them."""

import pytest
import torch

from blueberry.polar import newton_schulz
from blueberry.scratch import Scratch
from blueberry.symmetric_products import MIN_COLUMNS, MIN_ROWS, symmetric_product


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("rows", [4, MIN_ROWS, MIN_ROWS + 1])
@pytest.mark.parametrize("columns", [3, MIN_COLUMNS])
@pytest.mark.parametrize("is_tall", [False, True])
def test_it_is_the_product_of_a_matrix_with_itself(rows, columns, is_tall):
    stack = random(2, columns, rows).mT if is_tall else random(2, rows, columns)
    out = torch.full((2, rows, rows), torch.nan, dtype=torch.float64)
    found = symmetric_product(stack, stack.mT, Scratch(), out)
    assert found is out
    torch.testing.assert_close(found, stack @ stack.mT, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", [4, MIN_COLUMNS + 1])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_addend_is_added_also_where_the_result_is_written_over_it(rows, in_place):
    addend = random(2, rows, rows)
    addend = addend + addend.mT
    power = addend @ addend / rows
    expected = 0.5 * addend - 2 * addend @ power
    out = addend if in_place else torch.empty_like(addend)
    found = symmetric_product(addend.clone(), power, Scratch(), out, addend, beta=0.5, alpha=-2.0)
    assert found is out
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)  # entries of some thousands


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, MIN_COLUMNS, MIN_COLUMNS), (1, MIN_ROWS + 1, 600), (1, 600, MIN_ROWS), (1, 513, 513)], ids=str
)
def test_large_matrices_get_the_same_polar_factor_as_from_whole_products(shape, dtype):
    matrix = random(*shape).to(dtype)
    expected = newton_schulz(matrix, dtype=dtype)
    error = (newton_schulz(matrix, dtype=dtype, scratch=Scratch()) - expected).norm() / expected.norm()
    assert error < 200 * torch.finfo(dtype).eps  # the polynomials multiply rounding by up to their slope of 12 a step


SPECTRA = {
    "flat": lambda x: torch.ones_like(x),
    "condition 1e4": lambda x: 10 ** (-4 * x),
    "one dominant": lambda x: torch.where(x == 0, 100.0, 1.0),
    "rank deficient": lambda x: torch.where(x < 0.5, 1.0, 0.0),
    "two levels": lambda x: torch.where(x < 0.1, 1.0, 0.02),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_large_matrices_in_half_precision_stay_in_bounds_where_five_published_steps_lift_them(name):
    rows = MIN_COLUMNS
    u, v = (torch.linalg.qr(random(rows, rows + shift)).Q for shift in (0, 1))
    matrix = u * SPECTRA[name](torch.arange(rows) / rows).double() @ v[:, :rows].T
    found, published = (
        torch.linalg.svdvals(newton_schulz(matrix, None, coefficients, torch.bfloat16, Scratch()))
        for coefficients in ("robust", "keller_jordan")
    )
    assert found.max() <= 1.25
    assert (found[published >= 0.65] >= 0.65).all()
