"""StepTimeCallback: what a step costs."""

import time
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .tensorboard import TensorBoardCallback


class StepTimeCallback(TrainerCallback):
    """Time per optimizer step, in the optimizer, and tokens per second, since the last log of the Trainer.

    `summary()` gives `step_ms` and `optimizer_step_ms` (medians), `tokens_per_second` (all ranks; needs
    `include_num_input_tokens_seen`) and `peak_memory_gib` (CUDA) of the whole run. With `tensorboard`, the same
    numbers since the last log go to `time/<name>`. Evaluation and saving lie between steps and do not count. On CUDA
    the device is synchronised at each of the four clocks of a step, so that every part's time is its own.
    """

    def __init__(self, tensorboard: TensorBoardCallback | None = None):
        self.tensorboard = tensorboard
        self._steps: list[tuple[float, float, int]] = []  # seconds, seconds in the optimizer, tokens
        self._logged = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the step."""
        self._begin, self._tokens = _now(), state.num_input_tokens_seen

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the optimizer."""
        self._optimizer_begin = _now()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock of the optimizer."""
        self._optimizer_seconds = _now() - self._optimizer_begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock of the step."""
        tokens = state.num_input_tokens_seen - self._tokens
        self._steps.append((_now() - self._begin, self._optimizer_seconds, tokens))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the numbers of the steps since the last log to TensorBoard."""
        if self.tensorboard is not None and state.is_world_process_zero and len(self._steps) > self._logged:
            writer = self.tensorboard.writer(args, state)
            for name, value in self.summary(self._logged).items():
                writer.add_scalar(f"time/{name}", value, state.global_step)
            self._logged = len(self._steps)

    def summary(self, first: int = 0) -> dict[str, float]:
        """The numbers of the steps from number `first` on; the first step of a run includes warm-up."""
        seconds, optimizer, tokens = zip(*self._steps[first:], strict=True)
        numbers = {"step_ms": 1e3 * median(seconds), "optimizer_step_ms": 1e3 * median(optimizer)}
        if sum(tokens):
            numbers["tokens_per_second"] = sum(tokens) / sum(seconds)
        if torch.cuda.is_available():
            numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
