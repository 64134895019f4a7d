"""One training run -> one record on disk, made once."""

import dataclasses
import io
import json
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from benchmarks.common import Record, forget_resident_peak, machine, resident_peak
from transformers import PrinterCallback, TrainerCallback, set_seed

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from blueberry.errors import UsageError
from blueberry.optim import build_optimizer
from blueberry.spectral.log import FOLDER as SPECTRAL_LOG
from blueberry.spectral.log import SpectralLog
from blueberry.training.data import DataArguments, PreparedData, prepare_data
from blueberry.training.evaluation import compute_metrics, preprocess_logits_for_metrics
from blueberry.training.run_folder import write_json
from blueberry.training.trainer import composed_optimizer
from trainer_callbacks import SpectralMetricsCallback, StepTimeCallback

CHECK_EVERY = 10  # steps between checks of the constraint
VALIDATION_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training run is made of: everything that decides its result. Equal runs have equal records."""

    model_name: str
    model: Mapping[str, Any]  # fields of BlueberryConfig
    dataset: str
    steps: int
    batch: int  # sequences a step
    length: int  # tokens of a sequence
    optimizer: str  # of BlueberryTrainingArguments
    lr: float  # of the arm's own optimizer: `adamw_lr` for adamw, else `muon_lr`
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # others of `build_optimizer`
    seed: int = 0  # of the initialization and of the order of the data
    evaluations: int = 1  # evenly spaced, the last one at the end
    spectral_logs: int = 0  # evenly spaced, besides those of the initial weights and of the first steps
    adamw_lr: float = 0.008  # of what Muon leaves to AdamW
    accumulation: int = 1  # micro-batches of a step
    bf16: bool = False  # autocast; weights and optimizer stay in float32

    @property
    def name(self) -> str:
        changes = "".join(f"-{name}={value}" for name, value in sorted(self.settings.items()))
        return f"{self.optimizer}{changes}-lr{self.lr:g}-{self.steps}x{self.batch}x{self.length}-seed{self.seed}"

    def with_(self, **changes: Any) -> "Run":
        """A copy with other fields; a name that is no field is one of `settings`."""
        fields = {field.name for field in dataclasses.fields(self)}
        settings = {name: value for name, value in changes.items() if name not in fields}
        changes = {name: value for name, value in changes.items() if name in fields}
        return dataclasses.replace(self, settings={**self.settings, **settings}, **changes)

    def described(self) -> Record:
        """All fields, as they are read from a record."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def path(self, folder: Path) -> Path:
        """Of the record in the folder of all runs; the spectral log lies beside it, without `.json`."""
        return folder / self.model_name / f"{self.name}.json"

    def logged_steps(self) -> list[int]:
        """Of the spectral log, after step 0: evenly spaced, and before the first of them, where spectra change
        fastest, the powers of two."""
        every = max(1, self.steps // self.spectral_logs)
        early = [2**power for power in range(every.bit_length()) if 2**power < every]
        return [*early, *range(every, self.steps + 1, every)]

    def data(self) -> PreparedData:
        """The windows to train and validate on; packed at the first call, cached for the others."""
        return _data(
            self.dataset, self.length, VALIDATION_BATCHES * self.batch * self.length, self.model["vocab_size"]
        )

    def arguments(self, folder: str) -> BlueberryTrainingArguments:
        """A constant batch, a log of every step, nothing saved."""
        learning_rates = {"adamw_lr": self.lr} if self.optimizer == "adamw" else {
            "muon_lr": self.lr, "adamw_lr": self.adamw_lr
        }  # fmt: skip
        micro = self.batch // self.accumulation
        return BlueberryTrainingArguments(
            folder, optimizer=self.optimizer, max_steps=self.steps, per_device_train_batch_size=micro,
            gradient_accumulation_steps=self.accumulation, per_device_eval_batch_size=micro, seed=self.seed,
            logging_steps=1, save_strategy="no", eval_strategy="steps",
            eval_steps=-(-self.steps // self.evaluations), report_to="none", disable_tqdm=True, bf16=self.bf16,
            **learning_rates,
        )  # fmt: skip


@cache
def _data(dataset: str, length: int, evaluated: int, vocabulary: int) -> PreparedData:
    arguments = DataArguments(dataset, max_length=length, max_validation_tokens=evaluated)
    return prepare_data(arguments, vocab_size=vocabulary, max_positions=length)


def record_of(run: Run, folder: Path, watch: Sequence[TrainerCallback] = ()) -> Record:
    """The record of a run: from `folder` if it was made before, else train, and keep it in one file.

    A record is written as a whole when the run is over, so that an interrupted experiment goes on with the run that
    was cut off and repeats none that was finished.
    """
    if (record := finished_record(run, folder)) is not None:
        return record
    path = run.path(folder)
    start = time.perf_counter()
    numbers = _train(run, path.with_suffix(""), watch)
    record = {
        "run": run.described(),
        **numbers,
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
    }
    write_json(path, record, indent=None)  # hundreds of losses
    return record


def finished_record(run: Run, folder: Path) -> Record | None:
    """The record; None if the run was not made yet. UsageError if another one has its name, or it saw other text.

    A record of before the text was recorded is taken as it is.
    """
    path = run.path(folder)
    if not path.is_file():
        return None
    record = read_record(path)
    if record["run"] != run.described():
        raise UsageError(f"{path} is of a run with another config: use another --output_dir, or remove it")
    if "data" in record and record["data"] != run.data().content:
        raise UsageError(
            f"--dataset {run.dataset}: its text is not that of {path}: use another --output_dir, or the text of then"
        )
    return record


def read_record(path: Path) -> Record:
    """A record on disk; a number that JSON has no word for was written as null and is NaN.

    UsageError if the file is damaged.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): remove it and run the experiment again") from error
    as_text = ("run", "versions", "data")
    return {name: value if name in as_text else _null_is_nan(value) for name, value in record.items()}


def _null_is_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _null_is_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_null_is_nan(one) for one in value]
    return math.nan if value is None else value


def spectral_log(record: Record, folder: Path) -> SpectralLog:
    """The spectral log of a finished run."""
    return SpectralLog(Run(**record["run"]).path(folder).with_suffix("") / SPECTRAL_LOG)


def _train(run: Run, kept: Path, watch: Sequence[TrainerCallback]) -> Record:
    """Losses and gradient norms of all steps, validation losses, times of a step's parts (medians, ms)."""
    forget_resident_peak()
    set_seed(run.seed)
    data = run.data()
    model = BlueberryForCausalLM(BlueberryConfig(**run.model))
    callbacks = [clock := StepTimeCallback(), health := Health(), *watch]
    if run.spectral_logs:
        milestones = [step * run.batch * run.length for step in run.logged_steps()]
        callbacks.append(SpectralMetricsCallback(token_milestones=milestones))
    with TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):  # the audit
        args = run.arguments(scratch)
        trainer = BlueberryTrainer(
            model, args, train_dataset=data.train, eval_dataset=data.validation, callbacks=callbacks,
            optimizers=(build_optimizer(model, args, **run.settings), None),
            compute_metrics=partial(compute_metrics, bytes_per_token=data.bytes_per_token),
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if run.spectral_logs:
            _keep(Path(scratch) / SPECTRAL_LOG, kept / SPECTRAL_LOG)
    history = trainer.state.log_history
    logs, evaluations = ([row for row in history if name in row] for name in ("loss", "eval_loss"))
    return {
        "eval_loss": evaluations[-1]["eval_loss"],
        "eval_accuracy": evaluations[-1]["eval_accuracy"],
        "eval_perplexity": evaluations[-1]["eval_perplexity"],
        "unigram_loss": data.unigram_loss,
        "data": data.content,
        "tokens": run.steps * run.batch * run.length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "time": {name: round(value, 2) for name, value in clock.summary(first=2).items()},
        "peak_memory_mib": round(resident_peak() / 2**20),
        "eval_steps": [row["step"] for row in evaluations],
        "eval_losses": [row["eval_loss"] for row in evaluations],
        "losses": [round(row["loss"], 5) for row in logs],
        "gradient_norms": [round(row["grad_norm"], 6) for row in logs],
        **health.numbers,
    }


def _keep(log: Path, place: Path) -> None:
    """Move a spectral log to its run."""
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(log, place)


class Health(TrainerCallback):
    """`numbers`: the largest constraint error of a run's checks, and the hidden matrices' singular values after it."""

    def __init__(self) -> None:
        self.numbers: Record = {"checks": 0, "violations": 0, "max_violation": {}}

    def on_step_end(self, args, state, control, optimizer, **kwargs) -> None:
        if state.global_step % CHECK_EVERY and state.global_step != state.max_steps:
            return
        report = composed_optimizer(optimizer).check_constraints()
        self.numbers["checks"] += 1
        self.numbers["violations"] += report["total_violations"]
        largest = self.numbers["max_violation"]
        for name, part in report["by_type"].items():
            largest[name] = float(np.maximum(largest.get(name, 0.0), part["max_violation"]))  # NaN stays

    def on_train_end(self, args, state, control, model, **kwargs) -> None:
        matrices = [p.detach() for name, p in model.named_parameters() if "_proj" in name]
        sigma = torch.cat([singular_values(matrix) for matrix in matrices])
        self.numbers |= {"sigma_min": sigma.min().item(), "sigma_max": sigma.max().item()}


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """In float64, flat; NaN of a matrix that is not finite, of which LAPACK gives none."""
    if not matrix.isfinite().all():
        return torch.full((1,), math.nan, dtype=torch.float64, device=matrix.device)
    return torch.linalg.svdvals(matrix.double()).flatten()


def versions() -> Record:
    """What a figure must be quoted with."""
    return {**machine(), "transformers": transformers.__version__, "datasets": datasets.__version__,
            "python": platform.python_version()}  # fmt: skip
