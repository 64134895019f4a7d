"""Experiment 5: AdamW, Muon and manifold Muon on `manifold-small`, and the success table of manifold Muon.

    python scripts/experiment_5_manifold_muon.py --scale cpu

Each arm's learning rate is tuned on shorter runs with a seed of their own; then every arm trains with the same seeds,
data order and tokens. Every run is a trial of an Optuna study and leaves a record in results/experiments/SCALE/runs,
and the same command goes on where an interrupted one stopped. The last lines are the table, saved in
results/experiments/SCALE/experiment_5/.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
from benchmarks.common import Record
from experiments.arms import ARMS
from experiments.drawings import draw
from experiments.intervals import IN_WORDS, mean, paired, single, verdict_of
from experiments.measures import by_arm, edge_note, quoted
from experiments.scales import Plan, Scale, parse_plan
from experiments.stored import files_of
from experiments.sweeps import grid, run_points, tuned_rates

from blueberry.configuration_blueberry import PRESETS
from blueberry.errors import run_script
from blueberry.training.run_folder import write_json

NAME = "experiment_5"
WINDOW = 20  # steps of the running deviation of the loss


_SMALL = PRESETS["manifold-small"]
_SMOKE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts": 2}  # fmt: skip
_MEDIUM = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
           "moe_intermediate_size": 2048}  # fmt: skip
SCALES = {
    "smoke": Scale(12, 4, 32, {"manifold-smoke": _SMALL | _SMOKE}),
    "cpu": Scale(600, 16, 256, {"manifold-small": _SMALL}),
    "paper": Scale(1000, 24, 512, {"manifold-small": _SMALL}),
    "medium": Scale(1000, 24, 512, {"manifold-medium": _SMALL | _MEDIUM}),
}


def main() -> None:
    plan = parse_plan(__doc__, SCALES)
    rates, tried, records = run_all(plan)
    rows = success_table(records)
    folder = plan.folder(NAME)
    results = {"runs": files_of(records), "learning_rates": rates, "tuning": tried, "table": rows}
    write_json(folder / f"{NAME}_results.json", results)
    draw(NAME, plan.laboratory.folder)
    (folder / "table.md").write_text(table := as_markdown(results, records))
    print("\n" + table)


def run_all(plan: Plan) -> tuple[dict[str, float], Record, dict[str, list[Record]]]:
    """The learning rate of each arm, the losses of those that were tried, and the records over seeds."""
    (model,) = plan.scale.models
    short = {arm: plan.short(model, arm, start.lr) for arm, start in ARMS[NAME].items()}
    rates, tried = tuned_rates(f"{NAME}-tuning", short, plan.laboratory)
    arms = {arm: plan.run(model, arm, lr, evaluations=5, spectral_logs=20) for arm, lr in rates.items()}
    points = grid(seed=plan.seeds, arm=list(arms))
    return rates, tried, by_arm(run_points(NAME, arms, points, plan.laboratory), points)


def success_table(records: dict[str, list[Record]]) -> list[Record]:
    """Document 2's criteria: means over seeds, the rule, and whether it holds, by the interval as for the claims."""
    manifold = records["manifold"]
    worst = {name: float(np.max([r["max_violation"][name] for r in manifold]))  # of NaN NaN, unlike Python's own
             for name in manifold[0]["max_violation"]}  # fmt: skip
    sigma = {arm: [float(np.min([r["sigma_min"] for r in some])), float(np.max([r["sigma_max"] for r in some]))]
             for arm, some in records.items()}  # fmt: skip
    share = {arm: [r["time"]["optimizer_step_ms"] / r["time"]["step_ms"] for r in some]
             for arm, some in records.items()}  # fmt: skip
    violations = sum(r["violations"] for r in manifold)
    return [
        {"criterion": "constraint violations", "manifold": worst, "rule": "orthogonality < 1e-4, radii within 1e-6",
         "verdict": verdict_of([violations, violations], [0, 0], everywhere=True)},
        {"criterion": "singular values", **sigma, "rule": "in [0.9999, 1.0001]",
         "verdict": verdict_of(sigma["manifold"], [0.9999, 1.0001], everywhere=True)},
        compare("deviation of the loss over 20 steps", records, loss_std),
        compare("variation of the gradient norm", records, gradient_variation),
        {"criterion": "optimizer's share of a step", **{arm: mean(values) for arm, values in share.items()},
         "rule": "< 20% at this batch", "verdict": verdict_of(single(share["manifold"])["interval"], [0, 0.2])},
        compare("final validation loss", records, lambda record: record["eval_loss"]),
    ]  # fmt: skip


def compare(criterion: str, records: dict[str, list[Record]], number) -> Record:
    """A row that holds if manifold Muon's number is not above AdamW's; with the paired differences to both others."""
    values = {arm: [number(record) for record in some] for arm, some in records.items()}
    differences = {f"minus {arm}": paired(values["manifold"], values[arm]) for arm in ("adamw", "muon")}
    return {"criterion": criterion, **{arm: mean(some) for arm, some in values.items()}, **differences,
            "rule": "not above AdamW's",
            "verdict": verdict_of(differences["minus adamw"]["interval"], [-math.inf, 0])}  # fmt: skip


def loss_std(record: Record) -> float:
    """Mean, over the second half of the run, of the standard deviation of the loss in a window of steps.

    Not detrended: an optimizer whose loss still falls quickly has more of it.
    """
    losses = pd.Series(record["losses"])
    return float(losses.rolling(min(WINDOW, len(losses) // 2)).std()[len(losses) // 2 :].mean())


def gradient_variation(record: Record) -> float:
    """Standard deviation of the gradient's norm over its mean, in the second half of the run."""
    norms = pd.Series(record["gradient_norms"])[len(record["gradient_norms"]) // 2 :]
    return float(norms.std() / norms.mean())


def as_markdown(results: Record, records: dict[str, list[Record]]) -> str:
    """The table, and under it what its figures must be quoted with."""
    lines = ["| criterion | AdamW | Muon | manifold Muon | rule | minus AdamW, 95% | verdict |", "|---" * 7 + "|"]
    for row in results["table"]:
        cells = [row["criterion"], *(shown(row.get(arm)) for arm in ARMS[NAME]), row["rule"]]
        cells += [interval(row.get("minus adamw")), IN_WORDS[row["verdict"]]]
        lines.append(f"| {' | '.join(cells)} |")
    tuned_to = ", ".join(f"{arm} {lr:g}" for arm, lr in results["learning_rates"].items())
    note = "The deviation of the loss is not detrended: a loss that still falls quickly has more of it."
    return "\n".join([*lines, "", f"{note} Learning rates {tuned_to}. {edge_note(results)}{quoted(records)}", ""])


def shown(value: Any) -> str:
    """A cell: a number, a range or several named ones."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.2g}" for name, number in value.items())
    return " to ".join(f"{number:.5g}" for number in value) if isinstance(value, list) else f"{value:.4g}"


def interval(difference: Record | None) -> str:
    if difference is None:
        return ""
    low, high = difference["interval"]
    return f"{difference['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    run_script(main)
