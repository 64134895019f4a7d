"""The polar factor of a matrix: exactly (`msign`) and by a matrix-multiplication-only iteration (`newton_schulz`).

For M = U S V^T the polar factor is U V^T: all singular values become 1. An odd polynomial acts on the singular values
alone, p(M) = U p(S) V^T, so a few steps of X <- (a + b X X^T + c (X X^T)^2 + ...) X drive them towards 1 without a
decomposition.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .matrix_polynomials import Step, polynomial
from .scratch import Scratch, place
from .symmetric_products import symmetric_product

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

# The default: three steps in place of five, of degrees that need few products (9 needs two with the Gram matrix, 17
# three, beside the two with the stack that every step needs). The first two have the largest slope at 0 of all odd
# polynomials that map [0, g] into [0, 1] and, right of their first maximum, into [0.2, 1]: a minimax step would map
# some strong directions to almost nothing, where rounding errors of half precision drown them. The last is the minimax
# polynomial on what they make of [0.0016, 1], [0.0789, 1.05], and ends in [0.839, 1.161]. The guards g = 1.01, 1.05
# and 1.05 hold the rounding errors of the steps before; the degree of 17 stands last because its own are the largest.
# All that five steps of `keller_jordan` lift from the Frobenius norm (to 0.65 from 0.0014 of it) ends above 0.73 from
# the bound of `_gram_bound`. Linear programs find the coefficients (tests/test_polar.py).
ROBUST: tuple[Step, ...] = (
    (7.16140762, -63.2268408, 201.065376, -250.233807, 105.946782),
    (6.88859284, -56.2727004, 165.576125, -190.664814, 74.6924125),
    (12.05028566, -241.2021054, 2387.135756, -12016.32714, 33713.82955, -55011.25449, 51855.24458, -26168.40161,
     5470.017039),
)  # fmt: skip


# Converges to 1 from all that a set ends in, up to 1.5 at least; what steps beyond the three of `robust` are, because
# its last one is bounded on its own interval only. Source: the Taylor series of (1 - r)^(-1/2) to the second order.
_CONVERGENT: Step = (15 / 8, -10 / 8, 3 / 8)


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
    """The coefficients of each step. `ns_steps=None` takes the set's own number; more steps repeat the last one, with
    `robust` they are convergent ones.

    Raises ValueError on an unknown set or `ns_steps` outside 1..20.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients={coefficients!r} is unknown: use one of {', '.join(sorted(COEFFICIENTS))}")
    table = COEFFICIENTS[coefficients]
    if ns_steps is None:
        return table
    if not 1 <= ns_steps <= 20:
        raise ValueError(f"ns_steps={ns_steps} is outside 1..20: {coefficients} is made for {len(table)}")
    further = _CONVERGENT if coefficients == "robust" else table[-1]
    return table[:ns_steps] + (further,) * max(0, ns_steps - len(table))


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
    scratch: Scratch | None = None,
) -> Tensor:
    """Approximate polar factor of each matrix in a stack, by Newton-Schulz iteration.

    Works for any aspect ratio and scale (norms of 1e-20 and 1e20 give the same result), maps zero to zero and never
    writes into its input. Singular values of the result lie in [0.65, 1.25], except of directions that are a thousand
    times weaker than the matrix' Frobenius norm.

    Args:
        matrix: (..., out, in), any real floating dtype.
        ns_steps: number of steps; None takes the number that the coefficient set is made for.
        coefficients: `robust` (three steps), `keller_jordan` or `polar_express` (five steps).
        dtype: of the products; None takes float64 for float64 input, else the device's fastest.
        scratch: memory for the products, outside autograd; the result is then valid until it is used again.

    Returns: same shape and dtype as `matrix`.
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix or a stack of matrices, got shape {tuple(matrix.shape)}")
    steps = coefficient_steps(coefficients, ns_steps)
    if dtype is None:
        dtype = torch.float64 if matrix.dtype == torch.float64 else fastest_dtype(matrix.device)
    stack, gram = _with_gram(matrix.reshape(-1, *matrix.shape[-2:]), dtype, scratch)
    bound = _gram_bound(gram) if coefficients == "robust" else _frobenius_norm(gram)  # as published
    scale = torch.where(bound > 0, 1 / bound, 0.0).to(gram.dtype)
    gram = torch.mul(gram, scale, out=place(scratch, "scaled", gram.shape, gram)).mul_(scale)  # in float16's range
    if _can_compose(stack):
        result = _apply(_compose(gram, steps).mul_(scale), stack)
    else:
        result = _iterate(stack, gram, scale, steps, scratch)
    return result.reshape(matrix.shape).to(matrix.dtype)


def _with_gram(stack: Tensor, dtype: torch.dtype, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
    """The stack in `dtype` and its Gram matrices, scaled where fourth powers of its norm would leave the range.

    The CPU looks at the Gram matrix first, which saves a pass over memory; for other devices a look would be a stall.
    """
    if stack.device.type == "cpu" and dtype != torch.float16:
        narrow = stack.to(dtype)
        gram = _gram(narrow, scratch)
        energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_wide(dtype))  # norm_F^2 of each matrix
        if bool(((energy > 1e-15) & (energy < 1e15)).all()):
            return narrow, gram
    largest = stack.abs().amax(dim=(-2, -1), keepdim=True)
    power = largest.clamp_min(torch.finfo(stack.dtype).tiny).log2().floor().exp2()  # of two: rounds nothing
    scaled = (stack / power).to(dtype)
    return scaled, _gram(scaled, scratch)


def _is_tall(stack: Tensor) -> bool:
    return stack.shape[-2] > stack.shape[-1]


def _gram(stack: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Products of each matrix with itself, over its long side: (batch, out, in) -> (batch, short, short)."""
    short = min(stack.shape[-2:])
    out = place(scratch, "gram", (len(stack), short, short), stack)
    left, right = (stack.mT, stack) if _is_tall(stack) else (stack, stack.mT)
    return symmetric_product(left, right, scratch, out)


