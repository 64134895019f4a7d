"""Singular values and leading singular subspaces of many matrices: exactly by an SVD, or fast with an error bound.

All stacks here are (B, short, long), fp64, each matrix divided by its Frobenius norm.

Fast mode works on the Gram matrix X X^T, first in fp32, whose eigenvalues are the squared singular values with an
absolute error of about `rounding(n, eps) * sigma_1^2`: sigma_i is known to a relative error that grows with
(sigma_1 / sigma_i)^2. Every result is accepted matrix by matrix where its bound promises `ACCURACY`; what fp32 cannot
promise is computed again in fp64, and what a Gram matrix cannot promise at all by an SVD.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ACCURACY = 5e-4  # relative error that fast mode promises for every number it reports, half of what is documented
SMALL = 64  # short side up to which fp64 costs nothing worth saving
GUARD = 11  # vectors refined beside the k wanted: eigenvalue k has to be apart from k + GUARD + 1 only
ANGLE = 1e-4  # largest angle (radians) between a subspace accepted in fp32 and the true one

Check = Callable[[Tensor, float], Tensor]  # (eigenvalues (B, n), relative rounding error) -> accurate enough (B,)


class Subspaces(NamedTuple):
    """Leading k singular vectors of a stack: `short` (B, short, k), `long` (B, long, k), squared `values` (B, k).

    `angle` (B,) bounds the angle to the true subspaces, in radians; NaN vectors where no decomposition converged.
    """

    short: Tensor
    long: Tensor
    values: Tensor
    angle: Tensor


def rounding(n: int, dtype: torch.dtype) -> float:
    """Error of the Gram eigenvalues of an n x m matrix relative to the largest, with a factor of about 5 to spare."""
    return 2 * math.sqrt(n) * torch.finfo(dtype).eps


def gram(x: Tensor) -> Tensor:
    """X X^T (B, short, short)."""
    return x @ x.mT


def exact_values(x: Tensor) -> Tensor:
    """Singular values (B, short), descending, by an SVD; NaN for a matrix whose iteration does not converge."""
    return torch.stack([_svdvals(one) for one in x])


def fast_values(x: Tensor, accurate: Check) -> Tensor:
    """Squared singular values (B, short), descending, from Gram matrices where `accurate` lets them pass."""
    n = x.shape[-2]
    values = torch.full(x.shape[:-1], torch.nan, dtype=x.dtype, device=x.device)
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for dtype in (torch.float32, torch.float64) if n > SMALL and _is_long(x) else (torch.float64,):
        chosen = x if left.all() else x[left]  # without a copy of large matrices
        found = _eigenvalues(gram(chosen.to(dtype))).double().clamp(min=0)
        values[left] = found
        left[left.clone()] = ~accurate(found, rounding(n, dtype))
        if not left.any():
            return values
    values[left] = exact_values(x[left]).square()
    return values


def smallest_is_accurate(values: Tensor, error: float) -> Tensor:
    """Check for everything that a spectrum says: the error of the smallest singular value."""
    return values[:, -1] * 2 * ACCURACY > error * values[:, 0]  # False for NaN


def exact_subspaces(x: Tensor, k: int) -> tuple[Tensor, Subspaces]:
    """Squared singular values (B, short) and leading subspaces, by a full SVD of each matrix."""
    found = [_svd(one) for one in x]
    u, sigma, v = (torch.stack(part) for part in zip(*found, strict=True))
    values = sigma.square()
    return values, Subspaces(u[..., :k], v[..., :k], values[:, :k], torch.zeros_like(sigma[:, 0]))


def fast_subspaces(x: Tensor, k: int, accurate: Check) -> tuple[Tensor, Subspaces]:
    """Squared singular values (B, short), where `accurate` lets them pass, and leading subspaces.

    The Gram matrix is decomposed in fp32, its leading vectors refined in fp64; where the bounds do not hold, it is
    decomposed in fp64.
    """
    if x.shape[-2] <= max(SMALL, k + GUARD):
        return fp64_subspaces(x, k)
    values, vectors = _eigen(gram(x.float()))
    found = _refined(x, values, vectors, k)
    values = values.double().clamp(min=0)
    doubtful = ~(found.angle < ANGLE) | ~accurate(values, rounding(x.shape[-2], torch.float32))
    if doubtful.any():
        values[doubtful], better = fp64_subspaces(x[doubtful], k)
        replace_rows(found, doubtful, better)
    return values, found


def fp64_subspaces(x: Tensor, k: int) -> tuple[Tensor, Subspaces]:
    """Squared singular values (B, short) and leading subspaces, from the Gram matrices in fp64."""
    values, vectors = _eigen(gram(x))
    short = vectors[..., :k].contiguous()
    following = values[:, k] if k < values.shape[-1] else torch.zeros_like(values[:, 0])
    angle = rounding(x.shape[-2], x.dtype) * values[:, 0] / (values[:, k - 1] - following).clamp(min=0)
    return values, Subspaces(short, _other_side(x, short), values[:, :k].clone(), angle)


def replace_rows(target: Subspaces, where: Tensor, source: Subspaces) -> None:
    """Write the subspaces `source` of the matrices `where` (B,) into `target`."""
    for old, new in zip(target, source, strict=True):
        old[where] = new


def _other_side(x: Tensor, short: Tensor) -> Tensor:
    """Singular vectors (B, long, k) that belong to (B, short, k): X^T u / sigma."""
    image = x.mT @ short
    return image / torch.linalg.vector_norm(image, dim=-2, keepdim=True)


def _is_long(x: Tensor) -> bool:
    """Whether fp32 has a chance at a whole spectrum: a nearly square matrix has small singular values."""
    return x.shape[-1] >= 1.5 * x.shape[-2]


def _refined(x: Tensor, values: Tensor, vectors: Tensor, k: int) -> Subspaces:
    """Leading subspaces in fp64 from a decomposition in fp32: Rayleigh-Ritz, one correction, Rayleigh-Ritz.

    values (B, short), vectors (B, short, short): all eigenpairs of X X^T, fp32. With them the correction
    (theta - X X^T)^-1 residual costs next to nothing (Ogita & Aishima, 2018, refine all eigenvectors like this).
    """
    block = k + GUARD
    basis = torch.linalg.qr(vectors[..., :block].double()).Q
    ritz, basis, _, residual = _rayleigh_ritz(x, basis)
    outside = vectors[..., block:]  # (B, short, short - block)
    steps = (outside.mT @ residual.float()) / (ritz.float()[:, None, :] - values[:, block:, None])
    basis = torch.linalg.qr(basis + (outside @ steps).double()).Q
    ritz, basis, image, residual = _rayleigh_ritz(x, basis)
    long = image[:, :k] / torch.linalg.vector_norm(image[:, :k], dim=-1, keepdim=True)
    angle = _angle(ritz, residual, values[:, block].double(), k)
    return Subspaces(basis[..., :k].contiguous(), long.mT.contiguous(), ritz[:, :k].clone(), angle)


def _rayleigh_ritz(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ritz values (B, b) and vectors (B, short, b), their images q^T X (B, b, long), residuals (B, short, b)."""
    image = basis.mT @ x
    values, rotation = _eigen(gram(image))
    basis, image = basis @ rotation, rotation.mT @ image
    residual = (image @ x.mT).mT - basis * values[:, None, :]  # X X^T q - theta q
    return values, basis, image, residual


