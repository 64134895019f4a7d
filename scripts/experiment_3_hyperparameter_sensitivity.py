"""Experiment 3: how much Muon's settings matter, and how far from its best learning rate an optimizer may be.

    python scripts/experiment_3_hyperparameter_sensitivity.py --scale cpu --workers 2

On the first model of the scale, in runs of a third of its steps: the full grid of learning rate, momentum and number
of Newton-Schulz steps (of `keller_jordan`, one seed); the three sets of coefficients over learning rates; and, for
every seed, Muon's and AdamW's learning rates, for their robustness: the range of rates, as a ratio, whose mean loss is
within 1% of the best, interpolated on the logarithm of the rate. Every run is a trial of an Optuna study and leaves a
record in results/experiments/SCALE/runs; the same command goes on where an interrupted one stopped. Results go to
results/experiments/SCALE/experiment_3.
"""

import argparse
import math
from collections.abc import Mapping, Sequence

from benchmarks.common import Record
from experiments.drawings import draw
from experiments.intervals import mean
from experiments.measures import markdown, quoted
from experiments.scales import TUNING_SEED, Plan, plan_of, plan_parser
from experiments.sweeps import Point, grid, loss_of, run_points

from blueberry.errors import run_script
from blueberry.training.run_folder import write_json

NAME = "experiment_3"
GRIDS = {
    "rates": (0.001, 0.005, 0.01, 0.02, 0.05),
    "momenta": (0.9, 0.95, 0.99),
    "ns_steps": (3, 5, 7),
    "adamw_rates": (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032),
}
COEFFICIENTS = ("keller_jordan", "polar_express", "robust")
WITHIN = 0.01  # of the best loss


def main() -> None:
    grids = parse_arguments()
    plan = plan_of(grids)
    folder = plan.folder(NAME)
    model = next(iter(plan.scale.models))
    losses, records = full_grid(plan, model, grids)
    sets = coefficient_sets(plan, model, grids.rates)
    rates = {
        "muon": learning_rates(plan, model, "muon", grids.rates),
        "adamw": learning_rates(plan, model, "adamw", grids.adamw_rates),
    }
    ranges = {optimizer: [robust_range(dict(zip(map(float, tried), losses_of_seed, strict=True)))
                          for losses_of_seed in zip(*tried.values(), strict=True)]
              for optimizer, tried in rates.items()}  # fmt: skip
    best = min(losses, key=losses.get)
    results = {
        "model": model,
        "grid": [{**dict(zip(("lr", "momentum", "ns_steps"), key, strict=True)), "loss": loss}
                 for key, loss in losses.items()],
        "best": dict(zip(("lr", "momentum", "ns_steps"), best, strict=True)) | {"loss": losses[best]},
        "coefficients": sets,
        "learning_rates": rates,
        "ranges_by_seed": ranges,
        "commit": records[0]["versions"]["commit"],
        "robustness": {optimizer: robust_range({float(lr): mean(some) for lr, some in tried.items()})
                       for optimizer, tried in rates.items()},
    }  # fmt: skip
    write_json(folder / f"{NAME}_results.json", results)
    draw(NAME, plan.laboratory.folder)
    (folder / f"{NAME}.md").write_text(table := as_markdown(results, records[0], len(plan.seeds)))
    print(f"\n{table}")


def parse_arguments() -> argparse.Namespace:
    parser = plan_parser(__doc__)
    for name, values in GRIDS.items():
        parser.add_argument(f"--{name}", type=type(values[0]), nargs="+", default=values)
    return parser.parse_args()


def full_grid(plan: Plan, model: str, grids: argparse.Namespace) -> tuple[dict[tuple, float], list[Record]]:
    """(lr, momentum, ns_steps) -> validation loss, and the records."""
    arms = {"muon": plan.short(model, "muon", 0.02, coefficients="keller_jordan")}
    points = grid(arm=arms, lr=grids.rates, momentum=grids.momenta, ns_steps=grids.ns_steps)
    records = run_points(f"{NAME}-grid", arms, points, plan.laboratory)
    return {(p["lr"], p["momentum"], p["ns_steps"]): loss_of(r) for p, r in zip(points, records, strict=True)}, records


