"""The k largest eigenvectors of many symmetric matrices without a full decomposition, where that is possible."""

import math

import torch
from torch import Tensor

GUARD = 11  # vectors beside the k wanted: the filter has to separate eigenvalue k from k + GUARD + 1 only
ACCURACY = 1e-6  # largest angle (radians, in Frobenius norm) between the subspace returned and the true one
MAX_DEGREE = 40  # beyond it, a full decomposition is cheaper


def eigen(grams: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues (B, n) and the k leading eigenvectors (B, n, k) of symmetric (B, n, n), both descending.

    NaN for a matrix whose decomposition does not converge.
    """
    try:
        values, vectors = torch.linalg.eigh(grams)
    except torch.linalg.LinAlgError:
        if len(grams) == 1:
            return grams.new_full(grams.shape[:-1], torch.nan), grams.new_full((*grams.shape[:-1], k), torch.nan)
        pairs = [eigen(one[None], k) for one in grams]
        return torch.cat([values for values, _ in pairs]), torch.cat([vectors for _, vectors in pairs])
    return values.flip(-1), vectors[..., -k:].flip(-1)


def leading_eigen(grams: Tensor, k: int, estimate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k leading eigenvalues (B, k) and eigenvectors (B, n, k) of symmetric positive semi-definite (B, n, n).

    estimate: (B, n) eigenvalues of similar matrices, descending; they choose the filter (none: decompose fully).
    A random block is filtered by a Chebyshev polynomial that is at most 1 on the unwanted eigenvalues (Zhou et al.,
    2006, Self-consistent-field calculations using Chebyshev-filtered subspace iteration), then Rayleigh-Ritz. The
    result counts where its residual over the gap to the next eigenvalue bounds the error by `ACCURACY` (Davis and
    Kahan); where it does not, or the filter would need a high degree, the matrix is decomposed fully.
    """
    block = k + GUARD
    if estimate is None or grams.shape[-1] < 4 * block:
        values, vectors = eigen(grams, k)
        return values[:, :k], vectors
    values, vectors = grams.new_empty(len(grams), k), grams.new_empty(*grams.shape[:-1], k)
    cutoff = estimate[:, block]
    degree = _degree(estimate[:, k - 1], cutoff)  # (B,)
    done = degree <= MAX_DEGREE
    if done.any():
        values[done], vectors[done], error = _filtered(grams[done], k, cutoff[done], int(degree[done].max()))
        done[done.clone()] = error < ACCURACY
    if not done.all():
        all_values, vectors[~done] = eigen(grams[~done], k)
        values[~done] = all_values[:, :k]
    return values, vectors


def _degree(wanted: Tensor, cutoff: Tensor) -> Tensor:
    """Degree (B,) at which eigenvalue `wanted` is amplified 1000 / ACCURACY times over those in [0, cutoff]."""
    growth = torch.acosh((2 * wanted / cutoff - 1).clamp(min=1))
    return torch.nan_to_num((math.log(1000 / ACCURACY) / growth).ceil(), nan=math.inf).clamp(min=4)


def _filtered(grams: Tensor, k: int, cutoff: Tensor, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values (B, k) and vectors (B, n, k) after one filter, and a bound of the angle error (B,)."""
    generator = torch.Generator(grams.device).manual_seed(0)
    start = torch.randn(grams.shape[-1], k + GUARD, generator=generator, dtype=grams.dtype, device=grams.device)
    basis = torch.linalg.qr(_chebyshev(grams, start.expand(len(grams), -1, -1), cutoff, degree)).Q
    image = grams @ basis  # (B, n, k + GUARD)
    values, rotation = torch.linalg.eigh(basis.mT @ image)
    values, rotation = values.flip(-1), rotation.flip(-1)[..., :k]
    basis = basis @ rotation
    residual = torch.linalg.matrix_norm(image @ rotation - basis * values[:, None, :k])
    gap = values[:, k - 1] - values[:, k] - residual
    return values[:, :k], basis, torch.where(gap > 0, residual / gap, torch.inf)


def _chebyshev(grams: Tensor, start: Tensor, cutoff: Tensor, degree: int) -> Tensor:
    """T_degree(2 G / cutoff - 1) applied to (B, n, b), rescaled on the way so that it does not overflow."""
    scale = (2 / cutoff)[:, None, None]
    previous, current = start, scale * (grams @ start) - start
    for _ in range(degree - 1):
        following = (grams @ current).mul_(2 * scale).sub_(current, alpha=2).sub_(previous)
        norm = following.abs().amax((-1, -2), keepdim=True)
        previous, current = current / norm, following / norm
    return current
