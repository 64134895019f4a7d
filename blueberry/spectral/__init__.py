"""Spectra of weights and updates: metrics, analysis of many matrices, the log of a run, figures.

Names are imported when first used: reading and plotting a log needs neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "spectral_metrics": "metrics",
    "update_metrics": "metrics",
    "analyze": "analysis",
    "SpectralLog": "log",
    "MatrixName": "names",
    "matrix_name": "names",
    "METRICS": "names",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
