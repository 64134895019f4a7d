"""How well the weights of manifold optimizers keep their constraints, as plain numbers."""

from collections.abc import Iterable
from typing import Any

import torch

from .finite import whole
from .manifold_base import ManifoldOptimizer
from .manifold_weights import TOLERANCE, stiefel_singular_values
from .stiefel_muon import StiefelMuon

Report = dict[str, Any]


def check_constraints(parts: Iterable[tuple[str, ManifoldOptimizer]]) -> Report:
    """Constraint errors of every matrix in float64: norm_F(W^T W / radius^2 - I), or the largest of its norms'.

    Returns `{"total_violations": int, "by_type": {part: {"max_violation", "mean_violation", "violations", "matrices",
    "tolerance", "by_family": {family: {"max_violation", "mean_violation"}}}}}`. A violation is an error above the
    tolerance: 1e-4 for `stiefel_muon`, 1e-6 for `hypersphere_muon`.
    """
    by_type = {name: _report(part, TOLERANCE[name]) for name, part in parts}
    return {"total_violations": sum(report["violations"] for report in by_type.values()), "by_type": by_type}


def constraint_metrics(parts: Iterable[tuple[str, ManifoldOptimizer]], prefix: str) -> dict[str, float]:
    """The same flat, for loggers, with the range of singular values, tangency residual and dual iterations.

    `prefix/constraint/violations`, `prefix/<part>/max_violation` and `.../mean_violation`,
    `prefix/<family>/max_violation` and `.../mean_violation`; of each Stiefel family also `sigma_min` and `sigma_max`
    (over the radius), `tangency_residual` and `dual_iterations` of the last step.
    """
    parts = list(parts)
    report = check_constraints(parts)
    metrics: dict[str, float] = {f"{prefix}/constraint/violations": float(report["total_violations"])}
    for name, numbers in report["by_type"].items():
        for label, errors in {name: numbers, **numbers["by_family"]}.items():
            metrics |= {f"{prefix}/{label}/{key}": errors[key] for key in ("max_violation", "mean_violation")}
    for _, part in parts:
        if isinstance(part, StiefelMuon):
            for label, numbers in _spectra(part).items():
                metrics |= {f"{prefix}/{label}/{key}": value for key, value in numbers.items()}
    return metrics


def _report(part: ManifoldOptimizer, tolerance: float) -> Report:
    errors: dict[str, list[torch.Tensor]] = {}
    for group, _, values in part.constraint_errors():
        errors.setdefault(group.get("name", "weights"), []).append(values.cpu())
    by_family = {family: torch.cat(values) for family, values in errors.items()}
    every = torch.cat(list(by_family.values())) if by_family else torch.zeros(0, dtype=torch.float64)
    return _extremes(every) | {
        "violations": int((~(every <= tolerance)).sum()),
        "matrices": len(every),
        "tolerance": tolerance,
        "by_family": {family: _extremes(values) for family, values in by_family.items()},
    }


def _extremes(errors: torch.Tensor) -> Report:
    if not len(errors):
        return {"max_violation": 0.0, "mean_violation": 0.0}
    return {"max_violation": errors.max().item(), "mean_violation": errors.mean().item()}


def _spectra(part: StiefelMuon) -> dict[str, dict[str, float]]:
    ranges: dict[str, list[torch.Tensor]] = {}
    solver: dict[str, dict[str, float]] = {}
    for group in part.param_groups:
        family = group.get("name", "weights")
        solver[family] = {name: float(group[name]) for name in ("tangency_residual", "dual_iterations")}
        for parameter in group["params"]:
            weight = whole(part.exact_weight(parameter))
            ranges.setdefault(family, []).append(stiefel_singular_values(weight, group["radius"], group["layout"]))
    return {
        family: {"sigma_min": torch.cat(r)[:, 0].min().item(), "sigma_max": torch.cat(r)[:, 1].max().item()}
        | solver[family]
        for family, r in ranges.items()
    }
