"""The exponent of the power-law tail of a spectrum (Clauset, Shalizi & Newman, 2009), the `alpha` of WeightWatcher."""

from collections.abc import Sequence

import numpy as np

FEWEST = 10  # eigenvalues below which a fit says nothing


def power_law_exponent(singular_values: Sequence[float]) -> tuple[float | None, str | None]:
    """alpha of density ~ lambda^-alpha for the largest eigenvalues lambda = sigma^2, or None and the reason.

    Every eigenvalue is tried as the beginning of the tail, with the exponent of most likelihood, alpha = 1 + n /
    sum log(lambda / lambda_min); the fit of the smallest Kolmogorov-Smirnov distance is kept. It gives what the
    `powerlaw` package does (which takes 0.3 s a matrix, and passes over exponents above 3 unless told otherwise).
    """
    eigenvalues = np.square(np.asarray(singular_values, dtype=float))
    eigenvalues = np.sort(eigenvalues[eigenvalues > eigenvalues.max(initial=0) * 1e-12])
    if len(eigenvalues) < FEWEST or eigenvalues[-1] < eigenvalues[0] * (1 + 1e-6):
        return None, f"fewer than {FEWEST} different eigenvalues to fit"
    logs = np.log(eigenvalues)
    fits = [_fit(logs[start:] - logs[start]) for start in range(len(logs) - 1)]
    return min(fits)[1], None


def _fit(tail: np.ndarray) -> tuple[float, float]:
    """(Kolmogorov-Smirnov distance, exponent) for log(lambda / lambda_min), ascending from 0."""
    total = tail.sum()
    if total <= 0:  # the largest eigenvalues are equal
        return np.inf, np.inf
    alpha = 1 + len(tail) / total
    below = np.arange(len(tail)) / len(tail)  # share of the tail below each value
    return float(np.abs(1 - np.exp((1 - alpha) * tail) - below).max()), float(alpha)
