"""TrainerCallbacks for any transformers Trainer. Names are imported when first used."""

from importlib import import_module
from typing import Any

_HOME = {
    "ManifoldConstraintCallback": "manifold_constraints",
    "RouterMetricsCallback": "router_metrics",
    "SpectralMetricsCallback": "spectral_metrics",
    "StepTimeCallback": "step_time",
    "TensorBoardCallback": "tensorboard",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
