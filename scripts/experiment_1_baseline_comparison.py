"""Experiment 1: the hybrid of Muon and AdamW against AdamW alone, each at its best learning rate.

    python scripts/experiment_1_baseline_comparison.py --scale cpu --workers 2

For every model of the scale: each optimizer's learning rate is chosen on shorter runs with a seed of their own; then
both train from the same weights on the same data in the same order, for every seed, with the spectra of weights and
updates in a log. Every run is a trial of an Optuna study and leaves a record in results/experiments/SCALE/runs; the
same command goes on where an interrupted one stopped. Tables and figures go to results/experiments/SCALE/experiment_1.
"""

from collections.abc import Mapping, Sequence

from benchmarks.common import Record
from experiments.arms import ARMS
from experiments.drawings import draw
from experiments.intervals import mean
from experiments.measures import PROCESS_MEMORY, by_arm, edge_note, markdown, outcome_rows, quoted, tokens_to
from experiments.scales import Plan, parse_plan
from experiments.stored import files_of
from experiments.sweeps import grid, run_points, tuned_rates

from blueberry.errors import run_script
from blueberry.training.run_folder import write_json

NAME = "experiment_1"


def main() -> None:
    plan = parse_plan(__doc__)
    folder = plan.folder(NAME)
    results = {}
    for model in plan.scale.models:
        rates, tried, arms = compare(plan, model)
        results[model] = {
            "runs": files_of(arms), "learning_rates": rates, "tuning": tried,
            "outcomes": outcome_rows(arms, "adamw"), "share_of_tokens_to_the_other's_loss": tokens_needed(arms),
        }  # fmt: skip
        write_json(folder / f"{NAME}_results.json", results)
        (folder / f"{model}.md").write_text(table := as_markdown(results[model], arms))
        print(f"\n{table}")
    draw(NAME, plan.laboratory.folder)


def compare(plan: Plan, model: str) -> tuple[dict[str, float], Record, dict[str, list[Record]]]:
    """The learning rate of each arm, the losses of those that were tried, and the records over seeds."""
    short = {arm: plan.short(model, arm, start.lr) for arm, start in ARMS[NAME].items()}
    rates, tried = tuned_rates(f"{NAME}-{model}-tuning", short, plan.laboratory)
    arms = {arm: plan.run(model, arm, lr) for arm, lr in rates.items()}
    points = grid(seed=plan.seeds, arm=list(arms))
    return rates, tried, by_arm(run_points(f"{NAME}-{model}", arms, points, plan.laboratory), points)


def tokens_needed(arms: Mapping[str, Sequence[Record]]) -> dict[str, list[float | None]]:
    """Share of its tokens after which a run has the final loss of the other optimizer's, seed by seed; None: never."""
    shares = {}
    for arm, other in (("muon", "adamw"), ("adamw", "muon")):
        pairs = zip(arms[arm], arms[other], strict=True)
        needed = [(tokens_to(record, goal["eval_loss"]), record["tokens"]) for record, goal in pairs]
        shares[arm] = [None if tokens is None else tokens / all_tokens for tokens, all_tokens in needed]
    return shares


def as_markdown(result: Record, arms: Mapping[str, Sequence[Record]]) -> str:
    rows = [[row["outcome"], row["mean"]["adamw"], row["mean"]["muon"], row["minus_adamw"]["muon"]]
            for row in result["outcomes"]]  # fmt: skip
    shares = {arm: "never" if None in some else mean(some)
              for arm, some in result["share_of_tokens_to_the_other's_loss"].items()}  # fmt: skip
    rows.append(["share of its tokens to the other's final loss", shares["adamw"], shares["muon"], ""])
    rates = ", ".join(f"{arm} {lr:g}" for arm, lr in result["learning_rates"].items())
    return (
        markdown(["", "AdamW", "Muon", "Muon minus AdamW, 95%"], rows)
        + f"\nLearning rates {rates}. {edge_note(result)}{PROCESS_MEMORY} {quoted(arms)}\n"
    )


if __name__ == "__main__":
    run_script(main)
