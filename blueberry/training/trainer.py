"""`BlueberryTrainer`: transformers' Trainer with the hybrid optimizer."""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..errors import UsageError
from ..modeling_blueberry import BlueberryForCausalLM
from ..optim.audit import format_audit
from ..optim.build import build_optimizer
from ..optim.composed import ComposedOptimizer
from ..optim.param_groups import check_holds_trainable_parameters
from .arguments import BlueberryTrainingArguments
from .checkpointing import CheckpointingTrainer
from .replacing import AUDIT
from .run_folder import write_json


def composed_optimizer(optimizer: Optimizer) -> ComposedOptimizer | None:
    """The hybrid optimizer, out of accelerate's wrapper; None for any other one."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return inner if isinstance(inner, ComposedOptimizer) else None


def _ranks_of_a_node(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Those that share the optimizer's work: between nodes results would travel longer than they take to compute, and
    thousands of ranks would be more than there are matrices."""
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", group.size()))
    is_whole = of_node == group.size() or group.size() % of_node
    return group if is_whole else dist.new_subgroups(of_node)[0]


class AuditCallback(TrainerCallback):
    """Prints the optimizer's audit before the first step, and saves it there and again when it has measurements."""

    def __init__(self) -> None:
        self._was_saved_with_measurements = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        composed = composed_optimizer(kwargs["optimizer"])
        if composed is not None and state.is_world_process_zero:
            print(format_audit(composed.audit()))
            if state.global_step == 0:  # a resumed run has a measured one
                _save_audit(args.output_dir, composed)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._was_saved_with_measurements:
            return
        composed = composed_optimizer(kwargs["optimizer"])
        if composed is not None and composed.was_measured and state.is_world_process_zero:
            _save_audit(args.output_dir, composed)
            self._was_saved_with_measurements = True


def _save_audit(folder: str, optimizer: ComposedOptimizer) -> None:
    """`optimizer_audit.json` for programs and `optimizer_audit.md` for people."""
    rows = optimizer.audit()
    write_json(Path(folder) / AUDIT, rows)
    (Path(folder) / AUDIT).with_suffix(".md").write_text(format_audit(rows))


def steps_for(args: TrainingArguments, train_dataset: Dataset | None) -> int:
    """The least optimizer steps that see `args.train_tokens` tokens over all processes.

    Windows are as long as the first. The last step of a pass takes the windows that are left, unless
    `dataloader_drop_last` leaves out those that fill no batch; a stream is taken for endless.
    """
    if train_dataset is None:
        raise UsageError("train_tokens needs a train_dataset: its windows tell how many tokens a step has")
    is_stream = isinstance(train_dataset, IterableDataset)
    first = next(iter(train_dataset)) if is_stream else train_dataset[0]
    needed = math.ceil(args.train_tokens / len(first["input_ids"]))
    batch = args.train_batch_size * args.world_size
    per_step = batch * args.gradient_accumulation_steps
    if is_stream:
        return math.ceil(needed / per_step)
    windows = len(train_dataset) // batch * batch if args.dataloader_drop_last else len(train_dataset)
    if windows == 0:
        raise UsageError(
            f"--dataloader_drop_last true: {len(train_dataset)} training windows are less than a batch of {batch}; "
            "lower --per_device_train_batch_size or leave it out"
        )
    passes, rest = divmod(needed, windows)
    return passes * math.ceil(windows / per_step) + math.ceil(rest / per_step)


