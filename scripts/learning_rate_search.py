"""Search for the learning rate of an optimizer with Optuna.

    python scripts/learning_rate_search.py --optimizer muon --low 0.002 --high 0.2 --sampler grid --trials 7
    python scripts/learning_rate_search.py --optimizer muon --low 0.002 --high 0.2 --sampler tpe --workers 2

On the first model of the scale, in runs of a third of its steps. A trial that at one of its evaluations is worse than
the median of those before it is dropped. The same command goes on where an interrupted one stopped, with a larger
--trials `tpe` adds some; with --storage several machines work on one study. To look at it: `pip install
optuna-dashboard`, then `optuna-dashboard sqlite:///results/experiments/SCALE/learning_rate_search/studies.sqlite`.
"""

import argparse
import dataclasses

import numpy as np
import optuna
from benchmarks.common import Record
from experiments import figures
from experiments.measures import markdown
from experiments.runs import Run
from experiments.scales import plan_of, plan_parser
from experiments.sweeps import FEWEST, Laboratory, open_study, run_points, run_workers, trained
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from blueberry.errors import UsageError, run_script
from blueberry.optim.build import OPTIMIZERS
from blueberry.training.run_folder import write_json

NAME = "learning_rate_search"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
EVALUATIONS = 4


def main() -> None:
    arguments = parse_arguments()
    plan = plan_of(arguments)
    folder = plan.folder(NAME)
    laboratory = dataclasses.replace(plan.laboratory, folder=folder)  # its runs are evaluated more often
    model = next(iter(plan.scale.models))
    run = plan.short(model, arguments.optimizer, arguments.low, evaluations=EVALUATIONS)
    name = f"{NAME}-{arguments.optimizer}-{arguments.sampler}"
    ends = arguments.low, arguments.high
    if arguments.sampler == "grid":
        points = [{"arm": run.optimizer, "lr": float(lr)} for lr in np.geomspace(*ends, arguments.trials)]
        run_points(name, {run.optimizer: run}, points, laboratory, prune=True)
    else:
        search(name, run, ends, arguments.trials, laboratory)
    study = optuna.load_study(study_name=name, storage=laboratory.open_storage())
    results = summary(study)
    write_json(folder / f"{name}.json", results)
    finished = {trial["lr"]: trial["loss"] for trial in results["trials"] if trial["state"] == "COMPLETE"}
    figures.save(figures.learning_rates({arguments.optimizer: finished}, model), folder / f"{name}.png")
    rows = [[trial["lr"], trial["loss"], trial["state"].lower()] for trial in results["trials"]]
    print("\n" + markdown(["learning rate", "validation loss", "trial"], rows))
    print(f"best learning rate {results['best']['lr']:g}, validation loss {results['best']['loss']:.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = plan_parser(__doc__)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="muon")
    parser.add_argument("--sampler", choices=["grid", "tpe"], default="tpe")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--low", type=float, default=0.001, help="lowest learning rate")
    parser.add_argument("--high", type=float, default=0.1, help="highest learning rate")
    arguments = parser.parse_args()
    if not 0 < arguments.low < arguments.high:
        raise UsageError(f"--low {arguments.low} --high {arguments.high}: 0 < low < high is needed")
    if arguments.trials < 2:
        raise UsageError(f"--trials {arguments.trials}: at least 2")
    return arguments


def search(name: str, run: Run, ends: tuple[float, float], trials: int, laboratory: Laboratory) -> None:
    """Trials that Optuna's TPE sampler chooses, until `trials` of the study have ended."""
    study = open_study(name, {run.optimizer: run}, laboratory)
    left = trials - len(study.get_trials(deepcopy=False, states=ENDED))
    if left > 0:
        run_workers(_search, (name, run, ends, trials, laboratory), min(left, laboratory.workers))


def _search(name: str, run: Run, ends: tuple[float, float], trials: int, laboratory: Laboratory) -> None:
    sampler = TPESampler(constant_liar=True)  # unseeded: workers with one seed would try the same rates
    study = optuna.load_study(
        study_name=name, storage=laboratory.open_storage(), pruner=MedianPruner(FEWEST), sampler=sampler
    )

    def objective(trial: optuna.Trial) -> float:
        return trained(trial, run.with_(lr=trial.suggest_float("lr", *ends, log=True)), laboratory, prune=True)

    study.optimize(objective, callbacks=[MaxTrialsCallback(trials, states=ENDED)])


def summary(study: optuna.Study) -> Record:
    """All trials that ended, from the best to the worst; the loss of a pruned one is that of its last evaluation."""
    trials = [
        {"lr": trial.params["lr"], "loss": trial.value, "state": trial.state.name}
        for trial in study.get_trials(states=ENDED)
    ]
    trials.sort(key=lambda trial: (trial["state"] != "COMPLETE", trial["loss"]))
    return {"best": trials[0], "trials": trials}


if __name__ == "__main__":
    run_script(main)
