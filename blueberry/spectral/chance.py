"""Chance levels: what random subspaces would score."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def alignment_by_chance(n: int, k: int, samples: int = 2000) -> float:
    """Mean cosine of the principal angles between two random k-dimensional subspaces of R^n.

    The squared cosines are the eigenvalues of (A + B)^-1 A for Wishart matrices A (k degrees of freedom) and
    B (n - k), Absil, Edelman & Koev 2006; sampled with a fixed seed, to about 1% of the value.
    """
    if k >= n:
        return 1.0
    rng = np.random.default_rng(0)
    a, b = _wishart(rng, samples, k, k), _wishart(rng, samples, k, n - k)
    cosines = np.sqrt(np.clip(np.linalg.eigvals(np.linalg.solve(a + b, a)).real, 0, 1))
    return float(cosines.mean())


def _wishart(rng: np.random.Generator, samples: int, k: int, degrees: int) -> np.ndarray:
    """Wishart matrices (samples, k, k): X X^T with X (k, degrees) Gaussian; few degrees directly, many by Bartlett."""
    if degrees < k:
        x = rng.standard_normal((samples, k, degrees))
    else:
        x = np.tril(rng.standard_normal((samples, k, k)), -1)
        x[:, range(k), range(k)] = np.sqrt(rng.chisquare(degrees - np.arange(k), (samples, k)))
    return x @ x.transpose(0, 2, 1)
