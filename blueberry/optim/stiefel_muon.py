"""`StiefelMuon`: Muon for weights that keep orthonormal sides.

J. Bernstein, "Modular Manifolds", Thinking Machines Lab, 2025. See docs/manifold_muon.md for the equations.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..manifolds import Stiefel, check_radius, is_wide, orthonormalize, tall
from ..stiefel import TangentStep, check_solver, steepest_tangent_step
from .batching import expert_slices, in_batches, step_batches
from .costs import tangent_step_flops
from .distributed import Anyhow, Holding, Slabs, Task, groups_of, holding, local, new_state, slab_of
from .finite import whole
from .manifold_base import ManifoldOptimizer, Piece
from .manifold_weights import TOLERANCE, put_on_manifold, stiefel_errors
from .splits import cut, join

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
        return stiefel_errors(whole(self.exact_weight(parameter)), group["radius"], group["layout"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_radius(group["radius"])
        check_solver(group["solver"], group["dual_steps"], group["dual_lr"], group["tangency_tolerance"])

    def _settle(self, name: str, parameter: Tensor, group: dict[str, Any], when: str = "") -> None:
        errors = lambda weight: stiefel_errors(weight, group["radius"], group["layout"])
        nearest = lambda weight: self._on_manifold(weight, group)
        repair = group["init_on_manifold"]
        put_on_manifold(name, parameter, errors, nearest, TOLERANCE["stiefel_muon"], repair, when)

    def _on_manifold(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        manifold = Stiefel(group["radius"])
        return join([manifold.nearest_point(part) for part in cut(weight, group["layout"])], group["layout"])

    def _holding(self, parameter: Tensor, group: dict[str, Any]) -> Holding:
        return holding(parameter, self.replicas)

    def _pieces(self, group: dict[str, Any]) -> Iterator[Piece]:
        """As the base has them; stacks of experts in slices."""
        for piece in super()._pieces(group):
            yield from _slices(piece)

    def _step_alone(self, pieces: list[Piece]) -> None:
        self._solved = {id(group): [] for group in self.param_groups}

        def step(batch: list[Piece]) -> None:
            directions = torch.stack([_direction(piece) for piece in batch])
            for piece, weight in zip(batch, self._moved(batch, directions), strict=True):
                piece.move_to(weight)

        step_batches(step, list(in_batches(pieces, _fitting)))

    def _task(self, piece: Piece) -> Task:
        """The weight travels, its dual variables and its direction; the first two come back."""
        group, shape = piece.group, tuple(piece.shape)
        weight = slab_of(piece.holding, shape)
        duals = [slab_of(piece.holding, of_part, is_state=True) for of_part in _dual_shapes(shape, group).values()]
        flops = tangent_step_flops(shape, group["layout"], group["dual_steps"])
        return Task(piece, (weight, *duals, weight), 1 + len(duals), flops, piece.weight.dtype, piece.weight.device)

    def _load(self, piece: Piece) -> list[Tensor]:
        duals = [piece.state[name] for name in _dual_shapes(piece.shape, piece.group)]
        return [piece.weight, *duals, _direction(piece)]

    def _work(self, pieces: list[Piece], wholes: list[list[Tensor]]) -> list[list[Tensor]]:
        """New weights and dual variables."""
        together = [
            _with_whole(piece, weight, duals, direction)
            for piece, (weight, *duals, direction) in zip(pieces, wholes, strict=True)
        ]
        moved: dict[int, Tensor] = {}

        def step(batch: list[Piece]) -> None:
            directions = torch.stack([piece.gradient for piece in batch])
            moved.update(zip(map(id, batch), self._moved(batch, directions), strict=True))

        step_batches(step, list(in_batches(together, _fitting)))
        return [[moved[id(piece)], *piece.state.values()] for piece in together]

    def _store(self, piece: Piece, results: list[Tensor]) -> None:
        weight, *duals = results
        piece.move_to(weight)
        for name, dual in zip(_dual_shapes(piece.shape, piece.group), duals, strict=True):
            piece.state[name].copy_(dual)

    def _after_step(self) -> None:
        """Note how far the solver came in each group, over all ranks."""
        numbers = torch.tensor([_summary(self._solved[id(group)]) for group in self.param_groups])
        example = self.param_groups[0]["params"][0]
        numbers = numbers.to(local(example).device)
        residuals, sums = numbers[:, 0].contiguous(), numbers[:, 1:].contiguous()
        for ranks in groups_of(example, self.replicas):
            dist.all_reduce(residuals, dist.ReduceOp.MAX, group=ranks)
            dist.all_reduce(sums, group=ranks)
        for group, residual, (iterations, matrices) in zip(
            self.param_groups, residuals.tolist(), sums.tolist(), strict=True
        ):
            group["tangency_residual"] = residual
            group["dual_iterations"] = iterations / matrices if matrices else 0.0

    def _moved(self, pieces: list[Piece], directions: Tensor) -> Sequence[Tensor]:
        """The new weights of whole pieces of one kind; their dual variables change in place."""
        layout = pieces[0].group["layout"]
        parts = cut(directions, layout)
        weights = cut(torch.stack([piece.weight for piece in pieces]), layout)
        moved = [self._move_part(pieces, *of_part) for of_part in zip(range(len(parts)), weights, parts, strict=True)]
        return join(moved, layout).unbind()

    def _move_part(
        self,
        pieces: list[Piece],
        index: int,
        weight: Tensor,  # (pieces, ..., out, in)
        direction: Tensor,
    ) -> Tensor:
        """The new weights of one part of every piece."""
        group = pieces[0].group
        long_first = tall(weight)
        points = long_first.reshape(-1, *long_first.shape[-2:]) / group["radius"]  # (batch, long, short)
        dual = self._dual_variables(pieces, index, len(points) // len(pieces), points.shape[-1])
        step = self.solve(points, tall(direction).reshape(points.shape), dual, group)
        scales = torch.tensor([piece.scale for piece in pieces], dtype=weight.dtype, device=weight.device)
        sizes = scales.repeat_interleave(len(points) // len(pieces)) * (-group["lr"] / group["radius"])
        new = self.retract(points, step.direction * sizes[:, None, None]) * group["radius"]
        if dual is not None:
            for piece, value in zip(pieces, step.dual_variable.unflatten(0, (len(pieces), -1)), strict=True):
                piece.state[_dual_name(index)].copy_(value.view_as(piece.state[_dual_name(index)]))
        if weight.shape[-1] != weight.shape[-2]:
            self._solved[id(group)].append(step)
        new = new.view(long_first.shape)
        return new.mT if is_wide(weight) else new

    def _dual_variables(self, pieces: list[Piece], index: int, count: int, short: int) -> Tensor | None:
        """(pieces * count, short, short), zeros at first; None where the solution is in closed form."""
        name = _dual_name(index)
        if name not in pieces[0].state:
            return None
        return torch.cat([piece.state[name].reshape(count, short, short) for piece in pieces])

    def _state_of(self, parameter: Tensor, held: Holding, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super()._state_of(parameter, held, group)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        for name, shape in _dual_shapes(parameter.shape, group).items():
            if name not in state:
                state[name] = new_state(parameter, held, shape, dtype)
        return state


def _dual_shapes(shape: Sequence[int], group: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape (..., short, short) of the dual variable of each part of a weight that is not square."""
    if group["solver"] == "projected":
        return {}
    parts = [part.shape for part in cut(torch.empty(tuple(shape), device="meta"), group["layout"])]
    return {
        _dual_name(index): (*part[:-2], min(part[-2:]), min(part[-2:]))
        for index, part in enumerate(parts)
        if part[-2] != part[-1]
    }


