"""Runs as trials of an Optuna study: made once, by any number of workers, going on where an interruption cut them off.

The study lives in a database and the records in files; machines that share a study share the folder of the records
too: what is finished is read from there.
"""

import itertools
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import optuna
import torch
from benchmarks.common import Record
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import MedianPruner
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback

from blueberry.errors import UsageError, run_script

from .runs import Run, finished_record, record_of

HEARTBEAT = 10  # seconds; a trial without one for three of these was killed, and is tried again
FEWEST = 4  # trials before one may be pruned
FURTHEST = 3  # steps of a learning rate's grid that tuning goes beyond its start
Point = dict[str, Any]  # values of the parameters of one trial; "arm" names the run that they change

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would show the traceback of a bad argument
warnings.filterwarnings("ignore", category=ExperimentalWarning)  # of heartbeats


@dataclass(frozen=True)
class Laboratory:
    """Where runs are recorded, and by how many processes they are made."""

    folder: Path  # of runs/ and studies.sqlite
    storage: str | None = None  # URL of another database
    workers: int = 1

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def open_storage(self) -> RDBStorage:
        """Raises UsageError for a folder or a database that cannot be opened."""
        self._make_folder()
        url = self.storage or f"sqlite:///{self.folder / 'studies.sqlite'}"
        retry = RetryHeartbeatStaleTrialCallback(max_retry=2)
        try:
            return RDBStorage(
                url, heartbeat_interval=HEARTBEAT, grace_period=3 * HEARTBEAT, heartbeat_stale_trial_callback=retry
            )
        except (SQLAlchemyError, ImportError) as error:
            told = re.sub("//[^@/]*@", "//...@", url)  # without a password
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--storage {told}: {reason}; give a database's URL as SQLAlchemy writes it, and install its driver"
            ) from error

    def identity(self) -> str:
        """By which a study knows the folder of its records, wherever a machine has mounted it."""
        path = self.folder / ".laboratory"
        with FileLock(self.queue):
            if not path.is_file():
                path.write_text(uuid4().hex)
            return path.read_text()

    @property
    def queue(self) -> Path:
        """A lock: on SQLite two workers could take the same trial."""
        return self.folder / ".queue.lock"

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {self.folder}: {error.strerror}; name another folder") from error


def grid(**values: Iterable[Any]) -> list[Point]:
    """Every combination."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def run_points(
    name: str, arms: Mapping[str, Run], points: Sequence[Point], laboratory: Laboratory, prune: bool = False
) -> list[Record | None]:
    """The records of `points`, each a trial of the study `name`: what is finished is read, the rest is trained.

    With `prune`, a trial that at an evaluation is worse than the median of those before it ends there; its record is
    None. Raises UsageError when the study was made with other arms.
    """
    study = open_study(name, arms, laboratory)
    for point in points:
        study.enqueue_trial(point, skip_if_exists=True)
    while True:
        if waiting := len(_trials(study, TrialState.WAITING)):
            run_workers(_empty_queue, (name, arms, points, laboratory, prune), min(laboratory.workers, waiting))
        records = [finished_record(run_of(arms, point), laboratory.runs) for point in points]
        pruned = [trial.params for trial in _trials(study, TrialState.PRUNED)]
        missing = [point for point, record in zip(points, records, strict=True) if not record and point not in pruned]
        if not missing:
            return records
        _queue_again(study, missing)


def open_study(name: str, arms: Mapping[str, Run], laboratory: Laboratory, **settings: Any) -> optuna.Study:
    """The study of that name, made if it is not there; `settings` are `optuna.create_study`'s."""
    study = optuna.create_study(storage=laboratory.open_storage(), study_name=name, load_if_exists=True, **settings)
    home = laboratory.identity()
    if study.user_attrs.get("folder", home) != home:
        raise UsageError(
            f"--output_dir {laboratory.folder}: study {name} has its records in another folder: share that one among "
            "the machines, or take another --storage"
        )
    described = json.dumps({arm: asdict(run) for arm, run in arms.items()}, sort_keys=True)
    if study.user_attrs.setdefault("arms", described) != described:
        raise UsageError(
            f"study {name} in {laboratory.folder} was made with another config: use another --output_dir, or the "
            "arguments it was made with"
        )
    study.set_user_attr("arms", described)
    study.set_user_attr("folder", home)
    return study


def run_of(arms: Mapping[str, Run], point: Point) -> Run:
    """The run of an arm with the parameters of a point."""
    return arms[point["arm"]].with_(**{name: value for name, value in point.items() if name != "arm"})