def _angle(values: Tensor, residual: Tensor, outside: Tensor, k: int) -> Tensor:
    """Bound (B,) of the angle between the span of the first k Ritz vectors and the true subspace.

    Their residuals couple them to the outside of the block, across the gap to the largest eigenvalue there (Davis &
    Kahan, 1970), and only in second order, through the outside, to the other Ritz vectors.
    """
    norms = torch.linalg.vector_norm(residual, dim=-2)
    wanted, rest = norms[:, :k].square().sum(-1).sqrt(), norms[:, k:].square().sum(-1).sqrt()
    outer, inner = values[:, k - 1] - outside, values[:, k - 1] - values[:, k]
    angle = wanted / outer * (1 + rest / inner)
    return torch.where((outer > 0) & (inner > 0), angle, torch.inf)


def _eigenvalues(grams: Tensor) -> Tensor:
    """Eigenvalues (B, n), descending; NaN for a matrix whose iteration does not converge."""
    try:
        return torch.linalg.eigvalsh(grams).flip(-1)
    except torch.linalg.LinAlgError:
        if len(grams) == 1:
            return grams.new_full(grams.shape[:-1], torch.nan)
        return torch.cat([_eigenvalues(one[None]) for one in grams])


def _eigen(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, n) and eigenvectors (B, n, n), descending; NaN where the iteration does not converge."""
    try:
        values, vectors = torch.linalg.eigh(grams)
    except torch.linalg.LinAlgError:
        if len(grams) == 1:
            return grams.new_full(grams.shape[:-1], torch.nan), torch.full_like(grams, torch.nan)
        pairs = [_eigen(one[None]) for one in grams]
        return torch.cat([values for values, _ in pairs]), torch.cat([vectors for _, vectors in pairs])
    return values.flip(-1), vectors.flip(-1)


def _svdvals(x: Tensor) -> Tensor:
    """Singular values (short,) of one (short, long), accurate to eps sigma_1; by way of R of QR when it is long."""
    try:
        return torch.linalg.svdvals(torch.linalg.qr(x.mT, mode="r").R if _is_long(x) else x)
    except torch.linalg.LinAlgError:
        return x.new_full(x.shape[:1], torch.nan)


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (short, short), sigma (short,), V (long, short) of one matrix; NaN where the iteration does not converge."""
    try:
        u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
        return u, sigma, vh.mT
    except torch.linalg.LinAlgError:
        short, long = x.shape
        nan = lambda *shape: x.new_full(shape, torch.nan)
        return nan(short, short), nan(short), nan(long, short)
