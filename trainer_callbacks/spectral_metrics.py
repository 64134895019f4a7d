"""SpectralMetricsCallback: spectra of weights and updates while any model trains in any transformers Trainer."""

import logging
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from blueberry.errors import UsageError
from blueberry.spectral.analysis import analyze
from blueberry.spectral.log import FOLDER, SpectralLog
from blueberry.spectral.metrics import Row
from blueberry.spectral.names import METRICS, matrix_name

from .spectral_board import SpectralBoard
from .tensorboard import FOLDER as TENSORBOARD_FOLDER
from .tensorboard import TensorBoardCallback, open_writer

logger = logging.getLogger(__name__)

# One for all runs of the process: a run resumed after an exception rewinds its log only when the worker has written
# what the broken run left it. The interpreter waits for it at exit.
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="spectral")


def log_schedule(max_steps: int, logs: int) -> set[int]:
    """Steps to log at: 0, the powers of four below the spacing of `logs` equal intervals, and those intervals' ends.

    Spectra move fastest at the start. Depends on nothing but its arguments, so a resumed run logs the same steps.
    """
    spacing = max(1, math.ceil(max_steps / logs))
    early = {4**i for i in range(spacing.bit_length()) if 4**i < spacing}
    return {0, max_steps} | early | set(range(spacing, max_steps, spacing))


