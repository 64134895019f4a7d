"""The figures of every experiment, from what lies on disk: the same records give the same figures."""

import math
from pathlib import Path

import numpy as np
from benchmarks.common import Record

from blueberry.spectral.plots import (
    combined,
    entropy_heatmap,
    singular_spectrum_mri,
    spectral_gap,
    spectral_norm_vs_depth,
    spectral_stretching,
    update_alignment,
    update_energy_in_top_k,
)

from . import figures
from .intervals import mean
from .sensitivity import read_sensitivity
from .stored import Comparison, read_baseline, read_comparison, read_results

SPECTRAL = (spectral_norm_vs_depth, entropy_heatmap, update_alignment, update_energy_in_top_k, singular_spectrum_mri,
            spectral_gap, spectral_stretching)  # fmt: skip
MAPS = (entropy_heatmap, singular_spectrum_mri)


def draw(experiment: str, results: Path) -> None:
    """Draw the figures of an experiment into its folder in `results`, if it was run."""
    found = read_results(results, experiment)
    if found is not None:
        _DRAWINGS[experiment](found, results, results / experiment)


def _baseline(found: Record, results: Path, folder: Path) -> None:
    for model, comparison in read_baseline(results).items():
        _losses(comparison, folder / f"{model}_losses.png")
        log = combined(comparison.logs)
        for function in SPECTRAL:
            figures.save(function(log), folder / model / f"{function.__name__}.png", is_map=function in MAPS)


def _ablation(found: Record, results: Path, folder: Path) -> None:
    _losses(read_comparison(results, found, folder.name), folder / "losses.png")
    diverged = math.inf  # null in JSON
    lines = {arm: {float(lr): diverged if loss is None else loss for lr, loss in some.items()}
             for arm, some in found["tuning"].items()}  # fmt: skip
    figures.save(figures.learning_rates(lines, "tuning runs, one seed"), folder / "learning_rates.png")


def _sensitivity(found: Record, results: Path, folder: Path) -> None:
    found = read_sensitivity(results, found["runs"])
    losses = found.grid
    rates, momenta, counts = (sorted(set(values)) for values in zip(*losses, strict=True))
    heatmaps = {
        f"ns_steps {n}, one seed": np.array([[losses[lr, m, n] for m in momenta] for lr in rates]) for n in counts
    }
    heatmap = figures.loss_heatmaps(heatmaps, rates, momenta, ("learning rate", "momentum"))
    figures.save(heatmap, folder / "grid.png", is_map=True)
    title = "coefficients of Newton-Schulz, one seed"
    figures.save(figures.learning_rates(found.coefficients, title), folder / "coefficients.png")
    lines = {name: {lr: mean(some) for lr, some in tried.items()} for name, tried in found.learning_rates.items()}
    figures.save(figures.learning_rates(lines, f"mean over n={len(found.seeds)} seeds"), folder / "learning_rates.png")


def _shares(found: Record, results: Path, folder: Path) -> None:
    figures.save(figures.step_times(found["rows"]), folder / "step_times.png")


def _losses_of_arms(found: Record, results: Path, folder: Path) -> None:
    _losses(read_comparison(results, found, folder.name), folder / "losses.png")


def _losses(comparison: Comparison, path: Path) -> None:
    run = next(iter(comparison.arms.values()))[0]["run"]
    model, steps = run["model_name"], run["steps"]
    figures.save(figures.losses(comparison.arms, f"{model}, n={comparison.n} seeds, {steps} steps"), path)


_DRAWINGS = {
    "experiment_1": _baseline,
    "experiment_2": _ablation,
    "experiment_3": _sensitivity,
    "experiment_4": _shares,
    "experiment_5": _losses_of_arms,
    "experiment_6": _losses_of_arms,
}
EXPERIMENTS = tuple(_DRAWINGS)
