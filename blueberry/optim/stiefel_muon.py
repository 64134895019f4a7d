"""`StiefelMuon`: Muon for weights that keep orthonormal sides.

J. Bernstein, "Modular Manifolds", Thinking Machines Lab, 2025. See docs/manifold_muon.md for the equations.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..manifolds import Stiefel, check_radius, is_wide, orthonormalize, tall
from ..stiefel import TangentStep, check_solver, steepest_tangent_step
from .batching import expert_slices, in_batches
from .manifold_base import ManifoldOptimizer, Piece
from .manifold_weights import TOLERANCE, put_on_manifold, stiefel_errors
from .splits import cut, join
from .workers import run_on_workers

# Matrix elements taken at once: on a CPU what stays in a core's cache, elsewhere what fills the device.
_BATCH_ELEMENTS = {"cpu": 2**19}
_BATCH_ELEMENTS_ELSEWHERE = 2**24


class StiefelMuon(ManifoldOptimizer):
    """Muon for matrices that stay orthonormal: W^T W = radius^2 I if tall, W W^T = radius^2 I if wide.

    Each step moves by lr along the tangent direction of unit spectral norm that descends most steeply (see
    `blueberry.stiefel`) and back onto the manifold by a convergent polar iteration. Momentum is a running mean of
    gradients in the space of all matrices; the sub-problem sees its projection onto the tangent space at the present
    weight, so it needs no transport. Matrices of one shape are worked on together; on a CPU each thread takes some.

    After a step `param_groups[i]["tangency_residual"]` and `["dual_iterations"]` tell how far the solver came: the
    largest residual and the mean number of iterations over the group's non-square matrices.

    Args:
        params: parameters or groups: matrices (out, in) and stacks (experts, out, in) of any aspect ratio.
        lr: spectral norm of a step, whatever the radius.
        momentum, nesterov: as in Muon.
        solver, dual_steps, dual_lr, tangency_tolerance: see `blueberry.stiefel.steepest_tangent_step`.
        radius: of the manifold; all singular values are equal to it.
        layout: how the weights of a group hold their matrices, see `blueberry.optim.splits.Layout`.
        init_on_manifold: put weights whose norm_F(W^T W / radius^2 - I) exceeds 1e-4 on the manifold (their polar
            factor), at construction and, with a warning, after loading; False raises UsageError instead.

    A group's `lr_scales` holds one factor on lr for each parameter.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        solver: str = "reweighted",
        dual_steps: int = 10,
        dual_lr: float = 0.1,
        tangency_tolerance: float = 0.05,
        radius: float = 1.0,
        layout: Sequence | None = None,
        init_on_manifold: bool = True,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "solver": solver,
            "dual_steps": dual_steps,
            "dual_lr": dual_lr,
            "tangency_tolerance": tangency_tolerance,
            "radius": radius,
            "layout": None if layout is None else tuple(layout),
            "init_on_manifold": init_on_manifold,
            "tangency_residual": 0.0,
            "dual_iterations": 0.0,
        }
        super().__init__(params, defaults)

    def solve(self, points: Tensor, directions: Tensor, dual: Tensor | None, group: dict[str, Any]) -> TangentStep:
        """The sub-problem of (batch, long, short) points of radius 1."""
        return steepest_tangent_step(
            points,
            directions,
            dual,
            group["solver"],
            group["dual_steps"],
            group["dual_lr"],
            group["tangency_tolerance"],
        )

    def retract(self, points: Tensor, steps: Tensor) -> Tensor:
        """Points of radius 1 nearest to points + steps, (batch, long, short)."""
        return orthonormalize(points + steps)

    def _errors(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """norm_F(W^T W / radius^2 - I) of each matrix."""
        return stiefel_errors(self.exact_weight(parameter), group["radius"], group["layout"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_radius(group["radius"])
        check_solver(group["solver"], group["dual_steps"], group["dual_lr"])

    def _settle(self, name: str, parameter: Tensor, group: dict[str, Any], when: str = "") -> None:
        errors = lambda weight: stiefel_errors(weight, group["radius"], group["layout"])
        nearest = lambda weight: self._on_manifold(weight, group)
        repair = group["init_on_manifold"]
        put_on_manifold(name, parameter, errors, nearest, TOLERANCE["stiefel_muon"], repair, when)

    def _on_manifold(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        manifold = Stiefel(group["radius"])
        return join([manifold.nearest_point(part) for part in cut(weight, group["layout"])], group["layout"])

    def _step_group(self, group: dict[str, Any]) -> None:
        batches = list(self._batches(group))
        step = lambda pieces: self._step_batch(pieces, group)
        on_cpu = all(pieces[0].weight.device.type == "cpu" for pieces in batches)
        results = run_on_workers(step, batches) if on_cpu else [step(pieces) for pieces in batches]
        solved = [step for steps in results for step in steps if step.iterations]
        group["tangency_residual"] = max((step.residual.max().item() for step in solved), default=0.0)
        weights = [len(step.residual) for step in solved]
        total = sum(step.iterations * count for step, count in zip(solved, weights, strict=True))
        group["dual_iterations"] = total / sum(weights) if solved else 0.0

    def _batches(self, group: dict[str, Any]) -> Iterator[list[Piece]]:
        """Pieces of one kind together; a stack of experts in slices."""
        return in_batches((part for piece in self._pieces(group) for part in _slices(piece)), _fitting)

    def _step_batch(self, pieces: list[Piece], group: dict[str, Any]) -> list[TangentStep]:
        """Step some pieces of one shape; returns what the solver did to each non-square part."""
        layout = group["layout"]
        directions = cut(torch.stack([_direction(piece, group) for piece in pieces]), layout)
        weights = cut(torch.stack([piece.weight for piece in pieces]), layout)
        scales = torch.tensor([piece.scale for piece in pieces], dtype=weights[0].dtype, device=weights[0].device)
        moved, solved = [], []
        for index, (weight, direction) in enumerate(zip(weights, directions, strict=True)):
            new, step = self._step_part(pieces, index, weight, direction, scales, group)
            moved.append(new)
            if weight.shape[-1] != weight.shape[-2]:
                solved.append(step)
        for piece, weight in zip(pieces, join(moved, layout).unbind(), strict=True):
            piece.move_to(weight)
        return solved

    def _step_part(
        self,
        pieces: list[Piece],
        index: int,
        weight: Tensor,  # (pieces, ..., out, in)
        direction: Tensor,
        scales: Tensor,  # (pieces,)
        group: dict[str, Any],
    ) -> tuple[Tensor, TangentStep]:
        """Move one part of every piece: the new weights and the solution."""
        long_first = tall(weight)
        points = long_first.reshape(-1, *long_first.shape[-2:]) / group["radius"]  # (batch, long, short)
        dual = self._dual_variables(pieces, index, len(points) // len(pieces), points.shape[-1], group)
        step = self.solve(points, tall(direction).reshape(points.shape), dual, group)
        sizes = scales.repeat_interleave(len(points) // len(pieces)) * (-group["lr"] / group["radius"])
        new = self.retract(points, step.direction * sizes[:, None, None]) * group["radius"]
        if dual is not None:
            for piece, value in zip(pieces, step.dual_variable.unflatten(0, (len(pieces), -1)), strict=True):
                piece.state[_dual_name(index)].copy_(value.view_as(piece.state[_dual_name(index)]))
        new = new.view(long_first.shape)
        return new.mT if is_wide(weight) else new, step

    def _dual_variables(
        self, pieces: list[Piece], index: int, count: int, short: int, group: dict[str, Any]
    ) -> Tensor | None:
        """(pieces * count, short, short), zeros at first; None where the solution is in closed form."""
        name = _dual_name(index)
        if name not in pieces[0].state:
            return None
        return torch.cat([piece.state[name].reshape(count, short, short) for piece in pieces])

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super()._state_of(parameter, group)
        if group["solver"] == "projected":
            return state
        for index, part in enumerate(cut(parameter, group["layout"])):
            short, long = sorted(part.shape[-2:])
            if short != long and _dual_name(index) not in state:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                state[_dual_name(index)] = parameter.new_zeros(*part.shape[:-2], short, short, dtype=dtype)
        return state


def _dual_name(part: int) -> str:
    """Of the first part of a weight `dual_variable`, as most have one part only."""
    return f"dual_variable_{part}" if part else "dual_variable"


def _fitting(weight: Tensor) -> int:
    """How many weights like this one a batch may have, at least one."""
    elements = _BATCH_ELEMENTS.get(weight.device.type, _BATCH_ELEMENTS_ELSEWHERE)
    return max(1, elements // weight.numel())


def _slices(piece: Piece) -> Iterator[Piece]:
    """A stack of experts in slices of at most a batch each; a matrix as it is."""
    if piece.weight.ndim == 2:
        yield piece
        return
    for chosen in expert_slices(piece.weight, _fitting):
        state = {name: tensor[chosen] for name, tensor in piece.state.items()}
        parameter = piece.parameter[chosen]
        weight = parameter if piece.weight is piece.parameter else piece.weight[chosen]
        yield Piece(parameter, weight, piece.gradient[chosen], state, piece.scale)


def _direction(piece: Piece, group: dict[str, Any]) -> Tensor:
    """Gradient with momentum, in the dtype of the float32 weight."""
    return piece.with_momentum(piece.gradient.to(piece.weight.dtype), group)