def tracked_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices and stacks of matrices of a model worth tracking, by parameter name.

    All 2-D and 3-D parameters inside numbered layers, or, in a model without numbered layers, all of them; never
    embeddings and convolutions. Routers count, being matrices.
    """
    skipped = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | _ConvNd)
        for p in module.parameters(recurse=False)
    }
    matrices = {n: p for n, p in model.named_parameters() if p.ndim in (2, 3) and id(p) not in skipped}
    layered = {name: p for name, p in matrices.items() if matrix_name(name).layer is not None}
    return layered or matrices


class SpectralMetricsCallback(TrainerCallback):
    """Log the spectral metrics of every weight matrix, and of the update of that step, into the run's spectral log.

    Args:
        every_n_steps: log at multiples of it. By default `logs_per_run` logs, log-spaced at first (`log_schedule`).
            The initial weights and the last step are logged in any case.
        logs_per_run: about how many logs a run takes when `every_n_steps` is not given.
        metrics: names of the metrics to keep (default: all; the others are null).
        layers, projections: which to track (default: all), e.g. `layers=[0, 11], projections=["q_proj"]`.
        top_k: how many of the largest singular values to put in their own column.
        k: dimension of the top subspaces that `update_alignment` and `update_energy_in_top_k` compare.
        tensorboard: the run's TensorBoardCallback, to share its writer; without it, one is opened in
            `<output_dir>/runs`.
        workers: threads that compute (default: half the cores, at most 8).

    The rows of a step go into `<output_dir>/spectral_log`; see `blueberry.spectral.log` for the columns. Metrics are
    computed beside training, from copies that exist only while a log is taken. A checkpoint is written after the rows
    of its step; a resumed run drops the rows that came after its checkpoint; a run that starts at step 0 starts the
    log over. Rank 0 writes. Updates are differences of the weights around one optimizer step.

    Raises UsageError (before training) for unknown metrics, layers or projections, and for models without matrices.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        logs_per_run: int = 8,
        metrics: Iterable[str] | None = None,
        layers: Iterable[int] | None = None,
        projections: Iterable[str] | None = None,
        top_k: int = 10,
        k: int = 5,
        tensorboard: TensorBoardCallback | None = None,
        workers: int | None = None,
    ):
        _require_positive(every_n_steps=every_n_steps, logs_per_run=logs_per_run, top_k=top_k, k=k, workers=workers)
        self.every_n_steps, self.logs_per_run = every_n_steps, logs_per_run
        self.metrics = None if metrics is None else set(metrics)
        _require_known("metric", self.metrics, set(METRICS))
        self.layers = None if layers is None else set(layers)
        self.projections = None if projections is None else set(projections)
        self.top_k, self.k = top_k, k
        self.tensorboard = tensorboard
        self.workers = workers or min(8, max(1, (os.cpu_count() or 1) // 2))
        self.failures: list[str] = []
        self._before: dict[str, Tensor] = {}
        self._pending: Future | None = None
        self._last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Choose the matrices, put the log into the state of the checkpoint, and log the initial weights."""
        self.matrices = self._choose(tracked_matrices(model))
        self.steps = self._schedule(state.max_steps)
        self._sharded = any(isinstance(p, DTensor) for p in self.matrices.values())
        self._last_step = state.global_step
        if state.is_world_process_zero:
            self.log = SpectralLog(Path(args.output_dir) / FOLDER)
            self.board = SpectralBoard(self._writer(args, state), self.matrices)
            _WORKER.submit(self._rewind, state.global_step).result()
        if state.global_step == 0:
            self._record(0, state, self._copies(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the weights when the step about to be taken is to be logged."""
        self._before = self._copies(state) if state.global_step + 1 in self.steps else {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the weights again and hand both copies to the worker."""
        if state.global_step + 1 in self.steps:
            before, self._before = self._before, {}
            self._record(state.global_step + 1, state, self._copies(state), before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the worker before a checkpoint is written: it must not precede the rows of its steps."""
        if control.should_save:
            self._join()

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait: `save_strategy="best"` decides on a checkpoint after this event."""
        if args.save_strategy == SaveStrategy.BEST:
            self._join()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the last weights if training stopped early, wait, compact the log and say what went wrong."""
        best_model_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if state.global_step > self._last_step and not best_model_loaded:
            self._record(state.global_step, state, self._copies(state))
        self._join()
        if not state.is_world_process_zero:
            return
        self._guarded("compaction", self.log.compact)
        for failure in self.failures:
            logger.warning("spectral log: %s", failure)

    def close(self) -> None:
        """Wait for the log under way, where training ended before its end."""
        self._join()

    def _choose(self, matrices: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        if not matrices:
            raise UsageError(
                "the model has no matrices to track: no parameter with 2 or 3 dimensions; drop the callback"
            )
        names = {parameter: matrix_name(parameter) for parameter in matrices}
        _require_known("layer", self.layers, {name.layer for name in names.values()})
        _require_known("projection", self.projections, {name.projection for name in names.values()})
        return {
            parameter: matrices[parameter]
            for parameter, name in names.items()
            if (self.layers is None or name.layer in self.layers)
            and (self.projections is None or name.projection in self.projections)
        }

    def _schedule(self, max_steps: int) -> set[int]:
        if self.every_n_steps is None:
            return log_schedule(max_steps, self.logs_per_run)
        return {max_steps, *range(0, max_steps, self.every_n_steps)}

    def _rewind(self, step: int) -> None:
        """Put log and heatmaps into the state that they had at `step`."""
        if step == 0:
            self.log.clear()
            return
        self.log.truncate(after_step=step)
        rows = self.log.table().to_pylist() if self.log.parts() else []
        for earlier in sorted({row["step"] for row in rows}):
            self.board.remember(earlier, [row for row in rows if row["step"] == earlier])

    def _copies(self, state: TrainerState) -> dict[str, Tensor]:
        """Copies on the CPU. Sharded parameters are gathered by all ranks together; only rank 0 keeps them."""
        if not state.is_world_process_zero and not self._sharded:
            return {}
        copies = {}
        for name, parameter in self.matrices.items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if state.is_world_process_zero:
                copies[name] = whole.detach().to("cpu", copy=True)
        return copies

    def _record(
        self, step: int, state: TrainerState, after: dict[str, Tensor], before: dict[str, Tensor] | None = None
    ) -> None:
        """Hand one log to the worker; at most one is under way, so that copies do not pile up."""
        self._last_step = step
        self._join()
        if state.is_world_process_zero:
            tokens = state.num_input_tokens_seen or (0 if step == 0 else None)
            self._pending = _WORKER.submit(self._work, step, tokens, after, before)

    def _join(self) -> None:
        """Wait for the log under way; an error in it is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _work(self, step: int, tokens: int | None, after: dict[str, Tensor], before: dict[str, Tensor] | None) -> None:
        """Compute and write the rows of one step (in the worker thread)."""
        updates = {name: after[name].float() - old.float() for name, old in before.items()} if before else None
        rows = analyze(after, updates, top_k=self.top_k, k=self.k, updated=True, workers=self.workers)
        rows = [self._keep({"step": step, "tokens": tokens} | row) for row in rows]
        self._guarded(f"step {step}", lambda: self.log.append(rows))
        self.board.write(step, rows)

    def _keep(self, row: Row) -> Row:
        dropped = set() if self.metrics is None else set(METRICS) - self.metrics
        return {name: value for name, value in row.items() if name not in dropped}

    def _guarded(self, what: str, write: Callable[[], None]) -> None:
        """A full disk costs a log, not the training run."""
        try:
            write()
        except OSError as error:
            self.failures.append(f"{what}: could not write: {error}")

    def _writer(self, args: TrainingArguments, state: TrainerState) -> SummaryWriter:
        if self.tensorboard is not None:
            return self.tensorboard.writer(args, state)
        return open_writer(Path(args.output_dir) / TENSORBOARD_FOLDER, state.global_step)


def _require_positive(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: must be at least 1")


def _require_known(kind: str, wanted: set | None, known: set) -> None:
    unknown = sorted(wanted - known, key=str) if wanted else []
    if unknown:
        raise UsageError(f"unknown {kind} {unknown[0]!r}; there are {', '.join(map(str, sorted(known, key=str)))}")
