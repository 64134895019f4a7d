"""The results of experiments, read back; comparisons of what does not belong together are refused."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from benchmarks.common import Record

from blueberry.errors import UsageError

from .arms import ARMS
from .measures import at_the_edge
from .runs import Run, read_record, spectral_log
from .scales import SCALES, TUNING_SEED

CHOSEN = ("optimizer", "lr", "settings", "seed")  # differ between the runs of one comparison, by what is checked
MACHINE = ("torch", "device")  # of `versions`: what losses and times may depend on


@dataclass(frozen=True)
class Comparison:
    """The runs of the arms of one experiment on one model, the same seeds in each."""

    experiment: str
    arms: Mapping[str, list[Record]]
    runs: Path  # the folder of all runs
    at_the_edge: Sequence[str]  # arms whose learning rate was the first or the last of those tried

    @property
    def n(self) -> int:
        return len(next(iter(self.arms.values())))

    @property
    def commit(self) -> str:
        """Of all runs; more than one where they were made at different ones."""
        return commits(record for records in self.arms.values() for record in records)

    @cached_property
    def logs(self) -> dict[str, list[pd.DataFrame]]:
        """Arm -> the spectral log of each seed. UsageError if one is missing or ends early."""
        return {arm: [self._log(record) for record in records] for arm, records in self.arms.items()}

    def check_threads(self) -> None:
        """Times are compared between equal numbers of threads only. Raises UsageError."""
        _check_equal(self.experiment, self.arms, lambda record: {"threads": record["versions"]["threads"]})

    def _log(self, record: Record) -> pd.DataFrame:
        log = spectral_log(record, self.runs)
        if not log.parts():
            raise UsageError(f"{self.experiment} misses the spectral log {log.path}: remove its record, run it again")
        rows = log.read()
        if rows.step.max() != record["run"]["steps"]:
            raise UsageError(f"{self.experiment}: {log.path} ends before its run: remove the record, run it again")
        return rows


def commits(records: Iterable[Record]) -> str:
    return ", ".join(sorted({record["versions"]["commit"] for record in records}))


def files_of(arms: Mapping[str, list[Record]]) -> dict[str, list[str]]:
    """Arm -> its records' files in the folder of all runs: what an experiment's results point to."""
    runs = {arm: [Run(**record["run"]) for record in records] for arm, records in arms.items()}
    return {arm: [str(run.path(Path())) for run in some] for arm, some in runs.items()}


def read_results(folder: Path, experiment: str) -> Record | None:
    """What an experiment wrote; None if it was not run. UsageError if the file is damaged."""
    path = folder / experiment / f"{experiment}_results.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): run {experiment} again, it repeats no run") from error


def read_baseline(folder: Path) -> dict[str, Comparison]:
    """Experiment 1: each model of the scale with its comparison; empty if it was not run.

    Raises UsageError for a model that is missing, and as `read_comparison`.
    """
    results = read_results(folder, "experiment_1") or {}
    found = {model: read_comparison(folder, result, "experiment_1") for model, result in results.items()}
    for comparison in found.values():
        run = comparison.arms["muon"][0]["run"]
        if missing := [model for model in _models_of_scale(run) if model not in found]:
            raise UsageError(f"experiment_1 misses the model {missing[0]} of its scale: run it again")
    return found


def _models_of_scale(run: Record) -> list[str]:
    """All models of the scale that a run's model belongs to."""
    for scale in SCALES.values():
        if scale.models.get(run["model_name"]) == run["model"]:
            return list(scale.models)
    raise UsageError(f"experiment_1: {run['model_name']} is the model of no scale: run it again")


