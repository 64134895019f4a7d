"""The results of experiments, read back; comparisons of what does not belong together are refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from benchmarks.common import Record

from blueberry.errors import UsageError

from .runs import Run, spectral_log

MAY_DIFFER = ("optimizer", "lr", "settings", "seed")  # between the runs of one comparison


@dataclass(frozen=True)
class Comparison:
    """The runs of the arms of one experiment on one model, the same seeds in each."""

    arms: Mapping[str, list[Record]]
    runs: Path  # the folder of all runs

    @property
    def n(self) -> int:
        return len(next(iter(self.arms.values())))

    @property
    def commit(self) -> str:
        return next(iter(self.arms.values()))[0]["versions"]["commit"]

    @cached_property
    def logs(self) -> dict[str, list[pd.DataFrame]]:
        """Arm -> the spectral log of each seed."""
        return {arm: [spectral_log(record, self.runs).read() for record in records]
                for arm, records in self.arms.items()}  # fmt: skip

    @property
    def has_logs(self) -> bool:
        records = [record for some in self.arms.values() for record in some]
        return all(spectral_log(record, self.runs).parts() for record in records)


def files_of(arms: Mapping[str, list[Record]]) -> dict[str, list[str]]:
    """Arm -> its records' files in the folder of all runs: what an experiment's results point to."""
    runs = {arm: [Run(**record["run"]) for record in records] for arm, records in arms.items()}
    return {arm: [str(run.path(Path())) for run in some] for arm, some in runs.items()}


def read_results(folder: Path, experiment: str) -> Record | None:
    """What an experiment wrote; None if it was not run."""
    path = folder / experiment / f"{experiment}_results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_comparison(folder: Path, files: Mapping[str, list[str]], experiment: str) -> Comparison:
    """The records that an experiment's results point to.

    Raises UsageError, with what is missing, for a record that is not there, arms with other seeds, runs of another
    config.
    """
    runs = folder / "runs"
    missing = [name for some in files.values() for name in some if not (runs / name).is_file()]
    if missing:
        raise UsageError(f"{experiment} misses {len(missing)} records, {missing[0]} first: run it again")
    arms = {arm: [json.loads((runs / name).read_text()) for name in some] for arm, some in files.items()}
    seeds = {arm: [record["run"]["seed"] for record in records] for arm, records in arms.items()}
    first = next(iter(seeds))
    for arm, some in seeds.items():
        if some != seeds[first]:
            raise UsageError(f"{experiment}: {arm} has the seeds {some}, {first} has {seeds[first]}: run it again")
    expected = _config(arms[first][0])
    for arm, config in ((arm, _config(record)) for arm, records in arms.items() for record in records):
        if config != expected:
            name = next(name for name in config if config[name] != expected[name])
            raise UsageError(
                f"{experiment}: {arm} has {name} {config[name]}, {first} has {expected[name]}: run it again"
            )
    return Comparison(arms, runs)


def _config(record: Record) -> Record:
    return {name: value for name, value in record["run"].items() if name not in MAY_DIFFER}