def tuned_rates(
    name: str, arms: Mapping[str, Run], laboratory: Laboratory, factor: float = 2.0
) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """The learning rate of each arm with the least validation loss, and the losses of all that were tried.

    A geometric grid around the arm's own rate, which goes on beyond its better end, at most `FURTHEST` steps, until
    the best lies inside: then it has worse neighbours on both sides. `measures.at_the_edge` tells where it does not.
    """
    tried = {arm: [run.lr / factor, run.lr, run.lr * factor] for arm, run in arms.items()}
    for _ in range(FURTHEST + 1):
        points = [{"arm": arm, "lr": lr} for arm, rates in tried.items() for lr in rates]
        losses: dict[str, dict[float, float]] = {arm: {} for arm in arms}
        for point, record in zip(points, run_points(name, arms, points, laboratory), strict=True):
            losses[point["arm"]][point["lr"]] = loss_of(record)
        best = {arm: min(some, key=some.get) for arm, some in losses.items()}
        beyond = {arm: _beyond(rates, best[arm], factor) for arm, rates in tried.items()}
        if not any(beyond.values()):
            break
        tried = {arm: rates + beyond[arm] for arm, rates in tried.items()}
    return best, losses


def _beyond(rates: Sequence[float], best: float, factor: float) -> list[float]:
    """The next rate of the grid, where the best is at its end."""
    if best == min(rates):
        return [best / factor]
    return [best * factor] if best == max(rates) else []


def loss_of(record: Record) -> float:
    """Validation loss; infinite where training diverged."""
    return math.inf if math.isnan(record["eval_loss"]) else record["eval_loss"]


def run_workers(target: Callable[..., None], arguments: tuple, workers: int) -> None:
    """Call `target(*arguments)` in this process, or in several that share the processor's cores."""
    if workers == 1:
        return target(*arguments)
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = get_context("spawn")
    processes = [context.Process(target=_worker, args=(threads, target, *arguments)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise UsageError(f"a worker ended with status {failed[0]}: its message is above")


def _worker(threads: int, target: Callable[..., None], *arguments: Any) -> None:
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    run_script(lambda: target(*arguments))


def _empty_queue(
    name: str, arms: Mapping[str, Run], points: Sequence[Point], laboratory: Laboratory, prune: bool
) -> None:
    study = optuna.load_study(
        study_name=name, storage=laboratory.open_storage(), sampler=RandomSampler(), pruner=MedianPruner(FEWEST)
    )
    queue = FileLock(laboratory.queue)

    def objective(trial: optuna.Trial) -> float:
        queue.release()
        point = {key: _suggested(trial, key, value, arms) for key, value in points[0].items()}
        if point not in points:  # another machine took the last one from the queue just before
            raise optuna.TrialPruned
        return trained(trial, run_of(arms, point), laboratory, prune)

    while True:
        queue.acquire()
        if not _trials(study, TrialState.WAITING):
            return queue.release()
        study.optimize(objective, n_trials=1)


def trained(trial: optuna.Trial, run: Run, laboratory: Laboratory, prune: bool) -> float:
    """The validation loss of a trial's run, told to the user."""
    record = record_of(run, laboratory.runs, [Pruning(trial)] if prune else [])
    told = ", ".join(f"{name} {value}" for name, value in trial.params.items())
    print(f"{trial.study.study_name}: {told}: validation loss {record['eval_loss']:.4f}, {record['seconds']:.0f} s",
          flush=True)  # fmt: skip
    return loss_of(record)


class Pruning(TrainerCallback):
    """Ends a run that at one of its evaluations is worse than the median of the trials before it."""

    def __init__(self, trial: optuna.Trial):
        self.trial = trial

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        self.trial.report(metrics["eval_loss"], state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def _end_with(parent: BaseProcess) -> None:
    """A killed experiment must not leave its workers behind."""
    parent.join()
    os._exit(1)


def _suggested(trial: optuna.Trial, name: str, example: Any, arms: Mapping[str, Run]) -> Any:
    """The queued value; ranges are those that every trial of the study must share."""
    if name == "arm":
        return trial.suggest_categorical(name, sorted(arms))
    if isinstance(example, int):
        return trial.suggest_int(name, 0, 2**31)
    return trial.suggest_float(name, 0, 1e6)


def _queue_again(study: optuna.Study, points: Sequence[Point]) -> None:
    """Queue the points whose trial failed or was killed, or whose record is gone; wait for those at work elsewhere."""
    fail_stale_trials(study)
    running = [trial.params for trial in _trials(study, TrialState.RUNNING)]
    if not _trials(study, TrialState.WAITING):  # as after a retry of a stale one
        for point in points:
            if point not in running:
                study.enqueue_trial(point)
    if not _trials(study, TrialState.WAITING):
        time.sleep(HEARTBEAT)


def _trials(study: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(state,))