class BlueberryTrainer(CheckpointingTrainer):
    """Trainer whose optimizer is `build_optimizer(model, args)`.

    Gradients are clipped inside the optimizer, group by group (AdamW's by default); `max_grad_norm` sets the bound and
    the logged `grad_norm` is that of all gradients before clipping. Logs carry one learning rate for each group,
    tokens per second since the last log, and `skipped_steps` once a step was skipped for inf or NaN in its gradients.
    The audit of the optimizer is printed before the first step and saved in the run.
    `args.train_tokens` sets the number of steps from the length of the windows.
    """

    args: BlueberryTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: BlueberryTrainingArguments | None = None,
        *,
        train_dataset: Dataset | None = None,
        **named: Any,
    ):
        if not isinstance(args, BlueberryTrainingArguments):
            raise UsageError(f"BlueberryTrainer got {type(args).__name__}: use BlueberryTrainingArguments")
        if args.train_tokens is not None:  # before Trainer asks a stream for its length
            args.max_steps = steps_for(args, train_dataset)
        super().__init__(model, args, train_dataset=train_dataset, **named)
        self._clock, self._tokens_at_clock = time.perf_counter(), 0
        self.add_callback(AuditCallback)

    def init_hf_repo(self, *_: Any, **__: Any) -> None:
        """Trainer's pushes would carry pickled arguments, local paths and a card that knows nothing."""
        raise UsageError("BlueberryTrainer does not push by itself: leave push_to_hub out, and add "
                         "hub.callback.PushToHubCallback or run scripts/push_to_hub.py")  # fmt: skip

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run, counted from its start."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer, built unless there is one; UsageError if it misses a trainable parameter."""
        model = self.model if model is None else model
        if self.optimizer is None:
            self.optimizer = build_optimizer(model, self.args)
        check_holds_trainable_parameters(self.optimizer, model)
        return self.optimizer

    def _prepare_for_training(self, *positional: Any, **named: Any) -> tuple[nn.Module, DataLoader]:
        """Trainer's; under DDP the optimizer's work is shared out, as all ranks hold the same weights."""
        model, loader = super()._prepare_for_training(*positional, **named)
        composed = composed_optimizer(self.optimizer)
        if composed is not None and isinstance(model, DistributedDataParallel):
            composed.share_work(_ranks_of_a_node(model.process_group) if self.args.share_optimizer_work else None)
        return model, loader

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """transformers' schedules; warmup_stable_decay decays over the last fifth unless told otherwise."""
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            decay_steps = max(1, num_training_steps // 5)
            self.args.lr_scheduler_kwargs = {"num_decay_steps": decay_steps} | (self.args.lr_scheduler_kwargs or {})
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            kind = self.args.lr_scheduler_type.value
            raise UsageError(f"--lr_scheduler_type {kind} with these --lr_scheduler_kwargs: {error}") from error

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *positional: Any, **named: Any) -> Any:
        """Trainer's loss; a Blueberry in training is told that nobody wants its logits."""
        if model.training and isinstance(self.accelerator.unwrap_model(model), BlueberryForCausalLM):
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *positional, **named)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        """A ComposedOptimizer clips by itself (its groups carry `max_grad_norm`)."""
        if composed_optimizer(self.optimizer) is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        """None for a ComposedOptimizer: it takes the norm in its step, and `log` reads it there."""
        return None if composed_optimizer(self.optimizer) is not None else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log; training rows also get what the optimizer did and the speed since the last row."""
        if "loss" in logs:
            logs |= self._optimizer_logs()
            logs.pop("learning_rate", None)
            logs |= {f"lr/{group['name']}": float(group["lr"]) for group in self._named_groups()}
            logs["tokens_per_second"] = self._speed()
            start_time = None  # Trainer's own speed is that since the start, evaluation and saving included
        super().log(logs, start_time)

    def _optimizer_logs(self) -> dict[str, float]:
        composed = composed_optimizer(self.optimizer)
        if composed is None or composed.gradient_norm is None:
            return {}
        skipped = {"skipped_steps": composed.skipped_steps} if composed.skipped_steps else {}
        return {"grad_norm": composed.gradient_norm} | skipped

    def _named_groups(self) -> list[dict[str, Any]]:
        """The parameter groups that `build_optimizer` named; a user's own optimizer has none."""
        return [group for group in self.optimizer.param_groups if "name" in group]

    def _speed(self) -> float:
        """Tokens per second since the last call, evaluation and saving left out."""
        now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
        speed = (tokens - self._tokens_at_clock) / max(now - self._clock, 1e-9)
        self._clock, self._tokens_at_clock = now, tokens
        return speed

    def _init_training_state(self, max_steps: int, *positional: Any) -> tuple[int, int]:
        """Trainer's, which takes the steps between logs, evaluations and checkpoints from the checkpoint: shares of
        another length, if this run is given another one."""
        position = super()._init_training_state(max_steps, *positional)
        self.state.compute_steps(self.args, max_steps)
        return position

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step: Trainer would take one more
            self.control.should_training_stop = True
            return
        self._clock, self._tokens_at_clock = time.perf_counter(), self.state.num_input_tokens_seen
        super()._run_epoch(*positional, **named)

    def evaluate(self, *positional: Any, **named: Any) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().evaluate(*positional, **named)
        self._clock += time.perf_counter() - start
        return metrics

    def _save_checkpoint(self, *positional: Any, **named: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*positional, **named)
        self._clock += time.perf_counter() - start
