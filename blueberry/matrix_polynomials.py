"""Polynomials of symmetric matrices with as few products as their degree allows, fit for half precision."""

from functools import cache
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from .scratch import Scratch, place
from .symmetric_products import symmetric_product

Step = tuple[float, ...]  # coefficients of x, x^3, x^5 (to x^9, to x^17) of an odd polynomial x P(x^2)

# In powers of G polynomials of degree 4 and 8 have terms hundreds and thousands of times their value: half precision
# could not hold them. In powers of y = 2 (G - center), with eigenvalues about [-1, 1], they are of their own size. For
# degree 8 the factors of `_octic` must be small too: rounding errors were smallest with a center from 0.35 to 0.4.
_QUARTIC_CENTER, _OCTIC_CENTER = 0.55, 0.37


def polynomial(gram: Tensor, step: Step, scratch: Scratch | None = None) -> Tensor:
    """P(G) of symmetric G (batch, short, short), in exact arithmetic symmetric too: of degree 2, 4 or 8 with one, two
    or three products. With scratch memory the result is valid until the next call."""
    if len(step) == 3:
        a, b, c = step
        out = place(scratch, "square", gram.shape, gram)
        return _add_to_diagonal(symmetric_product(gram, gram, scratch, out, gram, beta=b, alpha=c), a)
    return _quartic(gram, step, scratch) if len(step) == 5 else _octic(gram, step, scratch)


def _quartic(gram: Tensor, step: Step, scratch: Scratch | None) -> Tensor:
    """e y^2 (y^2 + d/e y + c/e) + b y + a."""
    a, b, c, d, e = _in_powers(step, _QUARTIC_CENTER)
    y_place, square, mixed, _ = _places(gram, scratch)
    y = _centered(gram, _QUARTIC_CENTER, out=y_place)
    square = symmetric_product(y, y, scratch, square)
    mixed = _add_to_diagonal(torch.add(square, y, alpha=d / e, out=mixed), c / e)
    return _add_to_diagonal(symmetric_product(square, mixed, scratch, y_place, y, beta=b, alpha=e), a)


def _octic(gram: Tensor, step: Step, scratch: Scratch | None) -> Tensor:
    """See `_OcticFactors`."""
    factors = _octic_factors(step)
    y_place, square, mixed, first = _places(gram, scratch)
    y = _centered(gram, _OCTIC_CENTER, out=y_place)
    square = symmetric_product(y, y, scratch, square)
    cubic = torch.add(square, y, alpha=factors.cubic, out=mixed)
    first = symmetric_product(square, cubic, scratch, first, y, beta=factors.linear)
    first = _add_to_diagonal(first, factors.constant)
    more = torch.add(square, y, alpha=factors.more_linear / factors.more_square, out=mixed)
    second = torch.add(first, more, alpha=factors.more_square, out=mixed)
    second = _add_to_diagonal(second, factors.more_constant)
    rest, leading = factors.rest_linear, factors.leading
    product = symmetric_product(first, second, scratch, y_place, y, beta=rest, alpha=leading)
    return _add_to_diagonal(product, factors.rest_constant)


class _OcticFactors(NamedTuple):
    """leading A B + rest_linear y + rest_constant, of A = y^4 + cubic y^3 + linear y + constant and
    B = A + more_square y^2 + more_linear y + more_constant, where y^4 + cubic y^3 = y^2 (y^2 + cubic y)."""

    leading: float
    cubic: float
    linear: float
    constant: float
    more_square: float
    more_linear: float
    more_constant: float
    rest_linear: float
    rest_constant: float


@cache
def _octic_factors(step: Step) -> _OcticFactors:
    """A polynomial of degree 8 in this form, by comparison of coefficients from the highest down. (The idea of sharing
    products: Sastre, "Efficient evaluation of matrix polynomials", Linear Algebra and its Applications 539, 2018.)"""
    *rest, leading = _in_powers(step, _OCTIC_CENTER)
    p0, p1, p2, p3, p4, p5, p6, p7 = (coefficient / leading for coefficient in rest)
    cubic = p7 / 2
    square = p6 - cubic**2
    linears = p5 - cubic * square  # of A and B together
    constants = p4 - cubic * linears
    linear = (p3 - cubic * constants) / square
    constant = (p2 - linear * (linears - linear)) / square
    linear_b, constant_b = linears - linear, constants - constant
    rest_linear = leading * (p1 - linear * constant_b - constant * linear_b)
    rest_constant = leading * (p0 - constant * constant_b)
    more = square, linear_b - linear, constant_b - constant
    return _OcticFactors(leading, cubic, linear, constant, *more, rest_linear, rest_constant)


@cache
def _in_powers(step: Step, center: float) -> Step:
    """Coefficients of the same polynomial of G in powers of y = 2 (G - center)."""
    powers = range(len(step))
    return tuple(sum(step[n] * comb(n, k) * center ** (n - k) for n in powers if n >= k) / 2**k for k in powers)


def _centered(gram: Tensor, center: float, out: Tensor | None) -> Tensor:
    return _add_to_diagonal(torch.mul(gram, 2, out=out), -2 * center)


def _places(gram: Tensor, scratch: Scratch | None) -> list[Tensor | None]:
    return [place(scratch, name, gram.shape, gram) for name in ("centered", "square", "mixed", "first")]


def _add_to_diagonal(stack: Tensor, value: float) -> Tensor:
    """In place."""
    stack.diagonal(dim1=-2, dim2=-1).add_(value)
    return stack
