"""Experiment 2: Muon without its parts, each variant at its own best learning rate.

    python scripts/experiment_2_ablation_muon.py --scale cpu --workers 2

Four arms: all of Muon, without Newton-Schulz (momentum alone), without momentum (Newton-Schulz alone), and without
both. The interaction is what Newton-Schulz gains without momentum less what it gains with it, seed by seed:
(neither - no momentum) - (no Newton-Schulz - full). Below 0 the two parts help one another (synergy).
Every run is a trial of an Optuna study and leaves a record in results/experiments/SCALE/runs; the same command goes on
where an interrupted one stopped. Results go to results/experiments/SCALE/experiment_2.
"""

from collections.abc import Mapping, Sequence

from benchmarks.common import Record
from experiments.arms import ARMS
from experiments.drawings import draw
from experiments.intervals import mean, paired
from experiments.measures import by_arm, edge_note, interaction, losses_of, markdown, quoted, shown
from experiments.scales import Plan, parse_plan
from experiments.stored import files_of
from experiments.sweeps import grid, run_points, tuned_rates

from blueberry.errors import run_script
from blueberry.training.run_folder import write_json

NAME = "experiment_2"


def main() -> None:
    plan = parse_plan(__doc__)
    folder = plan.folder(NAME)
    model = next(iter(plan.scale.models))
    rates, tried, arms = ablate(plan, model)
    losses = losses_of(arms)
    results = {
        "model": model, "runs": files_of(arms), "learning_rates": rates, "tuning": tried,
        "losses": losses,
        "minus_full": {arm: paired(some, losses["full"]) for arm, some in losses.items() if arm != "full"},
        "interaction": interaction(losses),
    }  # fmt: skip
    write_json(folder / f"{NAME}_results.json", results)
    draw(NAME, plan.laboratory.folder)
    (folder / f"{NAME}.md").write_text(table := as_markdown(results, arms))
    print(f"\n{table}")


def ablate(plan: Plan, model: str) -> tuple[dict[str, float], Record, dict[str, list[Record]]]:
    """The learning rate of each arm, the losses of those that were tried, and the records over seeds."""
    short = {arm: plan.short(model, own.optimizer, own.lr, **own.settings) for arm, own in ARMS[NAME].items()}
    rates, tried = tuned_rates(f"{NAME}-tuning", short, plan.laboratory)
    arms = {arm: plan.run(model, own.optimizer, rates[arm], **own.settings) for arm, own in ARMS[NAME].items()}
    points = grid(seed=plan.seeds, arm=list(arms))
    return rates, tried, by_arm(run_points(NAME, arms, points, plan.laboratory), points)


def as_markdown(results: Record, arms: Mapping[str, Sequence[Record]]) -> str:
    rows = [[arm, results["learning_rates"][arm], mean(results["losses"][arm]), results["minus_full"].get(arm, "")]
            for arm in arms]  # fmt: skip
    return (
        markdown(["arm", "learning rate", "validation loss", "minus full, 95%"], rows)
        + f"\nInteraction {shown(results['interaction'])}. {edge_note(results)}{quoted(arms)}\n"
    )


if __name__ == "__main__":
    run_script(main)
