"""Experiment 3's runs: how far from the best setting one may be."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Record

from blueberry.errors import UsageError

from .intervals import mean
from .stored import check_same, check_seeds, commits, read_records
from .sweeps import loss_of

WITHIN = 0.01  # of the best loss
PARTS = ("grid", "coefficients", "muon", "adamw")


@dataclass(frozen=True)
class Sensitivity:
    """Validation losses by setting. `records` are those of each part, in the order of `PARTS`."""

    records: Mapping[str, list[Record]]

    @property
    def model(self) -> str:
        return self.records["grid"][0]["run"]["model_name"]

    @property
    def commit(self) -> str:
        return commits(record for some in self.records.values() for record in some)

    @property
    def seeds(self) -> list[int]:
        return sorted({record["run"]["seed"] for record in self.records["muon"]})

    @property
    def grid(self) -> dict[tuple[float, float, int], float]:
        """(lr, momentum, ns_steps) -> loss, of one seed."""
        runs = ((record["run"], record) for record in self.records["grid"])
        return {(r["lr"], r["settings"]["momentum"], r["settings"]["ns_steps"]): loss_of(record) for r, record in runs}

    @property
    def coefficients(self) -> dict[str, dict[float, float]]:
        """Set -> learning rate -> loss, of one seed."""
        table: dict[str, dict[float, float]] = {}
        for record in self.records["coefficients"]:
            run = record["run"]
            table.setdefault(run["settings"]["coefficients"], {})[run["lr"]] = loss_of(record)
        return table

    @property
    def learning_rates(self) -> dict[str, dict[float, list[float]]]:
        """Optimizer -> learning rate -> losses over the seeds."""
        table: dict[str, dict[float, list[float]]] = {"muon": {}, "adamw": {}}
        for optimizer, tried in table.items():
            for record in sorted(self.records[optimizer], key=lambda record: record["run"]["seed"]):
                tried.setdefault(record["run"]["lr"], []).append(loss_of(record))
        return table

    def ranges_by_seed(self, optimizer: str) -> list[Record]:
        tried = self.learning_rates[optimizer]
        return [robust_range(dict(zip(tried, losses, strict=True))) for losses in zip(*tried.values(), strict=True)]

    def robustness(self, optimizer: str) -> Record:
        """The range of the mean over seeds."""
        return robust_range({lr: mean(losses) for lr, losses in self.learning_rates[optimizer].items()})


def read_sensitivity(folder: Path, files: Mapping[str, list[str]]) -> Sensitivity:
    """The records that experiment 3's results point to. UsageError for what is missing or does not belong together."""
    if set(files) != set(PARTS):
        raise UsageError(f"experiment_3 has the parts {', '.join(files)}, not {', '.join(PARTS)}: run it again")
    found = Sensitivity(read_records(folder, files, "experiment_3"))
    check_same("experiment_3", found.records)
    check_seeds("experiment_3", found.seeds)
    for optimizer in found.learning_rates:
        _check_rates(found, optimizer)
    return found


def _check_rates(found: Sensitivity, optimizer: str) -> None:
    """Every learning rate with every seed, by that optimizer alone."""
    records = found.records[optimizer]
    made = sorted((record["run"]["lr"], record["run"]["seed"]) for record in records)
    if made != sorted((lr, seed) for lr in found.learning_rates[optimizer] for seed in found.seeds):
        raise UsageError(f"experiment_3: not every learning rate of {optimizer} has each seed of {found.seeds} once: "
                         "run it again")  # fmt: skip
    for run in (record["run"] for record in records):
        if run["optimizer"] != optimizer or run["settings"]:
            raise UsageError(f"experiment_3: a run of {optimizer} is of {run['optimizer']} with {run['settings']}: "
                             "run it again")  # fmt: skip


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
