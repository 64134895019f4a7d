"""What the optimizers on manifolds share: checks, the skipping of bad steps, float32 copies of bf16 weights."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..errors import UsageError
from .distributed import Alone, Holding, Steps, Task, copy_whole, local, run_tasks
from .finite import gradient_norms, whole
from .manifold_weights import is_low_precision
from .muon import restore_state_dtype
from .sharing import BUCKET_BYTES


class Piece(NamedTuple):
    """What this rank holds of some matrices, with what belongs to them: all views. `weight` is the float32 one."""

    parameter: Tensor
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    scale: float  # on the learning rate
    shape: torch.Size  # of the whole weight, whose slab `weight` may be
    holding: Holding
    group: dict[str, Any]

    def with_momentum(self, gradient: Tensor) -> Tensor:
        """What Muon steps along, after the buffer has taken up the gradient."""
        momentum = self.group["momentum"]
        if momentum == 0:
            return gradient
        buffer = self.state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum) if self.group["nesterov"] else buffer

    def move_to(self, weight: Tensor) -> None:
        """Write the new weight, and its rounding if the parameter is narrower."""
        self.weight.copy_(weight)
        if self.parameter is not self.weight:
            self.parameter.copy_(weight)


class ManifoldOptimizer(Optimizer):
    """An optimizer of weights on a manifold; a subclass knows which one and how to step.

    Weights narrower than float32 have a float32 copy, `master_weight`, in the state: it is what keeps the constraint,
    and the weight is its rounding. State tensors are float32 (float64 for float64 weights).

    Weights may be DTensors, and `replicas` and `bucket_bytes` are those of Muon.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]):
        self._was_checked = False  # since construction or loading
        self.bucket_bytes = BUCKET_BYTES
        self.replicas: ProcessGroup | None = None
        super().__init__(params, defaults | {"lr_scales": None, "skipped_steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and put its weights on the manifold."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        for name, parameter in named(group):
            _check_parameter(type(self).__name__, name, parameter)
            if not parameter.is_meta:
                self._settle(name, parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, keeping float32 state of bf16 weights; the next step checks that the weights are on the manifold."""
        super().load_state_dict(state_dict)
        restore_state_dtype(self, state_dict)
        self.expect_other_weights()

    def expect_other_weights(self) -> None:
        """Let the next step check that the weights are on the manifold, as after loading a checkpoint."""
        self._was_checked = False

    def constraint_errors(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """(group, name, the constraint error of each matrix in float64) of every parameter."""
        for group in self.param_groups:
            for name, parameter in named(group):
                yield group, name, self._errors(parameter, group)

    def project(self) -> None:
        """Put every weight that is off its manifold back on it, as the step does not need but a user may want."""
        for group in self.param_groups:
            for name, parameter in named(group):
                exact = self.exact_weight(parameter)
                self._settle(name, exact, group)
                if "master_weight" in self.state.get(parameter, {}):
                    parameter.detach().copy_(exact)

    def exact_weight(self, parameter: Tensor) -> Tensor:
        """The weight that keeps the constraint: the float32 copy of a narrower one."""
        return self.state.get(parameter, {}).get("master_weight", parameter).detach()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_was_checked": self._was_checked, "bucket_bytes": self.bucket_bytes}
        return {**super().__getstate__(), **own, "replicas": None}  # a process group cannot be copied

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; none of any if a gradient holds inf or NaN.

        Skipped steps are counted in the groups' `skipped_steps`. Never writes into a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return loss
        if not torch.tensor(gradient_norms({0.0: gradients})[1]).isfinite():
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return loss
        self._check_once()
        pieces = [piece for group in self.param_groups for piece in self._pieces(group)]
        self._step_alone([piece for piece in pieces if isinstance(piece.holding, Alone)])
        shared = [(piece.holding, self._task(piece)) for piece in pieces if not isinstance(piece.holding, Alone)]
        run_tasks(shared, Steps(self._load, self._work, self._store), self.bucket_bytes)
        self._after_step()
        return loss

    def _check_once(self) -> None:
        """Weights that were loaded since construction may be off the manifold."""
        if not self._was_checked:
            for group in self.param_groups:
                for name, parameter in named(group):
                    self._settle(name, parameter, group, "after loading")
            self._was_checked = True

    def _check_group(self, group: dict[str, Any]) -> None:
        if not 0 <= group["lr"] < float("inf"):
            raise UsageError(f"lr={group['lr']} is no step size: at least 0, typical are 0.01 to 0.1")
        if not 0 <= group["momentum"] < 1:
            raise UsageError(f"momentum={group['momentum']} is outside [0, 1): 0.95 is typical, 0 switches it off")
        if group.get("weight_decay"):
            raise UsageError(
                f"weight_decay={group['weight_decay']} has no effect on {type(self).__name__}, whose weights keep "
                "their norm: remove it, or give these parameters to Muon or AdamW"
            )

    def _errors(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _settle(self, name: str, parameter: Tensor, group: dict[str, Any], when: str = "") -> None:
        raise NotImplementedError

    def _step_alone(self, pieces: list[Piece]) -> None:
        """Step pieces of which everything that the step needs is on this rank."""
        raise NotImplementedError

    def _task(self, piece: Piece) -> Task:
        """What travels of a piece that ranks work on together: what `_load` returns."""
        raise NotImplementedError

    def _load(self, piece: Piece) -> list[Tensor]:
        raise NotImplementedError

    def _work(self, pieces: list[Piece], wholes: list[list[Tensor]]) -> list[list[Tensor]]:
        raise NotImplementedError

    def _store(self, piece: Piece, results: list[Tensor]) -> None:
        raise NotImplementedError

    def _after_step(self) -> None:
        """What there is to note when every piece has moved."""

    def _holding(self, parameter: Tensor, group: dict[str, Any]) -> Holding:
        raise NotImplementedError

    def _pieces(self, group: dict[str, Any]) -> Iterator[Piece]:
        """Every parameter with a gradient."""
        scales = group["lr_scales"] or [1.0] * len(group["params"])
        for parameter, scale in zip(group["params"], scales, strict=True):
            if parameter.grad is not None and parameter.numel():
                held = self._holding(parameter, group)
                state = {name: local(tensor) for name, tensor in self._state_of(parameter, held, group).items()}
                own = local(parameter)
                weight = state.get("master_weight", own)
                yield Piece(own, weight, local(parameter.grad), state, scale, parameter.shape, held, group)

    def _state_of(self, parameter: Tensor, held: Holding, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, created when first asked for."""
        state = self.state[parameter]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        if is_low_precision(parameter) and "master_weight" not in state:
            state["master_weight"] = parameter.detach().to(dtype)
            copy_whole(state["master_weight"], self._on_manifold(whole(state["master_weight"]), group))
        return state

    def _on_manifold(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of a group; `params[i]` where it was given no names."""
    names = group.get("param_names", [f"params[{i}]" for i in range(len(group["params"]))])
    return zip(names, group["params"], strict=True)


def _check_parameter(optimizer: str, name: str, parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if parameter.ndim not in (2, 3):
        raise UsageError(f"{name} has shape {shape}: {optimizer} takes matrices (out, in) and stacks (experts, out, "
                         "in); give it to AdamW")  # fmt: skip
    if not parameter.is_floating_point():
        raise UsageError(f"{name} is {parameter.dtype}: {optimizer} takes real floating-point parameters")
