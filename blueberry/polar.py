"""The polar factor of a matrix: exactly (`msign`) and by a matrix-multiplication-only iteration (`newton_schulz`).

For M = U S V^T the polar factor is U V^T: all singular values become 1. An odd polynomial acts on the singular values
alone, p(M) = U p(S) V^T, so a few steps of X <- a X + b (X X^T) X + c (X X^T)^2 X drive them towards 1 without a
decomposition.
"""

import torch
from torch import Tensor

Quintic = tuple[float, float, float]

# One (a, b, c) per step. Singular values of the result stay around 1 (0.7 to 1.2): these coefficients trade accuracy
# for a steep slope at 0. Source: K. Jordan et al., "Muon", https://kellerjordan.github.io/posts/muon/
KELLER_JORDAN: tuple[Quintic, ...] = ((3.4445, -4.7750, 2.0315),) * 5

# Each step is the odd quintic with the smallest largest deviation from 1 on the interval that the step before left,
# starting from [0.001, 1]. Source: Amsel, Persson, Musco, Gower, "The Polar Express", arXiv:2505.16932, which also
# gives the division by 1.01 that keeps rounding errors of half precision from leaving the interval.
_POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

# Four steps of the same kind from the shorter interval [0.005, 1], for matrices whose singular values are known to lie
# closer together (see `_SPREAD_OUT`); the result lies in [0.89, 1.09].
_FOUR_STEPS: tuple[Quintic, ...] = (
    (8.2987, -24.4305, 18.09031),
    (3.91522, -2.92113, 0.55922),
    (3.1746, -2.38043, 0.49783),
    (2.18946, -1.56722, 0.40789),
)


def _cushioned(steps: tuple[Quintic, ...]) -> tuple[Quintic, ...]:
    """Evaluate every step at x / 1.01, so that rounding errors do not leave its interval."""
    return tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in steps)


POLAR_EXPRESS = _cushioned(_POLAR_EXPRESS)
FOUR_STEPS = _cushioned(_FOUR_STEPS)

# `adaptive` is the default: Polar Express, but four steps for the matrices that need no more.
COEFFICIENTS: dict[str, tuple[Quintic, ...]] = {
    "adaptive": POLAR_EXPRESS,
    "keller_jordan": KELLER_JORDAN,
    "polar_express": POLAR_EXPRESS,
}


def coefficient_steps(coefficients: str, ns_steps: int | None = None) -> tuple[Quintic, ...]:
    """The (a, b, c) of each step. `ns_steps=None` takes the set's own number; more steps repeat the last one.

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
    coefficients: str = "adaptive",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate polar factor of each matrix in a stack, by Newton-Schulz iteration.

    Works for any aspect ratio and scale (norms of 1e-20 and 1e20 give the same result), maps zero to zero and never
    writes into its input. Singular values of the result lie in [0.65, 1.25], except of directions that are a thousand
    times weaker than the matrix' Frobenius norm.

    Args:
        matrix: (..., out, in), any real floating dtype.
        ns_steps: number of steps; None takes the number that the coefficient set is made for.
        coefficients: `adaptive` (on a CPU four or five steps, as each matrix needs; elsewhere five), `keller_jordan`
            or `polar_express`.
        dtype: of the products; None takes float64 for float64 input, else the device's fastest.

    Returns: same shape and dtype as `matrix`.
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix or a stack of matrices, got shape {tuple(matrix.shape)}")
    steps = coefficient_steps(coefficients, ns_steps)
    if dtype is None:
        dtype = torch.float64 if matrix.dtype == torch.float64 else fastest_dtype(matrix.device)
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    stack = _in_range(wide.reshape(-1, *wide.shape[-2:]), dtype)  # (batch, short, long)
    gram = stack @ stack.mT  # (batch, short, short)
    if coefficients != "adaptive" or ns_steps is not None:
        factor = _iterate(stack, gram, _frobenius_norm(gram), steps)
    else:
        factor = _iterate_adaptively(stack, gram, steps)
    factor = factor.reshape(wide.shape)
    return (factor.mT if wide is not matrix else factor).to(matrix.dtype)


def _in_range(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, scaled where the fourth powers of its norm would leave the range of the dtype.

    A look at the values costs a CPU one pass over memory that scaling without a look would also cost, and saves one
    more; other devices scale without a look, which would stall them.
    """
    if stack.device.type == "cpu" and dtype != torch.float16:
        largest = stack.abs().amax(dim=(-2, -1), keepdim=True)
        low, high = largest[largest > 0].aminmax() if bool((largest > 0).any()) else (1.0, 1.0)
        if low > 1e-5 and high < 1e5:
            return stack.to(dtype)
    else:
        largest = stack.abs().amax(dim=(-2, -1), keepdim=True)
    return (stack / largest.clamp_min(torch.finfo(stack.dtype).tiny)).to(dtype)


