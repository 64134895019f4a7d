"""StepTimeCallback: what a step costs."""

from collections import defaultdict
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blueberry.optim.phases import PhaseClock, now
from blueberry.training.trainer import composed_optimizer

from .tensorboard import TensorBoardCallback


class StepTimeCallback(TrainerCallback):
    """Time per optimizer step and its parts, and tokens per second, since the last log of the Trainer.

    `summary()` gives, as medians over the steps of the whole run, `step_ms`, `forward_ms`, `backward_ms` (what
    follows a forward pass, up to the next or to the optimizer) and `optimizer_step_ms`; within the last, of
    Blueberry's optimizers, `newton_schulz_ms`, `dual_ms` and `retraction_ms`. Besides `tokens_per_second` (all ranks;
    needs `include_num_input_tokens_seen`) and `peak_memory_gib` (CUDA). With `tensorboard`, the same numbers since the
    last log go to `time/<name>`. Evaluation and saving lie between steps and do not count. On CUDA the device is
    synchronised at each clock, so that every part's time is its own.
    """

    def __init__(self, tensorboard: TensorBoardCallback | None = None):
        self.tensorboard = tensorboard
        self._steps: list[dict[str, float]] = []  # seconds of each part, and tokens
        self._logged = 0
        self._phases: PhaseClock | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._step: dict[str, float] | None = None  # of the step in progress
        self._forward_end: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Hook the model's forward pass and find the optimizer's phases."""
        composed = None if optimizer is None else composed_optimizer(optimizer)
        self._phases = None if composed is None else PhaseClock(composed)
        if model is not None:
            self._hooks = [
                model.register_forward_pre_hook(lambda *_: self._begin_forward()),
                model.register_forward_hook(lambda *_: self._end_forward()),
            ]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the step."""
        self._begin, self._tokens = now(), state.num_input_tokens_seen
        self._step, self._forward_end = defaultdict(float), None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the optimizer."""
        self._optimizer_begin = now()
        self._end_backward(self._optimizer_begin)
        if self._phases is not None:
            self._phases.start()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock of the optimizer."""
        self._step["optimizer_step"] = now() - self._optimizer_begin
        if self._phases is not None:
            self._phases.stop()
            self._step |= self._phases.seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock of the step."""
        tokens = state.num_input_tokens_seen - self._tokens
        self._steps.append(dict(self._step) | {"step": now() - self._begin, "tokens": tokens})
        self._step = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the numbers of the steps since the last log to TensorBoard."""
        if self.tensorboard is not None and state.is_world_process_zero and len(self._steps) > self._logged:
            writer = self.tensorboard.writer(args, state)
            for name, value in self.summary(self._logged).items():
                writer.add_scalar(f"time/{name}", value, state.global_step)
            writer.flush()  # a checkpoint may follow
            self._logged = len(self._steps)

    def summary(self, first: int = 0) -> dict[str, float]:
        """The numbers of the steps from number `first` on; the first step of a run includes warm-up."""
        steps = self._steps[first:]
        parts = dict.fromkeys(name for step in steps for name in step if name != "tokens")
        numbers = {f"{part}_ms": 1e3 * median(step.get(part, 0.0) for step in steps) for part in parts}
        if tokens := sum(step["tokens"] for step in steps):
            numbers["tokens_per_second"] = tokens / sum(step["step"] for step in steps)
        if torch.cuda.is_available():
            numbers["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers

    def _begin_forward(self) -> None:
        if self._step is not None:  # evaluation runs forward passes too
            self._forward_begin = now()
            self._end_backward(self._forward_begin)

    def _end_forward(self) -> None:
        if self._step is not None:
            self._forward_end = now()
            self._step["forward"] += self._forward_end - self._forward_begin

    def _end_backward(self, end: float) -> None:
        if self._step is not None and self._forward_end is not None:
            self._step["backward"] += end - self._forward_end
            self._forward_end = None
