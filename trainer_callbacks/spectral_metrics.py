"""SpectralMetricsCallback: spectra of weights and updates while any model trains in any transformers Trainer."""

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from blueberry.errors import UsageError
from blueberry.spectral.analysis import analyze
from blueberry.spectral.log import FOLDER, SpectralLog
from blueberry.spectral.metrics import BY_DEFINITION, ZERO_UPDATE, Row, add_reason, only
from blueberry.spectral.names import (
    DEFAULT_METRICS,
    METRICS,
    PEAK_METRICS,
    POWER_LAW,
    UPDATE_METRICS,
    matrix_name,
)  # fmt: skip
from blueberry.spectral.tracked import Selector, Tracked, check_selectors, tracked_matrices

from .cadence import CONTENTION, Budget, Milestones, TimedExecutor, log_schedule
from .peaks import Key, Peaks
from .spectral_board import SpectralBoard
from .tensorboard import FOLDER as TENSORBOARD_FOLDER
from .tensorboard import RunWriter, TensorBoardCallback

logger = logging.getLogger(__name__)

DEFAULT_OVERHEAD = 0.02
# One for all runs of the process: a run resumed after an exception rewinds its log only when the worker has written
# what the broken run left it. The interpreter waits for it at exit.
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="spectral-log")


class SpectralMetricsCallback(TrainerCallback):
    """Log the spectral metrics of every weight matrix, and of the update of that step, into the run's spectral log.

    Args:
        every_n_steps: log at multiples of it. By default `logs_per_run` logs, log-spaced at first (`log_schedule`).
            The initial weights and the last step are logged in any case.
        logs_per_run: about how many logs a run takes when no other cadence is given.
        token_milestones: log when these numbers of tokens have been seen, instead (needs
            `include_num_input_tokens_seen`).
        max_overhead: what tracking may cost, as a share of the time in training steps; the CPU seconds of the worker
            threads count in full. Logs that do not fit are left out. By default 0.02, unless `every_n_steps` or
            `token_milestones` asks for certain logs: those are taken whatever they cost. The initial weights, the
            first and the last step are logged in any case. With a budget the steps logged depend on the clock.
        metrics: names of the metrics to keep (default: all but `power_law_exponent`; the others are null).
        layers, projections: which to track (default: all), e.g. `layers=[0, 11], projections=["q_proj"]`.
        modules: regular expressions searched in parameter names, or types of modules, that choose what to track
            (default: trainable matrices in numbered layers), e.g. `modules=[nn.Embedding, r"attn\\."]`.
        top_k: how many of the largest singular values to put in their own column.
        k: dimension of the top subspaces that `update_alignment` and `update_energy_in_top_k` compare.
        exact: decompose by SVD in fp64; the default is several times faster and agrees to 1e-3 relative.
        tensorboard: the run's TensorBoardCallback, to share its writer; without it, one is opened in
            `<output_dir>/runs`.
        workers: threads that compute (default: half the cores, at most 8).

    The rows of a step go into `<output_dir>/spectral_log`; see `blueberry.spectral.log` for the columns. Matrices of
    fused projections are tracked one by one, LoRA adapters as the product BA. Metrics are computed beside training,
    from copies that exist only while a log is taken. A checkpoint is written after the rows of its step; a resumed run
    drops the rows that came after its checkpoint; a run that starts at step 0 starts the log over. Rank 0 writes.
    Updates are differences of the weights around one optimizer step. After training, `summary()` tells what was
    logged, what it cost and what went wrong.

    `log_through(trainer)` sends the scalars to everything that `report_to` names as well.

    Raises UsageError (before training) for unknown metrics, layers, projections or modules, and for models without
    matrices.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        logs_per_run: int = 8,
        token_milestones: Sequence[int] | None = None,
        max_overhead: float | None = None,
        metrics: Iterable[str] | None = None,
        layers: Iterable[int] | None = None,
        projections: Iterable[str] | None = None,
        modules: Iterable[Selector] | None = None,
        top_k: int = 10,
        k: int = 5,
        exact: bool = False,
        tensorboard: TensorBoardCallback | None = None,
        workers: int | None = None,
    ):
        _require_positive(every_n_steps=every_n_steps, logs_per_run=logs_per_run, top_k=top_k, k=k, workers=workers,
                          max_overhead=max_overhead, **{"token_milestones": min(token_milestones or [1])})  # fmt: skip
        if every_n_steps is not None and token_milestones is not None:
            raise UsageError(f"every_n_steps={every_n_steps} and token_milestones exclude each other: give one")
        self.every_n_steps, self.logs_per_run = every_n_steps, logs_per_run
        self.token_milestones = None if token_milestones is None else list(token_milestones)
        is_default_cadence = every_n_steps is None and token_milestones is None
        self.max_overhead = DEFAULT_OVERHEAD if max_overhead is None and is_default_cadence else max_overhead
        self.metrics = set(DEFAULT_METRICS if metrics is None else metrics)
        _require_known("metric", self.metrics, set(METRICS))
        self.layers = None if layers is None else set(layers)
        self.projections = None if projections is None else set(projections)
        self.modules = None if modules is None else list(modules)
        self.top_k, self.k, self.exact = top_k, k, exact
        self.tensorboard = tensorboard
        self.workers = workers or min(8, max(1, (os.cpu_count() or 1) // 2))
        self._failures: dict[str, list[str]] = defaultdict(list)  # error -> what could not be written
        self._trainer: Trainer | None = None
        self._before: dict[str, Tensor] | None = None
        self._pending: Future | None = None
        self._finished: list[tuple[int, dict[str, float]]] = []  # scalars on their way to Trainer.log

    def log_through(self, trainer: Trainer) -> "SpectralMetricsCallback":
        """Pass the scalars on to `trainer.log`, and so to wandb, trackio, mlflow or whatever `report_to` names."""
        self._trainer = trainer
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Choose the matrices, put the log into the state of the checkpoint, and log the initial weights."""
        self._start(args, state, model)
        with self._budget.charged():
            if state.is_world_process_zero:
                self._open(args, state)
            if state.global_step == 0:
                self._record(0, state, self._copies(state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the step."""
        self._step_begin, self._spent_before = time.perf_counter(), self._budget.spent_in_training

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the norms; copy the weights when the step about to be taken is to be logged."""
        with self._budget.charged():
            if self._peaks is not None:
                self._peaks.update()
            self._before = None
            if self._is_due(state):
                self._before = self._copies(state) if self._wants_updates else {}

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Copy the weights again and hand both copies to the worker."""
        if self._before is not None:
            before, self._before = self._before, None
            with self._budget.charged():
                after = self._copies(state)
            stands_still = optimizer is not None and not any(group["lr"] for group in optimizer.param_groups)
            expected = BY_DEFINITION | ({ZERO_UPDATE} if stands_still else set())  # the first step of a warm-up
            self._record(state.global_step + 1, state, after, before, expected)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the worker before a checkpoint is written (it must not precede the rows of its steps) and before
        the trackers end the run; pass on what is finished."""
        own = self._budget.spent_in_training - self._spent_before
        self._budget.count_step(time.perf_counter() - self._step_begin - own)
        if control.should_save:
            self._before_checkpoint(state)
        elif control.should_training_stop or state.global_step >= state.max_steps:
            self._join()
        self._pass_on()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait: a checkpoint may be written now."""
        if control.should_save:
            self._before_checkpoint(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait: `save_strategy="best"` decides on a checkpoint after this event."""
        if args.save_strategy == SaveStrategy.BEST:
            self._before_checkpoint(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the peaks for each checkpoint that is still there."""
        if self._peaks is None:
            return
        for path in self.log.path.glob(".peaks-*.json"):
            step = path.stem.partition("-")[2]
            if not (Path(args.output_dir) / f"checkpoint-{step}").exists():
                path.unlink()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the last weights if training stopped early, wait, compact the log and say what went wrong."""
        best_model_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if state.global_step > self._last_step and not best_model_loaded:
            with self._budget.charged():
                copies = self._copies(state)
            self._record(state.global_step, state, copies)
        self._join()
        self._pass_on()
        self._pool.shutdown()
        if not state.is_world_process_zero:
            return
        with self._budget.charged():
            self._guarded("compaction", self.log.compact)
        logger.info("%s", self.summary())
        for failure in self._troubles():
            logger.warning("spectral log: %s", failure)

    def close(self) -> None:
        """Wait for the log under way, where training ended before its end."""
        self._join()

    @property
    def logs(self) -> int:
        """How many logs were taken."""
        return self._logs

    @property
    def seconds_spent(self) -> float:
        """What they cost: seconds of the training thread, and CPU seconds of the workers."""
        return self._budget.spent

    def summary(self) -> str:
        """What was logged, what it cost, and what went wrong, in a few lines."""
        share = self.seconds_spent / max(self._budget.training_seconds, 1e-9)
        lines = [
            f"spectral log: {self.logs} log{'' if self.logs == 1 else 's'} of {len(self._names)} matrices and stacks, "
            f"{self.seconds_spent:.1f} s of copying and computing ({share:.1%} of the time in training steps)"
        ]
        if self._left_out:
            lines.append(f"{self._left_out} logs were left out to keep to max_overhead={self.max_overhead}")
        return "; ".join(lines + self._troubles())

    def _start(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if self.token_milestones is not None and args.include_num_input_tokens_seen in (False, "no"):
            raise UsageError("token_milestones need include_num_input_tokens_seen=True in the training arguments")
        self._tracked = self._choose(model)
        self._names = [name for one, names in self._tracked for name in names]
        self._sharded = any(isinstance(one.read(), DTensor) for one, _ in self._tracked)
        self.steps = self._schedule(state.max_steps)
        self._milestones = Milestones(self.token_milestones or [])
        self._milestones.reached(state.num_input_tokens_seen)
        self._budget = Budget(self.max_overhead, state.max_steps - state.global_step)
        self._pool = TimedExecutor(self.workers)
        self._first_step, self._last_step = state.global_step, state.global_step
        self._cost: float | None = None  # seconds of the last complete log, weights and updates
        self._logs = self._left_out = 0
        self._reasons: Counter[str] = Counter()
        self._wants_updates = bool(self.metrics & set(UPDATE_METRICS))
        self._writes = state.is_world_process_zero
        wants_peaks = state.is_world_process_zero and self.metrics & set(PEAK_METRICS)
        self._peaks = Peaks([one for one, _ in self._tracked]) if wants_peaks else None

    def _open(self, args: TrainingArguments, state: TrainerState) -> None:
        """The log and TensorBoard, in the state that they had at this step."""
        self.log = SpectralLog(Path(args.output_dir) / FOLDER)
        self.board = SpectralBoard(self._writer(args, state), self._names)
        _WORKER.submit(self._rewind, state.global_step).result()
        if self._peaks is not None:
            self._peaks.load(self._peaks_file(state))

    def _choose(self, model: nn.Module) -> list[tuple[Tracked, set[str]]]:
        """What to read, and the names of the matrices to take from each."""
        if self.modules is not None:
            check_selectors(model, self.modules)
        found = [(one, one.names()) for one in tracked_matrices(model, self.modules)]
        names = {name: matrix_name(name) for _, of_one in found for name in of_one}
        if not names:
            raise UsageError(
                "the model has no matrices to track: no trainable parameter with 2 or 3 dimensions; drop the callback"
            )
        _require_known("layer", self.layers, {name.layer for name in names.values()})
        _require_known("projection", self.projections, {name.projection for name in names.values()})
        kept = {
            full
            for full, name in names.items()
            if (self.layers is None or name.layer in self.layers)
            and (self.projections is None or name.projection in self.projections)
        }
        if not kept:
            raise UsageError("no matrix is in the chosen layers and the chosen projections: choose more of either")
        return [(one, set(of_one) & kept) for one, of_one in found if set(of_one) & kept]

    def _schedule(self, max_steps: int) -> set[int]:
        if self.token_milestones is not None:
            return {0, max_steps}
        if self.every_n_steps is None:
            return log_schedule(max_steps, self.logs_per_run)
        return {max_steps, *range(0, max_steps, self.every_n_steps)}

    def _is_due(self, state: TrainerState) -> bool:
        """Whether to log the step about to be taken. Ranks that share matrices must agree: rank 0 decides."""
        step = state.global_step + 1
        if step not in self.steps and not self._milestones.reached(state.num_input_tokens_seen):
            return False
        if self.max_overhead is None or step == state.max_steps or step == self._first_step + 1:
            return True
        is_busy = self._pending is not None and not self._pending.done()
        fits = not is_busy and self._budget.affords(self._cost)
        if self._sharded and dist.is_initialized():
            device = self._tracked[0][0].read().device
            decision = torch.tensor(int(fits), device=device)
            dist.broadcast(decision, src=0)
            fits = bool(decision.item())
        self._left_out += not fits
        return fits

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
        for one, names in self._tracked:
            present = one.read()
            whole = present.full_tensor() if isinstance(present, DTensor) else present
            if state.is_world_process_zero:
                parts = one.parts(whole.detach().to("cpu", copy=True))
                copies |= {name: part for name, part in parts.items() if name in names}
        return copies

    def _record(
        self,
        step: int,
        state: TrainerState,
        after: dict[str, Tensor],
        before: dict[str, Tensor] | None = None,
        expected: set[str] = BY_DEFINITION,
    ) -> None:
        """Hand one log to the worker; at most one is under way, so that copies do not pile up.

        expected: causes of nulls that are not worth a warning.
        """
        self._last_step = step
        self._join()
        self._expected = expected
        if state.is_world_process_zero:
            tokens = state.num_input_tokens_seen or (0 if step == 0 else None)
            peaks = self._peaks.take() if self._peaks is not None and step else {}
            self._logs += 1
            self._pending = _WORKER.submit(self._work, step, tokens, after, before, peaks)

    def _before_checkpoint(self, state: TrainerState) -> None:
        """Rows, and the peaks since them, must be there when a checkpoint is: the process may be killed in between."""
        self._join()
        if self._peaks is not None:
            self.log.path.mkdir(parents=True, exist_ok=True)
            self._guarded("peaks", lambda: self._peaks.save(self._peaks_file(state)))

    def _join(self) -> None:
        """Wait for the log under way; an error in it is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _work(
        self,
        step: int,
        tokens: int | None,
        after: dict[str, Tensor],
        before: dict[str, Tensor] | None,
        peaks: dict[Key, tuple[float | None, float | None]],
    ) -> None:
        """Compute and write the rows of one step (in the worker thread)."""
        start, in_pool = time.thread_time(), self._pool.cpu_seconds
        updates = {name: after[name].float() - before.pop(name).float() for name in list(before)} if before else None
        rows = analyze(after, updates, top_k=self.top_k, k=self.k, updated=True, exact=self.exact,
                       power_law=POWER_LAW in self.metrics, workers=self._pool)  # fmt: skip
        rows = [self._finish({"step": step, "tokens": tokens} | row, peaks) for row in rows]
        self._guarded(f"step {step}", lambda: self.log.append(rows))
        self.board.write(step, rows)
        if self._trainer is not None:
            self._finished.append((step, self.board.scalars(step)))
        cost = CONTENTION * (time.thread_time() - start + self._pool.cpu_seconds - in_pool)
        self._budget.charge(cost)
        if step > self._first_step:
            self._cost = cost

    def _finish(self, row: Row, peaks: dict[Key, tuple[float | None, float | None]]) -> Row:
        """The row with the peaks, without the metrics that nobody asked for; its reason is counted."""
        weight, gradient = peaks.get((row["parameter"], row["expert"]), (None, None))
        if row["step"] and self._peaks is not None and weight is not None:
            present = row["frobenius_norm"]
            row |= {"weight_norm_peak": None if present is None else max(weight, present)}
            row |= {"gradient_norm_peak": gradient}
            if gradient is None:
                row = add_reason(row, "gradient_norm_peak", "no finite gradient")
        row = only(row, self.metrics)
        reasons = row["reason"].split("; ") if row["reason"] else []
        self._reasons.update(reason for reason in reasons if reason.partition(": ")[2] not in self._expected)
        return row

    def _pass_on(self) -> None:
        """Give finished scalars to `Trainer.log`, under the step they belong to."""
        while self._finished:
            step, scalars = self._finished.pop(0)
            state = self._trainer.state
            present, state.global_step = state.global_step, step
            try:
                self._trainer.log(scalars)
            finally:
                state.global_step = present

    def _peaks_file(self, state: TrainerState) -> Path:
        return self.log.path / f".peaks-{state.global_step}.json"

    def _troubles(self) -> list[str]:
        """What could not be written, and how many rows have nulls for which reason."""
        failed = [f"could not write {_listed(what)}: {error}" for error, what in self._failures.items()]
        nulls = [f"{count} rows have null {reason}" for reason, count in self._reasons.items()]
        return failed + ([self.board.writer.failure] if self._writes and self.board.writer.failure else []) + nulls

    def _guarded(self, what: str, write: Callable[[], None]) -> None:
        """A full disk costs a log, not the training run."""
        try:
            write()
        except OSError as error:
            self._failures[str(error)].append(what)

    def _writer(self, args: TrainingArguments, state: TrainerState) -> RunWriter:
        if self.tensorboard is not None:
            return self.tensorboard.writer(args, state)
        return RunWriter(Path(args.output_dir) / TENSORBOARD_FOLDER, state.global_step)


def _listed(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and (value <= 0 if name == "max_overhead" else value < 1):
            raise UsageError(f"{name}={value}: must be {'above 0' if name == 'max_overhead' else 'at least 1'}")


def _require_known(kind: str, wanted: set | None, known: set) -> None:
    unknown = sorted(wanted - known, key=str) if wanted else []
    if unknown:
        raise UsageError(f"unknown {kind} {unknown[0]!r}; there are {', '.join(map(str, sorted(known, key=str)))}")
