"""Experiment 6, beyond the original studies: variants of Muon against the default, each at its own learning rate.

    python scripts/experiment_6_variants.py --scale cpu --workers 2

`rms_match` against `shape` scaling of updates, the coefficients `keller_jordan` and `polar_express` against the
default, weight decay and cautious weight decay, NorMuon, and manifold Muon. The protocol is that of experiment 1,
whose runs of Muon are the baseline and are not made twice. Results go to results/experiments/SCALE/experiment_6.
"""

from benchmarks.common import Record
from experiments.arms import ARMS
from experiments.drawings import draw
from experiments.intervals import mean, paired
from experiments.measures import by_arm, edge_note, losses_of, markdown, quoted
from experiments.scales import Plan, parse_plan
from experiments.stored import files_of
from experiments.sweeps import grid, run_points, tuned_rates

from blueberry.errors import run_script
from blueberry.training.run_folder import write_json

NAME = "experiment_6"
BASELINE = "muon"


def main() -> None:
    plan = parse_plan(__doc__)
    folder = plan.folder(NAME)
    model = next(iter(plan.scale.models))
    rates, tried, arms = run_all(plan, model)
    losses = losses_of(arms)
    results = {
        "model": model, "runs": files_of(arms), "learning_rates": rates, "tuning": tried, "losses": losses,
        "minus_muon": {arm: paired(some, losses[BASELINE]) for arm, some in losses.items() if arm != BASELINE},
        "step_ms": {arm: mean([r["time"]["step_ms"] for r in records]) for arm, records in arms.items()},
    }  # fmt: skip
    write_json(folder / f"{NAME}_results.json", results)
    draw(NAME, plan.laboratory.folder)
    (folder / f"{NAME}.md").write_text(table := as_markdown(results, arms))
    print(f"\n{table}")


def run_all(plan: Plan, model: str) -> tuple[dict[str, float], Record, dict[str, list[Record]]]:
    """The learning rate of each arm, the losses of those that were tried, and the records over seeds."""
    short = {arm: plan.short(model, own.optimizer, own.lr, **own.settings) for arm, own in ARMS[NAME].items()}
    rates, tried = tuned_rates(f"{NAME}-tuning", short, plan.laboratory)
    arms = {arm: plan.run(model, own.optimizer, rates[arm], **own.settings) for arm, own in ARMS[NAME].items()}
    points = grid(seed=plan.seeds, arm=list(arms))
    return rates, tried, by_arm(run_points(NAME, arms, points, plan.laboratory), points)


def as_markdown(results: Record, arms: dict[str, list[Record]]) -> str:
    rows = [[arm, results["learning_rates"][arm], mean(losses), results["minus_muon"].get(arm, ""),
             results["step_ms"][arm]] for arm, losses in results["losses"].items()]  # fmt: skip
    header = ["arm", "learning rate", "validation loss", "minus Muon, 95%", "step, ms"]
    return markdown(header, rows) + f"\n{edge_note(results)}{quoted(arms)}\n"


if __name__ == "__main__":
    run_script(main)
