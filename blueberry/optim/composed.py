"""Several optimizers behind the face of one: what Trainer, accelerate and schedulers see is a torch Optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from ..errors import UsageError
from .muon import restore_state_dtype
from .param_groups import Assignment


class ComposedOptimizer(Optimizer):
    """Runs each of `optimizers` on its own parameter groups.

    The groups and the state of the parts are shared with this optimizer: the very same dicts, so a scheduler that sets
    `param_groups[i]["lr"]` reaches the part, and one `state_dict` holds everything. Each group carries the name of its
    part under `"optimizer"`, by which the parts are linked again after `load_state_dict` has replaced the dicts.

    A group with `"max_grad_norm"` has its gradients clipped before the step, by the common norm of all groups with the
    same bound. Groups without it are not clipped: Muon's update does not depend on the gradient's scale.

    Args:
        optimizers: name -> optimizer; no parameter may be in two of them.
        assignments: what each parameter got and why, for `audit`.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], assignments: Sequence[Assignment] = ()):
        self.optimizers = dict(optimizers)
        self.assignments = tuple(assignments)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["optimizer"] = name
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        super().__init__(groups, {})
        self._link()

    def _link(self) -> None:
        """Let every part work on this optimizer's groups and state."""
        for name, optimizer in self.optimizers.items():
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["optimizer"] == name]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_state_dtype(self, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the part that `param_group["optimizer"]` names."""
        name = param_group.get("optimizer")
        if name not in self.optimizers:
            raise UsageError(f'the group\'s "optimizer" is {name!r}: name one of {", ".join(self.optimizers)}')
        part = self.optimizers[name]
        if not any(param_group is group for group in part.param_groups):
            part.add_param_group(param_group)
        super().add_param_group(param_group)

    def audit(self) -> list[dict[str, Any]]:
        """One row for each parameter: name, shape, optimizer, group, reason."""
        return [
            {"name": a.name, "shape": list(a.shape), "optimizer": a.optimizer, "group": a.group, "reason": a.reason}
            for a in self.assignments
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Clip where asked for, then step every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clip()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def _clip(self) -> None:
        by_bound: dict[float, list[Tensor]] = {}
        for group in self.param_groups:
            if group.get("max_grad_norm"):
                clipped = [parameter for parameter in group["params"] if parameter.grad is not None]
                by_bound.setdefault(group["max_grad_norm"], []).extend(clipped)
        for bound, parameters in by_bound.items():
            norm = get_total_norm([parameter.grad for parameter in parameters])
            clip_grads_with_norm_(parameters, bound, norm)
