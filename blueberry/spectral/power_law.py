"""The exponent of the power-law tail of a spectrum, by the `powerlaw` package (Alstott, Bullmore & Plenz, 2014)."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from blueberry.errors import UsageError

FEWEST = 10  # eigenvalues below which a fit says nothing


def require_powerlaw() -> None:
    """UsageError when the optional package is missing."""
    if find_spec("powerlaw") is None:
        raise UsageError("power_law_exponent needs the powerlaw package: pip install powerlaw")


def power_law_exponent(singular_values: Sequence[float]) -> tuple[float | None, str | None]:
    """alpha of density ~ lambda^-alpha for the largest eigenvalues lambda = sigma^2, or None and the reason.

    Where the tail begins is chosen by the smallest Kolmogorov-Smirnov distance (Clauset, Shalizi & Newman, 2009). It
    is the `alpha` of WeightWatcher.
    """
    require_powerlaw()
    import powerlaw

    eigenvalues = np.square(np.asarray(singular_values, dtype=float))
    eigenvalues = eigenvalues[eigenvalues > eigenvalues.max(initial=0) * 1e-12]
    if len(eigenvalues) < FEWEST or eigenvalues.max() < eigenvalues.min() * (1 + 1e-6):
        return None, f"fewer than {FEWEST} different eigenvalues to fit"
    steep_too = {"alpha": [1, np.inf]}  # by default the package passes over tails with alpha > 3
    alpha = float(powerlaw.Fit(eigenvalues, verbose=0, parameter_ranges=steep_too).power_law.alpha)
    return (alpha, None) if np.isfinite(alpha) else (None, "the fit did not converge")