def _frobenius_norm(gram: Tensor) -> Tensor:
    """norm_F(X) from X X^T: (batch, short, short) -> (batch, 1, 1)."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=_wide(gram.dtype)).clamp_min(0).sqrt()[:, None, None]


def _gram_bound(gram: Tensor) -> Tensor:
    """(sum sigma^4)^(1/4) = norm_F(X X^T)^(1/2), from sigma_1 to norm_F(X): (batch, short, short) -> (batch, 1, 1)."""
    return torch.linalg.matrix_norm(gram.to(_wide(gram.dtype)), keepdim=True).sqrt()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# norm_F(X) over the tighter bound. From here on, four steps from the tighter bound bring to at least 0.65 all that
# five steps of `keller_jordan` from norm_F(X) do: singular values above 0.0014 norm_F(X). A Gaussian matrix with 100
# rows has 3; effectively it asks for energy in some fifty directions.
_SPREAD_OUT = 2.6


def _iterate_adaptively(stack: Tensor, gram: Tensor, steps: tuple[Quintic, ...]) -> Tensor:
    """Four steps for matrices whose energy is spread over several directions, `steps` for the others."""
    bound = _gram_bound(gram)
    if stack.device.type != "cpu":
        return _iterate(stack, gram, bound, steps)
    easy = (_frobenius_norm(gram) >= _SPREAD_OUT * bound).flatten()
    if easy.all():
        return _iterate(stack, gram, bound, FOUR_STEPS)
    factor = torch.empty_like(stack)
    for chosen, chosen_steps in ((easy, FOUR_STEPS), (~easy, steps)):
        if chosen.any():
            factor[chosen] = _iterate(stack[chosen], gram[chosen], bound[chosen], chosen_steps)
    return factor


def _iterate(x: Tensor, gram: Tensor, bound: Tensor, steps: tuple[Quintic, ...]) -> Tensor:
    """The iteration from x / bound: x (batch, short, long), gram = x x^T, bound (batch, 1, 1) no less than sigma_1."""
    scale = torch.where(bound > 0, 1 / bound, 0.0)
    gram = (gram * scale.square()).to(x.dtype)
    if x.shape[-1] < 2 * x.shape[-2]:
        return _iterate_plain(x, gram, scale, steps)
    if _wide(x.dtype) == x.dtype:
        return _iterate_gram(x, gram, scale, steps)
    # In half precision the Gram form loses the weak directions within three steps: go back to x after two.
    if len(steps) > 4:
        return _iterate_plain(x, gram, scale, steps)
    x = _iterate_gram(x, gram, scale, steps[:2])
    return _iterate_gram(x, x @ x.mT, torch.ones_like(scale), steps[2:])


def _iterate_plain(x: Tensor, gram: Tensor, scale: Tensor, steps: tuple[Quintic, ...]) -> Tensor:
    """x <- (a + b G + c G^2) x with G = x x^T, every step."""
    x = (x * scale).to(x.dtype)
    for number, (a, b, c) in enumerate(steps):
        gram = x @ x.mT if number else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Tensor, gram: Tensor, scale: Tensor, steps: tuple[Quintic, ...]) -> Tensor:
    """The same in short x short matrices: G <- P G P for each polynomial P, and x multiplied by all P at the end.

    About 50 short^3 operations instead of 90 for an aspect ratio of 4 and five steps.
    """
    product = None
    for number, (a, b, c) in enumerate(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if number + 1 < len(steps):
            gram = polynomial @ gram @ polynomial
    return (product * scale).to(x.dtype) @ x


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
