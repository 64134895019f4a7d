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
POLAR_EXPRESS: tuple[Quintic, ...] = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS)

COEFFICIENTS: dict[str, tuple[Quintic, ...]] = {"keller_jordan": KELLER_JORDAN, "polar_express": POLAR_EXPRESS}


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
    coefficients: str = "polar_express",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate polar factor of each matrix in a stack, by Newton-Schulz iteration.

    Works for any aspect ratio and scale (norms of 1e-20 and 1e20 give the same result), maps zero to zero and never
    writes into its input.

    Args:
        matrix: (..., out, in), any real floating dtype.
        ns_steps: number of steps; None takes the number that the coefficient set is made for.
        coefficients: `keller_jordan` or `polar_express`.
        dtype: of the products; None takes float64 for float64 input, else the device's fastest.

    Returns: same shape and dtype as `matrix`.
    """
    if matrix.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix or a stack of matrices, got shape {tuple(matrix.shape)}")
    steps = coefficient_steps(coefficients, ns_steps)
    if dtype is None:
        dtype = torch.float64 if matrix.dtype == torch.float64 else fastest_dtype(matrix.device)
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    stack = wide.reshape(-1, *wide.shape[-2:])  # (batch, short, long)
    factor = _iterate(_normalize(stack).to(dtype), steps).reshape(wide.shape)
    return (factor.mT if wide is not matrix else factor).to(matrix.dtype)


def _normalize(stack: Tensor) -> Tensor:
    """Divide each matrix by its Frobenius norm, an upper bound of its largest singular value.

    The division by the largest entry first keeps the squares inside the range of the dtype.
    """
    tiny = torch.finfo(stack.dtype).tiny
    stack = stack / stack.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    return stack / torch.linalg.matrix_norm(stack.float() if stack.itemsize < 4 else stack, keepdim=True).clamp_min(
        tiny
    )


def _iterate(x: Tensor, steps: tuple[Quintic, ...]) -> Tensor:
    """x: (batch, short, long), singular values in [0, 1]."""
    for a, b, c in steps:
        gram = x @ x.mT  # (batch, short, short)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


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
