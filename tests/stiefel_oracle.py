"""The optimum of the Stiefel sub-problem, by a long dual ascent in float64 that shares nothing with the solver."""

import torch

from blueberry.manifolds import Stiefel


def reference_optimum(point: torch.Tensor, gradient: torch.Tensor, steps: int = 600) -> float:
    """Dual ascent in the full space, by SVD: L <- L - step (W^T A + A^T W), A = msign(G + 2 W L), a decaying step.

    Returns the least dual value, the nuclear norm of G + 2 W L: no tangent vector of unit norm exceeds it.
    """
    inner = point.T @ gradient
    dual, best = -(inner + inner.T) / 4, torch.inf
    for step in range(steps):
        u, sigma, vh = torch.linalg.svd(gradient + 2 * point @ dual, full_matrices=False)
        best = min(best, sigma.sum().item())
        violation = point.T @ (u @ vh)
        dual = dual - 0.15 * sigma.mean() * (1 - step / steps) * (violation + violation.T)
    return best


def share_of_optimum(point: torch.Tensor, gradient: torch.Tensor, direction: torch.Tensor, optimum: float) -> float:
    """<G, A> of the direction made exactly feasible (tangent, then scaled to unit spectral norm) over the optimum."""
    tangent = Stiefel().projection(point, direction.double())
    return ((gradient * tangent).sum() / torch.linalg.matrix_norm(tangent, 2)).item() / optimum