def _apply(product: Tensor, stack: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply a stack (batch, out, in) on its short side by symmetric matrices (batch, short, short)."""
    return torch.bmm(stack, product, out=out) if _is_tall(stack) else torch.bmm(product, stack, out=out)


def _frobenius_norm(gram: Tensor) -> Tensor:
    """norm_F(X) from X X^T: (batch, short, short) -> (batch, 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_wide(gram.dtype)).clamp_min(0).sqrt()[:, None, None]


def _gram_bound(gram: Tensor) -> Tensor:
    """(sum sigma^4)^(1/4) = norm_F(X X^T)^(1/2), from sigma_1 to norm_F(X): (batch, short, short) -> (batch, 1, 1)."""
    return torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=_wide(gram.dtype)).sqrt()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _iterate(stack: Tensor, gram: Tensor, scale: Tensor, steps: Sequence[Step], scratch: Scratch | None) -> Tensor:
    """The steps on scale * stack, with `gram` its Gram matrices and `scale` (batch, 1, 1), one after the other."""
    for number, step in enumerate(steps):
        product = polynomial(_gram(stack, scratch) if number else gram, step, scratch)
        if number == 0:
            product = product.mul_(scale)
        stack = _apply(product, stack, out=place(scratch, f"stack {number % 2}", stack.shape, stack))
    return stack


def _can_compose(stack: Tensor) -> bool:
    """Whether to compose all steps in Gram matrices before the stack is touched: in single precision, which takes
    fewer operations from an aspect ratio of two on.

    Not in half precision: the Gram matrix of a composed step holds the rounding errors of the one before, multiplied
    by the square of its largest slope, so that a strong direction can leave the interval on which the next polynomial
    is bounded; a later step then throws it far away.
    """
    short, long = sorted(stack.shape[-2:])
    return long >= 2 * short and _wide(stack.dtype) == stack.dtype


def _compose(gram: Tensor, steps: Sequence[Step]) -> Tensor:
    """The product P_n ... P_1 of the polynomials that the steps multiply the stack with, G <- P G P in between."""
    product = None
    for number, step in enumerate(steps):
        factor = polynomial(gram, step)
        product = factor if product is None else factor @ product
        if number + 1 < len(steps):
            gram = factor @ gram @ factor
    return product


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
