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
from collections.abc import Sequence

from benchmarks.common import Record
from experiments.drawings import draw
from experiments.measures import markdown, quoted
from experiments.scales import TUNING_SEED, Plan, plan_of, plan_parser
from experiments.sensitivity import Sensitivity
from experiments.stored import files_of
from experiments.sweeps import grid, run_points

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


def main() -> None:
    grids = parse_arguments()
    plan = plan_of(grids)
    folder = plan.folder(NAME)
    model = next(iter(plan.scale.models))
    found = Sensitivity({
        "grid": full_grid(plan, model, grids),
        "coefficients": coefficient_sets(plan, model, grids.rates),
        "muon": learning_rates(plan, model, "muon", grids.rates),
        "adamw": learning_rates(plan, model, "adamw", grids.adamw_rates),
    })  # fmt: skip
    results = summary(found)
    write_json(folder / f"{NAME}_results.json", results)
    draw(NAME, plan.laboratory.folder)
    (folder / f"{NAME}.md").write_text(table := as_markdown(results, found))
    print(f"\n{table}")


def summary(found: Sensitivity) -> Record:
    names = ("lr", "momentum", "ns_steps")
    grid = [dict(zip(names, key, strict=True)) | {"loss": loss} for key, loss in found.grid.items()]
    return {
        "model": found.model,
        "runs": files_of(found.records),
        "grid": grid,
        "best": min(grid, key=lambda cell: cell["loss"]),
        "coefficients": found.coefficients,
        "learning_rates": found.learning_rates,
        "ranges_by_seed": {optimizer: found.ranges_by_seed(optimizer) for optimizer in found.learning_rates},
        "robustness": {optimizer: found.robustness(optimizer) for optimizer in found.learning_rates},
        "commit": found.commit,
    }


def parse_arguments() -> argparse.Namespace:
    parser = plan_parser(__doc__)
    for name, values in GRIDS.items():
        parser.add_argument(f"--{name}", type=type(values[0]), nargs="+", default=values)
    return parser.parse_args()


def full_grid(plan: Plan, model: str, grids: argparse.Namespace) -> list[Record]:
    arms = {"muon": plan.short(model, "muon", 0.02, coefficients="keller_jordan")}
    points = grid(arm=arms, lr=grids.rates, momentum=grids.momenta, ns_steps=grids.ns_steps)
    return run_points(f"{NAME}-grid", arms, points, plan.laboratory)


def coefficient_sets(plan: Plan, model: str, rates: Sequence[float]) -> list[Record]:
    """Each set with its own number of steps."""
    arms = {name: plan.short(model, "muon", 0.02, coefficients=name) for name in COEFFICIENTS}
    return run_points(f"{NAME}-coefficients", arms, grid(arm=arms, lr=rates), plan.laboratory)


def learning_rates(plan: Plan, model: str, optimizer: str, rates: Sequence[float]) -> list[Record]:
    """Every rate with every seed."""
    arms = {optimizer: plan.short(model, optimizer, 0.02)}
    return run_points(f"{NAME}-{optimizer}", arms, grid(arm=arms, lr=rates, seed=plan.seeds), plan.laboratory)


def as_markdown(results: Record, found: Sensitivity) -> str:
    best = results["best"]
    rows = [[name, found["best"], f"{found['low']:.3g} to {found['high']:.3g}", found["ratio"],
             "yes" if found["reaches_the_end"] else "no"]
            for name, found in results["robustness"].items()]  # fmt: skip
    spans = [[setting, max(some) - min(some)] for setting, some in best_by_setting(results["grid"]).items()]
    header = ["optimizer", "best learning rate", "within 1% of its loss", "ratio", "reaches the end of the grid"]
    return (
        f"Best of the grid: learning rate {best['lr']:g}, momentum {best['momentum']:g}, {best['ns_steps']} steps, "
        f"validation loss {best['loss']:.4f}. The grid and the sets of coefficients are of one seed, {TUNING_SEED}: "
        "differences as small as those between seeds mean nothing there.\n\n"
        + markdown(["setting", "span of the best losses over its values"], spans)
        + "\n"
        + markdown(header, rows)
        + f"\nLearning rates over seeds: {quoted({name: found.records[name] for name in ('muon', 'adamw')})}\n"
    )


def best_by_setting(cells: Sequence[Record]) -> dict[str, list[float]]:
    """For each setting, the best loss at each of its values, with the others at their best for it."""
    names = ("lr", "momentum", "ns_steps")
    return {name: [min(cell["loss"] for cell in cells if cell[name] == value)
                   for value in sorted({cell[name] for cell in cells})] for name in names}  # fmt: skip


if __name__ == "__main__":
    run_script(main)