def coefficient_sets(plan: Plan, model: str, rates: Sequence[float]) -> dict[str, dict[str, float]]:
    """Set -> learning rate -> validation loss, each set with its own number of steps."""
    arms = {name: plan.short(model, "muon", 0.02, coefficients=name) for name in COEFFICIENTS}
    points = grid(arm=arms, lr=rates)
    records = run_points(f"{NAME}-coefficients", arms, points, plan.laboratory)
    return _nested(points, records, "arm", lambda point: f"{point['lr']:g}")


def learning_rates(plan: Plan, model: str, optimizer: str, rates: Sequence[float]) -> dict[str, list[float]]:
    """Learning rate -> validation losses over the seeds."""
    arms = {optimizer: plan.short(model, optimizer, 0.02)}
    points = grid(arm=arms, lr=rates, seed=plan.seeds)
    records = run_points(f"{NAME}-{optimizer}", arms, points, plan.laboratory)
    losses: dict[str, list[float]] = {}
    for point, record in zip(points, records, strict=True):
        losses.setdefault(f"{point['lr']:g}", []).append(loss_of(record))
    return losses


def _nested(points: Sequence[Point], records: Sequence[Record], outer: str, inner) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for point, record in zip(points, records, strict=True):
        table.setdefault(point[outer], {})[inner(point)] = loss_of(record)
    return table


def robust_range(losses: Mapping[float, float]) -> Record:
    """The rates around the best whose loss is at most `1 + WITHIN` times the best, interpolated in log rate."""
    rates = sorted(losses)
    bound = min(losses.values()) * (1 + WITHIN)
    best = rates.index(min(losses, key=losses.get))
    low, high = (_edge(rates[::step], losses, bound, rates[best]) for step in (-1, 1))
    return {"best": rates[best], "low": low, "high": high, "ratio": high / low,
            "reaches_the_end": low == rates[0] or high == rates[-1]}  # fmt: skip


def _edge(rates: Sequence[float], losses: Mapping[float, float], bound: float, best: float) -> float:
    """Where the loss, going along `rates` from the best one on, passes the bound; the last rate if it never does."""
    start = rates.index(best)
    for inside, outside in zip(rates[start:], rates[start + 1 :], strict=False):
        if losses[outside] > bound:
            share = (bound - losses[inside]) / (losses[outside] - losses[inside])
            share = 0.0 if math.isinf(losses[outside]) else share
            return inside * (outside / inside) ** share
    return rates[-1]


def as_markdown(results: Record, record: Record, seeds: int) -> str:
    best = results["best"]
    rows = [[name, found["best"], f"{found['low']:.3g} to {found['high']:.3g}", found["ratio"],
             "yes" if found["reaches_the_end"] else "no"]
            for name, found in results["robustness"].items()]  # fmt: skip
    spans = [[setting, max(some) - min(some)] for setting, some in best_by_setting(results["grid"]).items()]
    header = ["optimizer", "best learning rate", "within 1% of its loss", "ratio", "reaches the end of the grid"]
    return (
        f"Best of the grid: learning rate {best['lr']:g}, momentum {best['momentum']:g}, {best['ns_steps']} steps, "
        f"validation loss {best['loss']:.4f} (seed {TUNING_SEED}).\n\n"
        + markdown(["setting", "span of the best losses over its values"], spans)
        + "\n"
        + markdown(header, rows)
        + f"\n{quoted(record, seeds)}\n"
    )


def best_by_setting(cells: Sequence[Record]) -> dict[str, list[float]]:
    """For each setting, the best loss at each of its values, with the others at their best for it."""
    names = ("lr", "momentum", "ns_steps")
    return {name: [min(cell["loss"] for cell in cells if cell[name] == value)
                   for value in sorted({cell[name] for cell in cells})] for name in names}  # fmt: skip


if __name__ == "__main__":
    run_script(main)
