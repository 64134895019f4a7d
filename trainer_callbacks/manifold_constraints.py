"""ManifoldConstraintCallback: whether the weights of a manifold optimizer are still on their manifolds."""

import warnings
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blueberry.errors import UsageError
from blueberry.optim import ComposedOptimizer
from blueberry.training.trainer import composed_optimizer

from .tensorboard import Charts, TensorBoardCallback

ON_VIOLATION = ("warn", "project", "stop")
CHARTS: Charts = {
    "manifold": {
        "largest violation": ["Multiline", [r"^manifold/\w+_muon/max_violation$"]],
        "singular values": ["Multiline", [r"^manifold/\w+/sigma_(min|max)$"]],
        "tangency residual": ["Multiline", [r"^manifold/\w+/tangency_residual$"]],
    }
}


class ManifoldConstraintCallback(TrainerCallback):
    """Constraint violations, singular values and the dual solver of manifold Muon, at every log of the Trainer.

    `latest` holds the numbers of the last log (see `ComposedOptimizer.log_metrics`): the largest and the mean
    violation of each part and family, the range of singular values, tangency residual and dual iterations. With
    `tensorboard` they go to `manifold/<name>`.

    The check itself, a product per matrix in float64, is made every `check_every_n_steps` steps and before each log.
    When a tolerance is broken (norm_F(W^T W - I) above 1e-4, a norm off by more than 1e-6) `on_violation` decides:
    `warn` warns, `project` also puts the weights back on their manifolds, `stop` stops training after the step.

    Raises UsageError before training when the optimizer has no part on a manifold.
    """

    def __init__(
        self,
        tensorboard: TensorBoardCallback | None = None,
        check_every_n_steps: int | None = None,
        on_violation: str = "warn",
    ):
        if on_violation not in ON_VIOLATION:
            raise UsageError(f"on_violation={on_violation!r} is unknown: use one of {', '.join(ON_VIOLATION)}")
        if check_every_n_steps is not None and check_every_n_steps < 1:
            raise UsageError(f"check_every_n_steps={check_every_n_steps} is below 1: None checks at every log")
        self.tensorboard = tensorboard
        self.check_every_n_steps = check_every_n_steps
        self.on_violation = on_violation
        self.latest: dict[str, float] = {}
        self._optimizer: ComposedOptimizer | None = None
        self._logged = 0  # step of the last log

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Find the composed optimizer."""
        self._optimizer = composed_optimizer(optimizer)
        if self._optimizer is None or not self._optimizer.check_constraints()["by_type"]:
            raise UsageError("the optimizer keeps no constraint to watch: train with --optimizer manifold or "
                             "create_manifold_optimizer, or drop the callback")  # fmt: skip
        if self.tensorboard is not None and state.is_world_process_zero:
            self.tensorboard.writer(args, state).add_charts(CHARTS)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check, where asked for."""
        if self.check_every_n_steps and state.global_step % self.check_every_n_steps == 0:
            self._check(state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the numbers, and check."""
        if self._optimizer is None or state.global_step in (0, self._logged):
            return  # the summary at the end is a log of its own
        self._logged = state.global_step
        self.latest = self._optimizer.log_metrics("manifold")
        self._check(state, control)
        if self.tensorboard is not None and state.is_world_process_zero:
            writer = self.tensorboard.writer(args, state)
            for name, value in self.latest.items():
                writer.add_scalar(name, value, state.global_step)
            writer.flush()  # a checkpoint may follow

    def _check(self, state: TrainerState, control: TrainerControl) -> None:
        report = self._optimizer.check_constraints()
        if not report["total_violations"]:
            return
        worst = ", ".join(f"{name} {part['max_violation']:.3g}" for name, part in report["by_type"].items())
        remedy = {"warn": "on_violation='project' repairs it", "project": "projected", "stop": "training stops"}
        message = f"{report['total_violations']} matrices are off their manifold at step {state.global_step}"
        warnings.warn(f"{message} (largest errors: {worst}): {remedy[self.on_violation]}", stacklevel=2)
        if self.on_violation == "project":
            self._optimizer.project_onto_manifolds()
        elif self.on_violation == "stop":
            control.should_training_stop = True