def read_comparison(folder: Path, result: Record, experiment: str) -> Comparison:
    """The records that an experiment's results point to.

    Raises UsageError, with what is missing, for an arm or a record that is not there, a record that is not of its arm,
    arms with other seeds, runs of another config, text or machine.
    """
    files = result["runs"]
    if wrong := set(files) ^ set(ARMS[experiment]):
        raise UsageError(f"{experiment}: its arms are {', '.join(ARMS[experiment])}; check {sorted(wrong)[0]!r}")
    arms = read_records(folder, files, experiment)
    _check_seeds(experiment, arms)
    for arm, records in arms.items():
        _check_arm(experiment, arm, records)
    check_same(experiment, arms)
    return Comparison(experiment, arms, folder / "runs", _at_the_edge(experiment, result))


def read_records(folder: Path, files: Mapping[str, list[str]], experiment: str) -> dict[str, list[Record]]:
    """The records of each arm. UsageError if one is missing or damaged."""
    runs = folder / "runs"
    missing = [name for some in files.values() for name in some if not (runs / name).is_file()]
    if missing:
        raise UsageError(f"{experiment} misses {len(missing)} records, {missing[0]} first: run it again")
    return {arm: [read_record(runs / name) for name in some] for arm, some in files.items()}


def check_same(experiment: str, arms: Mapping[str, list[Record]]) -> None:
    """One config, machine and training text. A record made before the text was recorded says nothing about it."""
    _check_equal(experiment, arms, _config)
    _check_equal(experiment, arms, lambda record: {name: record["versions"][name] for name in MACHINE})
    known = {arm: [record for record in records if "data" in record] for arm, records in arms.items()}
    _check_equal(experiment, known, lambda record: {"training text": record["data"]})


def check_seeds(experiment: str, seeds: Sequence[int]) -> None:
    """At least two, none twice, none that learning rates were chosen on. Raises UsageError."""
    if len(seeds) < 2:
        raise UsageError(f"{experiment} has {len(seeds)} seed: an interval needs two at least, run it again")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"{experiment} has the seeds {list(seeds)}, one of them twice: run it again")
    if TUNING_SEED in seeds:
        raise UsageError(f"{experiment} has the seed {TUNING_SEED}, on which learning rates are chosen: run it again")


def _check_seeds(experiment: str, arms: Mapping[str, list[Record]]) -> None:
    seeds = {arm: [record["run"]["seed"] for record in records] for arm, records in arms.items()}
    first = next(iter(seeds))
    for arm, some in seeds.items():
        if some != seeds[first]:
            raise UsageError(f"{experiment}: {arm} has the seeds {some}, {first} has {seeds[first]}: run it again")
    check_seeds(experiment, seeds[first])


def _check_arm(experiment: str, arm: str, records: Sequence[Record]) -> None:
    """All of the arm's optimizer and settings, and of one learning rate."""
    own = ARMS[experiment][arm]
    expected = {"optimizer": own.optimizer, "settings": dict(own.settings), "lr": records[0]["run"]["lr"]}
    for record in records:
        for name, value in expected.items():
            if record["run"][name] != value:
                raise UsageError(
                    f"{experiment}: {arm} is of {name} {value}, seed {record['run']['seed']} has "
                    f"{record['run'][name]}: run it again"
                )


def _check_equal(experiment: str, arms: Mapping[str, list[Record]], described: Callable[[Record], Record]) -> None:
    """`described` gives the same of every record. Raises UsageError with the first thing that differs."""
    every = [(arm, described(record)) for arm, records in arms.items() for record in records]
    for arm, one in every:
        first, expected = every[0]
        for name in expected | one:
            if one.get(name) != expected.get(name):
                raise UsageError(
                    f"{experiment}: {arm} has {name} {one.get(name)}, {first} has {expected.get(name)}: run it again"
                )


def _config(record: Record) -> Record:
    return {name: value for name, value in record["run"].items() if name not in CHOSEN}


def _at_the_edge(experiment: str, result: Record) -> list[str]:
    if "tuning" not in result:
        raise UsageError(f"{experiment} misses the losses of its tuning: run it again, it repeats no run")
    return at_the_edge(result["learning_rates"], result["tuning"])
