"""Numbers of one record, and tables of several."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from benchmarks.common import Record

from .intervals import mean, paired

# Title of a row -> the number of a record.
OUTCOMES: dict[str, Callable[[Record], float]] = {
    "validation loss": lambda record: record["eval_loss"],
    "accuracy": lambda record: record["eval_accuracy"],
    "perplexity": lambda record: record["eval_perplexity"],
    "seconds a step": lambda record: record["time"]["step_ms"] / 1000,
    "optimizer's share of a step": lambda record: record["time"]["optimizer_step_ms"] / record["time"]["step_ms"],
    "tokens/s": lambda record: record["tokens"] / record["run"]["steps"] / record["time"]["step_ms"] * 1000,
    "peak memory of the process, MiB": lambda record: record["peak_memory_mib"],
}
PROCESS_MEMORY = (
    "The peak memory is what the whole process held, which also depends on the runs that it made before: no measure "
    "of an optimizer."
)


def tokens_to(record: Record, loss: float) -> float | None:
    """Tokens until a validation loss of at most `loss`, interpolated between evaluations; None if never reached.

    NaN, as of a run that diverged, is no goal: NaN.
    """
    if math.isnan(loss):
        return math.nan
    losses, steps = record["eval_losses"], record["eval_steps"]
    reached = next((i for i, value in enumerate(losses) if value <= loss), None)
    if reached is None:
        return None
    if reached == 0:
        steps_needed = steps[0]
    else:
        before, after = losses[reached - 1], losses[reached]
        share = (before - loss) / (before - after)
        steps_needed = steps[reached - 1] + share * (steps[reached] - steps[reached - 1])
    return steps_needed * record["tokens"] / record["run"]["steps"]


def losses_of(arms: Mapping[str, Sequence[Record]]) -> dict[str, list[float]]:
    """Arm -> validation losses over seeds."""
    return {arm: [record["eval_loss"] for record in records] for arm, records in arms.items()}


def interaction(losses: Mapping[str, Sequence[float]]) -> Record:
    """Experiment 2's (neither - no momentum) - (no Newton-Schulz - full) over seeds, with its interval."""
    alone = [a - b for a, b in zip(losses["neither"], losses["no momentum"], strict=True)]
    with_momentum = [a - b for a, b in zip(losses["no Newton-Schulz"], losses["full"], strict=True)]
    return paired(alone, with_momentum)


def by_arm(records: Sequence[Record], points: Sequence[Mapping[str, Any]]) -> dict[str, list[Record]]:
    """The records of each arm, in the order of the points."""
    arms: dict[str, list[Record]] = {}
    for record, point in zip(records, points, strict=True):
        arms.setdefault(point["arm"], []).append(record)
    return arms


def outcome_rows(arms: Mapping[str, Sequence[Record]], baseline: str) -> list[Record]:
    """For each outcome: mean over seeds for each arm, and paired difference to the baseline with its 95% interval."""
    rows = []
    for title, number in OUTCOMES.items():
        values = {arm: [number(record) for record in records] for arm, records in arms.items()}
        means = {arm: mean(some) for arm, some in values.items()}
        minus = {arm: paired(some, values[baseline]) for arm, some in values.items() if arm != baseline}
        rows.append({"outcome": title, "mean": means, f"minus_{baseline}": minus})
    return rows


def loss_curves(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (evaluations,) and validation losses (seeds, evaluations) of one arm."""
    first = records[0]
    tokens = np.array(first["eval_steps"]) * first["tokens"] / first["run"]["steps"]
    return tokens, np.array([record["eval_losses"] for record in records])


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers with four digits."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(shown(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A cell: a number, a paired difference with its interval, or text."""
    if isinstance(value, dict):
        low, high = value["interval"]
        return f"{value['difference']:+.4g} [{low:+.4g}, {high:+.4g}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quoted(arms: Mapping[str, Sequence[Record]]) -> str:
    """What figures of such runs, of which each arm has the same seeds, must be quoted with."""
    every = [record for records in arms.values() for record in records]
    record, seeds = every[0], sorted({record["run"]["seed"] for record in every})
    run = record["run"]
    return (
        f"{run['model_name']}: {record['parameters']:,} parameters, {run['steps']} steps of {run['batch']} x "
        f"{run['length']} tokens of {run['dataset']}, n={len(seeds)} seeds; {made_with(every)}"
    )


def made_with(records: Sequence[Record]) -> str:
    """Device, threads, torch and commits of runs."""
    made = {name: ", ".join(sorted({str(record["versions"][name]) for record in records}))
            for name in ("device", "threads", "torch", "commit")}  # fmt: skip
    return f"{made['device']}, threads a run: {made['threads']}, torch {made['torch']}, commit {made['commit']}"


def edge_note(results: Record) -> str:
    """Which learning rates were the last that tuning tried; empty if none was."""
    edge = at_the_edge(results["learning_rates"], results["tuning"])
    if not edge:
        return ""
    return f"The best learning rate of {', '.join(edge)} was the last one tried: a better one may lie beyond. "


def at_the_edge(best: Mapping[str, float], tried: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """The arms whose best learning rate is the least or the largest of those tried."""
    ends = {arm: [float(lr) for lr in losses] for arm, losses in tried.items()}
    return [arm for arm, rates in ends.items() if best[arm] in (min(rates), max(rates))]