def _dual_name(part: int) -> str:
    """Of the first part of a weight `dual_variable`, as most have one part only."""
    return f"dual_variable_{part}" if part else "dual_variable"


def _summary(solved: list[TangentStep]) -> tuple[float, float, float]:
    """(largest residual, sum of the iterations of every matrix, matrices)."""
    matrices = [len(step.residual) for step in solved]
    iterations = sum(step.iterations * count for step, count in zip(solved, matrices, strict=True))
    return max((step.residual.max().item() for step in solved), default=0.0), float(iterations), float(sum(matrices))


def _fitting(weight: Tensor) -> int:
    """How many weights like this one a batch may have, at least one."""
    elements = _BATCH_ELEMENTS.get(weight.device.type, _BATCH_ELEMENTS_ELSEWHERE)
    return max(1, elements // weight.numel())


def _slices(piece: Piece) -> Iterator[Piece]:
    """A stack of experts in slices of at most a batch each, as many as there are ranks to share them; a matrix as it
    is, and so a stack that is cut through its matrices."""
    if piece.weight.ndim == 2 or isinstance(piece.holding, Slabs | Anyhow):
        yield piece
        return
    for chosen in expert_slices(piece.weight, _fitting, piece.holding.ranks):
        state = {name: tensor[chosen] for name, tensor in piece.state.items()}
        parameter = piece.parameter[chosen]
        weight = parameter if piece.weight is piece.parameter else piece.weight[chosen]
        yield piece._replace(
            parameter=parameter, weight=weight, gradient=piece.gradient[chosen], state=state, shape=weight.shape
        )


def _with_whole(piece: Piece, weight: Tensor, duals: list[Tensor], direction: Tensor) -> Piece:
    """A piece with whole tensors in the place of slabs; the direction takes that of the gradient."""
    state = dict(zip(_dual_shapes(piece.shape, piece.group), duals, strict=True))
    return piece._replace(weight=weight, gradient=direction, state=state)


def _direction(piece: Piece) -> Tensor:
    """Gradient with momentum, in the dtype of the float32 weight."""
    return piece.with_momentum(piece.gradient.to(piece.weight.dtype))
