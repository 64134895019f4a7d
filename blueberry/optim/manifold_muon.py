"""Muon on manifolds: weights that keep orthonormal sides (`StiefelMuon`) or fixed norms (`HypersphereMuon`).

J. Bernstein, "Modular Manifolds", Thinking Machines Lab, 2025. See docs/manifold_muon.md for the equations.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import UsageError
from ..manifolds import Sphere, SphereMode, Stiefel, check_radius, is_wide, orthonormalize, tall
from ..stiefel import TangentStep, check_solver, steepest_tangent_step
from .finite import gradient_norms
from .manifold_weights import TOLERANCE, is_low_precision, put_on_manifold, radius_errors, stiefel_errors
from .muon import restore_state_dtype
from .splits import cut, join
from .workers import run_on_workers

# Matrix elements taken at once: on a CPU what stays in a core's cache, elsewhere what fills the device.
_BATCH_ELEMENTS = {"cpu": 2**19}
_BATCH_ELEMENTS_ELSEWHERE = 2**24


class _Piece(NamedTuple):
    """Some matrices of a parameter with what belongs to them: all views. `weight` is the float32 one."""

    parameter: Tensor
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    scale: float  # on the learning rate


class ManifoldOptimizer(Optimizer):
    """What the optimizers of this module share: checks, the skipping of bad steps, float32 copies of bf16 weights.

    Weights narrower than float32 have a float32 copy, `master_weight`, in the state: it is what keeps the constraint,
    and the weight is its rounding. State tensors are float32 (float64 for float64 weights).
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]):
        self._was_checked = False  # since construction or loading
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
                if exact.data_ptr() != parameter.data_ptr():
                    parameter.detach().copy_(exact)

    def exact_weight(self, parameter: Tensor) -> Tensor:
        """The weight that keeps the constraint: the float32 copy of a narrower one."""
        return self.state.get(parameter, {}).get("master_weight", parameter).detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_was_checked": self._was_checked}

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
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _check_once(self) -> None:
        """Weights that were loaded since construction may be off the manifold."""
        if not self._was_checked:
            for group in self.param_groups:
                for name, parameter in named(group):
                    self._settle(name, parameter, group, "after loading")
            self._was_checked = True

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["lr"] < 0:
            raise UsageError(f"lr={group['lr']} is negative: typical are 0.01 to 0.1")
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

    def _step_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _pieces(self, group: dict[str, Any]) -> Iterator[_Piece]:
        """Every parameter with a gradient, whole."""
        scales = group["lr_scales"] or [1.0] * len(group["params"])
        for parameter, scale in zip(group["params"], scales, strict=True):
            if parameter.grad is not None and parameter.numel():
                state = self._state_of(parameter, group)
                weight = state.get("master_weight", parameter)
                yield _Piece(parameter, weight, parameter.grad, state, scale)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, created when first asked for."""
        state = self.state[parameter]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        if is_low_precision(parameter) and "master_weight" not in state:
            state["master_weight"] = self._on_manifold(parameter.to(dtype), group)
        return state

    def _on_manifold(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


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
        tangency_tolerance: float = 0.1,
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

    def _batches(self, group: dict[str, Any]) -> Iterator[list[_Piece]]:
        """Pieces of one shape, dtype and device together; a stack of experts in slices."""
        alike: dict[Any, list[_Piece]] = {}
        for piece in self._pieces(group):
            for part in _slices(piece):
                weight = part.weight
                alike.setdefault((weight.shape, weight.dtype, weight.device), []).append(part)
        for pieces in alike.values():
            size = max(1, _batch_elements(pieces[0].weight) // pieces[0].weight.numel())
            for start in range(0, len(pieces), size):
                yield pieces[start : start + size]

    def _step_batch(self, pieces: list[_Piece], group: dict[str, Any]) -> list[TangentStep]:
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
            piece.weight.copy_(weight)
            if piece.parameter is not piece.weight:
                piece.parameter.copy_(weight)
        return solved

    def _step_part(
        self,
        pieces: list[_Piece],
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
        self, pieces: list[_Piece], index: int, count: int, short: int, group: dict[str, Any]
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


class HypersphereMuon(ManifoldOptimizer):
    """Muon for vectors of fixed norm: rows (embeddings, routers), columns, or matrices as a whole.

    Each vector turns by the angle arctan(lr) at most along its Riemannian momentum, scaled to unit length, and is put
    back on its sphere exactly. Momentum is projected onto the tangent space at every step (transport by projection).

    Args:
        params: parameters or groups of parameters with at least two dimensions.
        lr: length of a step relative to the radius.
        momentum, nesterov: as in Muon.
        beta2: the length of a vector's step is that of its momentum over the root of a running mean, of this decay,
            of its squared gradient norms, at most 1, so that vectors with rare or noisy gradients move less; 0 gives
            every vector that has a gradient a step of full length.
        mode: `per_row`, `per_column` or `whole`.
        radius: a number, or None to keep the norm that each vector has at the first step, in the state's `radius`.
            With None a zero vector (padding) stays zero; with a number it is refused.
        init_on_manifold: scale vectors whose norm is off by more than 1e-6 relative to the radius, at construction
            and, with a warning, after loading; False raises UsageError instead.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        beta2: float = 0.95,
        mode: SphereMode = "per_row",
        radius: float | None = None,
        init_on_manifold: bool = True,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "beta2": beta2,
            "mode": mode,
            "radius": radius,
            "init_on_manifold": init_on_manifold,
        }
        super().__init__(params, defaults)

    def _errors(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The largest relative error of the norms of its vectors, none before the first step has found the radius."""
        state = self.state.get(parameter, {})
        if group["radius"] is None and "radius" not in state:
            return torch.zeros(0, dtype=torch.float64)
        return radius_errors(self.exact_weight(parameter), self._sphere(state, group))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        Sphere(group["mode"], 1.0 if group["radius"] is None else group["radius"])
        if not 0 <= group["beta2"] < 1:
            raise UsageError(f"beta2={group['beta2']} is outside [0, 1): 0.95 is typical, 0 switches it off")

    def _settle(self, name: str, parameter: Tensor, group: dict[str, Any], when: str = "") -> None:
        state = self.state.get(parameter, {})
        if group["radius"] is None and "radius" not in state:
            return  # the first step finds it
        sphere = self._sphere(state, group)
        if group["radius"] is not None:
            self._refuse_zeros(name, parameter, sphere)
        errors = lambda weight: radius_errors(weight, sphere)
        repair = group["init_on_manifold"]
        put_on_manifold(name, parameter, errors, sphere.nearest_point, TOLERANCE["hypersphere_muon"], repair, when)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super()._state_of(parameter, group)
        if group["radius"] is None and "radius" not in state:
            state["radius"] = Sphere(group["mode"]).norm(parameter.detach())
        return state

    def _refuse_zeros(self, name: str, parameter: Tensor, sphere: Sphere) -> None:
        zeros = (sphere.norm(parameter.detach()) == 0).flatten().nonzero()
        if len(zeros):
            raise UsageError(
                f"{name} has a zero vector (number {zeros[0].item()}), which cannot be scaled to radius "
                f"{sphere.radius}: initialize it, or use radius=None to keep every vector's own norm"
            )

    def _sphere(self, state: dict[str, Tensor], group: dict[str, Any]) -> Sphere:
        return Sphere(group["mode"], state["radius"] if group["radius"] is None else group["radius"])

    def _on_manifold(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        return weight  # its norms define the radius, or were checked against it

    def _step_group(self, group: dict[str, Any]) -> None:
        for piece in self._pieces(group):
            sphere, weight = self._sphere(piece.state, group), piece.weight
            gradient = sphere.projection(weight, piece.gradient.to(weight.dtype))
            direction = sphere.projection(weight, _momentum(piece, gradient, group, sphere))
            lengths = self._lengths(sphere.norm(direction), sphere.norm(gradient), piece.state, group)
            size = -group["lr"] * piece.scale * sphere.radius
            weight.copy_(sphere.retraction(weight, direction * (size * lengths).to(weight.dtype)))
            if piece.parameter is not weight:
                piece.parameter.copy_(weight)

    def _lengths(self, norm: Tensor, gradient_norm: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Factors that give every vector's direction the length it moves, in radii per lr."""
        if not group["beta2"]:
            return torch.where(norm > 0, 1 / norm, 0.0)
        if "gradient_norm_squared" not in state:
            state["gradient_norm_squared"] = gradient_norm.square()
        mean = state["gradient_norm_squared"].lerp_(gradient_norm.square(), 1 - group["beta2"])
        return torch.where(mean > 0, 1 / mean.sqrt().maximum(norm), 0.0)


def named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of a group; `params[i]` where it was given no names."""
    names = group.get("param_names", [f"params[{i}]" for i in range(len(group["params"]))])
    return zip(names, group["params"], strict=True)


def _dual_name(part: int) -> str:
    """Of the first part of a weight `dual_variable`, as most have one part only."""
    return f"dual_variable_{part}" if part else "dual_variable"


def _batch_elements(weight: Tensor) -> int:
    return _BATCH_ELEMENTS.get(weight.device.type, _BATCH_ELEMENTS_ELSEWHERE)


def _slices(piece: _Piece) -> Iterator[_Piece]:
    """A stack of experts in slices of at most a batch each; a matrix as it is."""
    if piece.weight.ndim == 2:
        yield piece
        return
    experts = max(1, _batch_elements(piece.weight) // piece.weight[0].numel())
    for start in range(0, len(piece.weight), experts):
        chosen = slice(start, start + experts)
        state = {name: tensor[chosen] for name, tensor in piece.state.items()}
        parameter = piece.parameter[chosen]
        weight = parameter if piece.weight is piece.parameter else piece.weight[chosen]
        yield _Piece(parameter, weight, piece.gradient[chosen], state, piece.scale)


def _direction(piece: _Piece, group: dict[str, Any]) -> Tensor:
    """Gradient with momentum, in the dtype of the float32 weight."""
    return _momentum(piece, piece.gradient.to(piece.weight.dtype), group)


def _momentum(piece: _Piece, gradient: Tensor, group: dict[str, Any], sphere: Sphere | None = None) -> Tensor:
    """What Muon steps along; with a sphere the buffer is carried over to the tangent space at the present point."""
    momentum = group["momentum"]
    if momentum == 0:
        return gradient
    buffer = piece.state["momentum_buffer"]
    if sphere is not None:
        buffer.copy_(sphere.projection(piece.weight, buffer))
    buffer.lerp_(gradient, 1 - momentum)
    return gradient.lerp(buffer, momentum) if group["nesterov"] else buffer


def _check_parameter(optimizer: str, name: str, parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if parameter.ndim not in (2, 3):
        raise UsageError(f"{name} has shape {shape}: {optimizer} takes matrices (out, in) and stacks (experts, out, "
                         "in); give it to AdamW")  # fmt: skip
    if not parameter.is_floating_point():
        raise UsageError(f"{name} is {parameter.dtype}: {optimizer} takes real floating-point parameters")
    if isinstance(parameter, DTensor):
        raise UsageError(f"{name} is sharded: {optimizer} needs whole matrices, train with DDP")
