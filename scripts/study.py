"""What the experiments share: one training run -> one record on disk, made once; paired statistics over seeds."""

import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import transformers
from benchmarks.common import Record, machine
from scipy import stats
from transformers import PrinterCallback, TrainerCallback, set_seed

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from blueberry.training.data import PreparedData
from blueberry.training.run_folder import write_json
from trainer_callbacks import StepTimeCallback

FURTHEST = 3  # doublings or halvings of a learning rate that tuning tries beyond the start


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training run is made of: everything that decides its result. Equal runs have equal records."""

    model: Mapping[str, Any]  # fields of BlueberryConfig
    dataset: str
    steps: int
    batch: int  # sequences a step
    length: int  # tokens of a sequence
    seed: int  # of the initialization and of the order of the data
    optimizer: str
    lr: float  # of the arm's own optimizer: `adamw_lr` for adamw, else `muon_lr`
    adamw_lr: float = 0.008  # of what Muon leaves to AdamW

    @property
    def name(self) -> str:
        return f"{self.optimizer}-lr{self.lr:g}-{self.steps}x{self.batch}x{self.length}-seed{self.seed}"

    def arguments(self, folder: str) -> BlueberryTrainingArguments:
        """A constant batch, a log of every step, one evaluation at the end, nothing saved."""
        learning_rates = {"adamw_lr": self.lr} if self.optimizer == "adamw" else {
            "muon_lr": self.lr, "adamw_lr": self.adamw_lr
        }  # fmt: skip
        return BlueberryTrainingArguments(
            folder, optimizer=self.optimizer, max_steps=self.steps, per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.batch, seed=self.seed, logging_steps=1, eval_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, **learning_rates,
        )  # fmt: skip


def record_of(run: Run, data: PreparedData, folder: Path, watch: Sequence[TrainerCallback] = ()) -> Record:
    """The record of a run: from `folder` if it was made before, else train, and keep it in one file.

    A record is written as a whole when the run is over, so that an interrupted study goes on with the run that was cut
    off and repeats none that was finished. What the callbacks of `watch` hold in `.numbers` goes in too.
    """
    path = folder / f"{run.name}.json"
    settings = json.loads(json.dumps(dataclasses.asdict(run)))
    if path.is_file():
        record = json.loads(path.read_text())
        if record["run"] == settings:
            return record
    start = time.perf_counter()
    numbers = train(run, data, watch)
    record = {"run": settings, **numbers, "seconds": round(time.perf_counter() - start, 2), "versions": versions()}
    write_json(path, record)
    return record


def train(run: Run, data: PreparedData, watch: Sequence[TrainerCallback]) -> Record:
    """Losses and gradient norms of all steps, validation loss, times of a step's parts (medians, ms)."""
    set_seed(run.seed)
    model = BlueberryForCausalLM(BlueberryConfig(**run.model))
    callbacks = [clock := StepTimeCallback(), *watch]
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):  # for the optimizer's audit
        args = run.arguments(scratch)
        trainer = BlueberryTrainer(
            model, args, train_dataset=data.train, eval_dataset=data.validation, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
    logs = [row for row in trainer.state.log_history if "loss" in row]
    numbers = {
        "eval_loss": eval_loss,
        "unigram_loss": data.unigram_loss,
        "tokens": run.steps * run.batch * run.length,
        "time": {name: round(value, 2) for name, value in clock.summary(first=2).items()},
        "losses": [round(row["loss"], 5) for row in logs],
        "gradient_norms": [round(row["grad_norm"], 6) for row in logs],
    }
    for callback in watch:
        numbers |= callback.numbers
    return numbers


def tuned(arm: Run, data: PreparedData, folder: Path, factor: float = 2.0) -> float:
    """The learning rate with the least validation loss, by one run for each rate that is tried.

    A walk on a geometric grid: from the arm's own rate to the better neighbour, until both are worse, or for
    `FURTHEST` moves.
    """
    losses: dict[float, float] = {}
    best = arm.lr
    for _ in range(FURTHEST + 1):
        for lr in (best, best / factor, best * factor):
            if lr not in losses:
                losses[lr] = record_of(dataclasses.replace(arm, lr=lr), data, folder)["eval_loss"]
        start, best = best, min(losses, key=lambda lr: (math.isnan(losses[lr]), losses[lr]))
        if best == start:
            break
    return best


def paired(values: Sequence[float], others: Sequence[float]) -> Record:
    """Mean difference `values - others` over seeds, its 95% interval and p-value by a paired t-test."""
    test = stats.ttest_rel(values, others)
    interval = test.confidence_interval(0.95)
    difference = sum(a - b for a, b in zip(values, others, strict=True)) / len(values)
    return {"difference": difference, "interval": [float(interval.low), float(interval.high)],
            "p": float(test.pvalue), "n": len(values)}  # fmt: skip


def versions() -> Record:
    """What a figure must be quoted with."""
    return {**machine(), "transformers": transformers.__version__, "datasets": datasets.__version__,
            "python": platform.python_version()}  # fmt: skip
