"""The polar factor of a matrix: exactly (`msign`) and by a matrix-multiplication-only iteration (`newton_schulz`).

For M = U S V^T the polar factor is U V^T: all singular values become 1. An odd polynomial acts on the singular values
alone, p(M) = U p(S) V^T, so a few steps of X <- (a + b X X^T + c (X X^T)^2 + ...) X drive them towards 1 without a
decomposition.
"""

from collections.abc import Sequence
from functools import cache
from math import comb

import torch
from torch import Tensor

Step = tuple[float, ...]  # coefficients of x, x^3, x^5 (and x^7, x^9) of an odd polynomial

# One (a, b, c) per step. Singular values of the result stay around 1 (0.7 to 1.2): these coefficients trade accuracy
# for a steep slope at 0. Source: K. Jordan et al., "Muon", https://kellerjordan.github.io/posts/muon/
KELLER_JORDAN: tuple[Step, ...] = ((3.4445, -4.7750, 2.0315),) * 5

# Each step is the odd quintic with the smallest largest deviation from 1 on the interval that the step before left,
# starting from [0.001, 1]. Source: Amsel, Persson, Musco, Gower, "The Polar Express", arXiv:2505.16932, which also
# gives the division by 1.01 that keeps rounding errors of half precision from leaving the interval.
_POLAR_EXPRESS: tuple[Step, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

# The default. Its first three steps, of degree 5, 9 and 5, have the largest slope at 0 of all odd polynomials that map
# [0, g] into [0, 1] and, right of their first maximum, into [0.2, 1]: a minimax step would map some strong directions
# to almost nothing, where rounding errors of half precision drown them. The last is the minimax polynomial of degree 9
# on what they leave, [0.138, 1.03], and ends in [0.827, 1.173]. The guards g = 1.01, 1.02, 1.12 and 1.03 hold the
# rounding errors of the steps before. From the bound of `_gram_bound` all that five steps of `keller_jordan` lift from
# the Frobenius norm (singular values above 0.00134 of it) ends up there, with fewer operations. Linear programs find
# the coefficients (tests/test_polar.py).
ROBUST: tuple[Step, ...] = (
    (4.017645, -10.71105, 7.590588),
    (7.0912, -61.38547, 191.401, -233.5584, 96.95718),
    (3.623054, -7.854925, 4.526809),
    (6.706049, -39.80929, 106.5143, -118.9437, 46.42371),
)


def _cushioned(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Evaluate every step at x / 1.01, so that rounding errors do not leave its interval."""
    return tuple(tuple(c / 1.01 ** (2 * i + 1) for i, c in enumerate(step)) for step in steps)


POLAR_EXPRESS = _cushioned(_POLAR_EXPRESS)

COEFFICIENTS: dict[str, tuple[Step, ...]] = {
    "keller_jordan": KELLER_JORDAN,
    "polar_express": POLAR_EXPRESS,
    "robust": ROBUST,
}


def coefficient_steps(coefficients: str, ns_steps: int | None = None) -> tuple[Step, ...]:
    """The coefficients of each step. `ns_steps=None` takes the set's own number; more steps repeat the last one.

    Raises ValueError on an unknown set or `ns_steps` outside 1..20.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients={coefficients!r} is unknown: use one of {', '.join(sorted(COEFFICIENTS))}")
    table = COEFFICIENTS[coefficients]
    if ns_steps is None:
        return table
    if not 1 <= ns_steps <= 20:
        raise ValueError(f"ns_steps={ns_steps} is outside 1..20: {coefficients} is made for {len(table)}")
    return table[:ns_steps] + (table[-1],) * max(0, ns_steps - len(table))


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32 (emulated bf16 is several times slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.float32


def newton_schulz(
    matrix: Tensor,  # (..., out, in)
    ns_steps: int | None = None,
    coefficients: str = "robust",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate polar factor of each matrix in a stack, by Newton-Schulz iteration.

    Works for any aspect ratio and scale (norms of 1e-20 and 1e20 give the same result), maps zero to zero and never
    writes into its input. Singular values of the result lie in [0.65, 1.25], except of directions that are a thousand
    times weaker than the matrix' Frobenius norm.

    Args:
        matrix: (..., out, in), any real floating dtype.
        ns_steps: number of steps; None takes the number that the coefficient set is made for.
        coefficients: `robust` (four steps), `keller_jordan` or `polar_express` (five steps).
        dtype: of the products; None takes float64 for float64 input, else the device's fastest.

    Returns: same shape and dtype as `matrix`.
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix or a stack of matrices, got shape {tuple(matrix.shape)}")
    steps = coefficient_steps(coefficients, ns_steps)
    if dtype is None:
        dtype = torch.float64 if matrix.dtype == torch.float64 else fastest_dtype(matrix.device)
    stack, gram = _with_gram(matrix.reshape(-1, *matrix.shape[-2:]), dtype)
    bound = _gram_bound(gram) if coefficients == "robust" else _frobenius_norm(gram)  # as published
    at_a_time = _steps_at_a_time(stack)
    return _iterate(stack, gram, bound, steps, at_a_time).reshape(matrix.shape).to(matrix.dtype)


def _with_gram(stack: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stack in `dtype` and its Gram matrices, scaled where fourth powers of its norm would leave the range.

    The CPU looks at the Gram matrix first, which saves a pass over memory; for other devices a look would be a stall.
    """
    if stack.device.type == "cpu" and dtype != torch.float16:
        narrow = stack.to(dtype)
        gram = _gram(narrow)
        energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_wide(dtype))  # norm_F^2 of each matrix
        if bool(((energy > 1e-15) & (energy < 1e15)).all()):
            return narrow, gram
    largest = stack.abs().amax(dim=(-2, -1), keepdim=True)
    power = largest.clamp_min(torch.finfo(stack.dtype).tiny).log2().floor().exp2()  # of two: rounds nothing
    scaled = (stack / power).to(dtype)
    return scaled, _gram(scaled)


def _is_tall(stack: Tensor) -> bool:
    return stack.shape[-2] > stack.shape[-1]


def _gram(stack: Tensor) -> Tensor:
    """Products of each matrix with itself, over its long side: (batch, out, in) -> (batch, short, short)."""
    return stack.mT @ stack if _is_tall(stack) else stack @ stack.mT


def _frobenius_norm(gram: Tensor) -> Tensor:
    """norm_F(X) from X X^T: (batch, short, short) -> (batch, 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_wide(gram.dtype)).clamp_min(0).sqrt()[:, None, None]


def _gram_bound(gram: Tensor) -> Tensor:
    """(sum sigma^4)^(1/4) = norm_F(X X^T)^(1/2), from sigma_1 to norm_F(X): (batch, short, short) -> (batch, 1, 1)."""
    return torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=_wide(gram.dtype)).sqrt()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _iterate(stack: Tensor, gram: Tensor, bound: Tensor, steps: Sequence[Step], at_a_time: int) -> Tensor:
    """The iteration from stack / bound: gram as from `_gram`, bound (batch, 1, 1) no less than sigma_1.

    `at_a_time` steps are composed in short x short matrices before the stack is touched.
    """
    scale = torch.where(bound > 0, 1 / bound, 0.0).to(gram.dtype)
    gram = (gram * scale).mul_(scale)  # in this order within the range of float16
    for start in range(0, len(steps), at_a_time):
        product = _compose(_gram(stack) if start else gram, steps[start : start + at_a_time])
        if start == 0:
            product *= scale
        stack = stack @ product.mT if _is_tall(stack) else product @ stack
    return stack


def _steps_at_a_time(stack: Tensor) -> int:
    """How many steps to compose: in single precision all, which takes fewer operations from an aspect ratio of two on.

    In half precision one: the Gram matrix of a composed step holds the rounding errors of the one before, multiplied
    by the square of its largest slope, so that a strong direction can leave the interval on which the next polynomial
    is bounded; a later step then throws it far away.
    """
    short, long = sorted(stack.shape[-2:])
    is_half = _wide(stack.dtype) != stack.dtype
    return 20 if long >= 2 * short and not is_half else 1


def _compose(gram: Tensor, steps: Sequence[Step]) -> Tensor:
    """The product P_n ... P_1 of the polynomials that the steps multiply the stack with, G <- P G P in between."""
    product = None
    for number, step in enumerate(steps):
        polynomial = _polynomial(gram, step)
        product = polynomial if product is None else polynomial @ product
        if number + 1 < len(steps):
            gram = polynomial @ gram @ polynomial
    return product


def _polynomial(gram: Tensor, step: Step) -> Tensor:
    """a + b G + c G^2, or + d G^3 + e G^4 with two products, of symmetric G (batch, short, short)."""
    if len(step) == 3:
        a, b, c = step
        return _add_to_diagonal(torch.baddbmm(gram, gram, gram, beta=b, alpha=c), a)
    a, b, c, d, e = _about_center(step)
    gram = _add_to_diagonal(gram.clone(), -_CENTER)
    square = gram @ gram
    quadratic = _add_to_diagonal(torch.add(square, gram, alpha=d / e), c / e)
    return _add_to_diagonal(torch.baddbmm(gram, square, quadratic, beta=b, alpha=e), a)


# In powers of G a polynomial of degree 4 has terms hundreds of times its value: half precision could not hold it. In
# powers of G - 0.55 (the middle of the interval) they are of its own size.
_CENTER = 0.55


@cache
def _about_center(step: Step) -> Step:
    """The same polynomial in powers of G - _CENTER."""
    powers = range(len(step))
    return tuple(sum(step[n] * comb(n, k) * _CENTER ** (n - k) for n in powers if n >= k) for k in powers)


def _add_to_diagonal(stack: Tensor, value: float) -> Tensor:
    """In place."""
    stack.diagonal(dim1=-2, dim2=-1).add_(value)
    return stack


def msign(matrix: Tensor) -> Tensor:
    """Exact polar factor U V^T of each matrix in a stack (..., out, in), through an SVD in float64.

    Singular values below eps * max(out, in) * sigma_max count as zero and stay zero (the partial isometry), so
    msign(0) = 0. Largest absolute error: about eps * condition number. Returns the dtype of `matrix`.
    """
    if matrix.ndim < 2:
        raise ValueError(f"msign needs a matrix or a stack of matrices, got shape {tuple(matrix.shape)}")
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    threshold = torch.finfo(torch.float64).eps * max(matrix.shape[-2:]) * sigma[..., :1]
    kept = (sigma > threshold).to(u.dtype)  # (..., short)
    return ((u * kept.unsqueeze(-2)) @ vh).to(matrix.dtype)
