"""Several optimizers behind the face of one: what Trainer, accelerate and schedulers see is a torch Optimizer."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from ..errors import UsageError
from .audit import FIRST_STEPS, Row, UpdateMeter, audit_warnings, parameter_names
from .constraints import Report, check_constraints, constraint_metrics
from .finite import first_non_finite, gradient_norms
from .manifold_base import ManifoldOptimizer
from .muon import Muon, restore_state_dtype
from .param_groups import Assignment

_OWN_STATE = (
    "optimizers",
    "assignments",
    "max_skipped_steps",
    "gradient_norm",
    "_meter",
    "_steps",
    "_without_gradient",
)


class ComposedOptimizer(Optimizer):
    """Runs each of `optimizers` on its own parameter groups.

    The groups and the state of the parts are shared with this optimizer: the very same dicts, so a scheduler that sets
    `param_groups[i]["lr"]` reaches the part, and one `state_dict` holds everything. Each group carries the name of its
    part under `"optimizer"`, by which the parts are linked again after `load_state_dict` has replaced the dicts.

    A group with `"max_grad_norm"` has its gradients clipped before the step, by the common norm of all groups with the
    same bound. Groups without it are not clipped: Muon's update does not depend on the gradient's scale.

    A step whose gradients hold inf or NaN changes nothing but the counters `skipped_steps` and `skipped_in_a_row`,
    which live in the groups and so in the state_dict. `gradient_norm` is the norm of all gradients at the last step,
    before clipping. The first steps are measured for `audit`; what looks wrong about them is a UserWarning.

    Args:
        optimizers: name -> optimizer; no parameter may be in two of them.
        assignments: what each parameter got and why, for `audit`; by default read from the groups.
        max_skipped_steps: so many steps in a row may be skipped; one more raises UsageError.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        assignments: Sequence[Assignment] = (),
        max_skipped_steps: int = 10,
    ):
        if max_skipped_steps < 0:
            raise UsageError(f"max_skipped_steps={max_skipped_steps} is negative: use 0 to stop at the first")
        self.optimizers = dict(optimizers)
        self.max_skipped_steps = max_skipped_steps
        self.gradient_norm: float | None = None
        self._meter = UpdateMeter()
        self._steps = 0  # of this process, skipped ones left out
        self._without_gradient: list[str] = []
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group |= {"optimizer": name, "skipped_steps": 0, "skipped_in_a_row": 0}
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        super().__init__(groups, {"lr": groups[0]["lr"]})  # schedules with a lowest lr read it
        self._link()
        self.assignments = tuple(assignments) or tuple(self._given())

    def _given(self) -> Iterator[Assignment]:
        """Assignments of parameters that the caller gave the parts."""
        names = parameter_names(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                kind = group.get("name", group["optimizer"])
                yield Assignment(names[parameter], parameter, group["optimizer"], kind, "given to the optimizer")

    @property
    def skipped_steps(self) -> int:
        """Steps without effect, because their gradients held inf or NaN."""
        return self.param_groups[0]["skipped_steps"]

    @property
    def was_measured(self) -> bool:
        """Whether the first steps are over, so that `audit` has its measurements."""
        return self._steps >= FIRST_STEPS

    def _link(self) -> None:
        """Let every part work on this optimizer's groups and state."""
        for name, optimizer in self.optimizers.items():
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["optimizer"] == name]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in _OWN_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of an optimizer with the same parts; another one's raises UsageError."""
        saved = [group.get("optimizer") for group in state_dict["param_groups"]]
        own = [group["optimizer"] for group in self.param_groups]
        if saved != own:
            raise UsageError(f"the state_dict is of groups for {saved}, this optimizer's are for {own}: build it with "
                             "the settings of the run that was saved")  # fmt: skip
        super().load_state_dict(state_dict)
        restore_state_dtype(self, state_dict)
        for _, part in self._manifold_parts():
            part.expect_other_weights()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the part that `param_group["optimizer"]` names."""
        name = param_group.get("optimizer")
        if name not in self.optimizers:
            raise UsageError(f'the group\'s "optimizer" is {name!r}: name one of {", ".join(self.optimizers)}')
        part = self.optimizers[name]
        if not any(param_group is group for group in part.param_groups):
            part.add_param_group(param_group)
        super().add_param_group(param_group)

    def share_work(self, ranks: ProcessGroup | None) -> None:
        """Let the ranks of a group that all hold the same weights (DDP) share Newton-Schulz and the Stiefel solver.

        None, as at first: each rank does all of it. Sharded weights (FSDP2) need no such call.
        """
        for part in self.optimizers.values():
            if isinstance(part, Muon | ManifoldOptimizer):
                part.replicas = ranks

    def audit(self) -> list[Row]:
        """One row for each parameter: name, shape, optimizer, group, reason.

        After the first steps also what `UpdateMeter` measured of Muon's parameters.
        """
        return [
            {"name": a.name, "shape": list(a.shape), "optimizer": a.optimizer, "group": a.group, "reason": a.reason}
            | self._meter.measurements.get(a.name, {})
            for a in self.assignments
        ]

    def check_constraints(self) -> Report:
        """Constraint errors of the parts on a manifold, see `blueberry.optim.constraints.check_constraints`."""
        return check_constraints(self._manifold_parts())

    def log_metrics(self, prefix: str = "optimizer") -> dict[str, float]:
        """What a logger wants: gradient norm, skipped steps, and how the constraints and the dual solver fare.

        See `blueberry.optim.constraints.constraint_metrics` for the names.
        """
        own = {f"{prefix}/skipped_steps": float(self.skipped_steps)}
        if self.gradient_norm is not None:
            own[f"{prefix}/grad_norm"] = self.gradient_norm
        return own | constraint_metrics(self._manifold_parts(), prefix)

    def project_onto_manifolds(self) -> None:
        """Put back what left its manifold, such as weights that other code wrote to."""
        for _, part in self._manifold_parts():
            part.project()

    def _manifold_parts(self) -> list[tuple[str, ManifoldOptimizer]]:
        return [(name, part) for name, part in self.optimizers.items() if isinstance(part, ManifoldOptimizer)]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Clip where asked for, then step every part; skip the step if a gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not (gradients := self._gradients_by_bound()):
            self._check_gradients_exist()
            return loss
        norms, self.gradient_norm = gradient_norms(gradients)
        if not math.isfinite(self.gradient_norm):
            self._skip()
        elif self._is_initialization():
            self._initialize_state()
        else:
            self._clip(norms)
            self._step_parts()
        return loss

    def _gradients_by_bound(self) -> dict[float, list[Tensor]]:
        """`max_grad_norm` (0 for none) -> the gradients of the groups with that bound."""
        by_bound: dict[float, list[Tensor]] = {}
        for group in self.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if gradients:
                by_bound.setdefault(group.get("max_grad_norm") or 0.0, []).extend(gradients)
        return by_bound

    def _check_gradients_exist(self) -> None:
        if self._steps == 0:
            names = list(parameter_names(self).values())
            raise UsageError(
                f"none of the optimizer's {len(names)} parameters has a gradient ({names[0]}, ...): if the model was "
                "wrapped (PEFT) or replaced after build_optimizer, call build_optimizer on the model that is trained"
            )

    def _skip(self) -> None:
        for group in self.param_groups:
            group["skipped_steps"] = group.get("skipped_steps", 0) + 1
            group["skipped_in_a_row"] = group.get("skipped_in_a_row", 0) + 1
        in_a_row = self.param_groups[0]["skipped_in_a_row"]
        if in_a_row > self.max_skipped_steps:
            named = ((name, p.grad) for p, name in parameter_names(self).items() if p.grad is not None)
            raise UsageError(
                f"{in_a_row} steps in a row had inf or NaN in their gradients, first in {first_non_finite(named)}: "
                "lower the learning rates, look for bad data, or train in bfloat16 or float32"
            )

    def _is_initialization(self) -> bool:
        """torch.distributed.checkpoint steps a fresh optimizer on zero gradients with lr 0 to get its state."""
        return not self.state and self.gradient_norm == 0 and not any(group["lr"] for group in self.param_groups)

    def _initialize_state(self) -> None:
        """Create the state, and leave AdamW's step counters (its bias correction) where they were."""
        for optimizer in self.optimizers.values():
            optimizer.step()
        for state in self.state.values():
            if "step" in state:
                state["step"].zero_()

    def _clip(self, norms: Mapping[float, Tensor]) -> None:
        for bound, norm in norms.items():
            if bound:
                groups = (group for group in self.param_groups if group.get("max_grad_norm") == bound)
                clip_grads_with_norm_([parameter for group in groups for parameter in group["params"]], bound, norm)

    def _step_parts(self) -> None:
        for group in self.param_groups:
            group["skipped_in_a_row"] = 0
        if self.was_measured:
            for optimizer in self.optimizers.values():
                optimizer.step()
        else:
            self._first_steps()

    def _first_steps(self) -> None:
        """A step that is watched: which parameters get gradients and, in the last of them, what Muon's updates are."""
        self._note_missing_gradients()
        self._steps += 1
        with ExitStack() as stack:
            for optimizer in self.optimizers.values():
                if self.was_measured and isinstance(optimizer, Muon):
                    stack.enter_context(self._meter.watch(optimizer))
                optimizer.step()
        if self.was_measured:
            for message in audit_warnings(self.audit(), self._without_gradient):
                warnings.warn(message, stacklevel=5)

    def _note_missing_gradients(self) -> None:
        missing = [name for p, name in parameter_names(self).items() if p.grad is None and p.requires_grad]
        earlier = set(self._without_gradient)
        self._without_gradient = [name for name in missing if self._steps == 0 or name in earlier]
