"""`HypersphereMuon`: Muon for vectors of fixed norm.

J. Bernstein, "Modular Manifolds", Thinking Machines Lab, 2025. See docs/manifold_muon.md for the equations.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..manifolds import SPHERE_DIMS, Sphere, SphereMode
from .distributed import Alone, Holding, Task, copy_whole, holding, new_state, slab_of
from .finite import whole
from .manifold_base import ManifoldOptimizer, Piece
from .manifold_weights import TOLERANCE, put_on_manifold, radius_errors

_OF_VECTORS = ("radius", "gradient_norm_squared")  # state with one number for each vector


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
        state = {name: whole(tensor) for name, tensor in state.items()}
        return radius_errors(state.get("master_weight", whole(parameter.detach())), self._sphere(state, group))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        Sphere(group["mode"], 1.0 if group["radius"] is None else group["radius"])
        if not 0 <= group["beta2"] < 1:
            raise UsageError(f"beta2={group['beta2']} is outside [0, 1): 0.95 is typical, 0 switches it off")

    def _settle(self, name: str, parameter: Tensor, group: dict[str, Any], when: str = "") -> None:
        state = self.state.get(parameter, {})
        if group["radius"] is None and "radius" not in state:
            return  # the first step finds it
        sphere = self._sphere({name: whole(tensor) for name, tensor in state.items()}, group)
        if group["radius"] is not None:
            self._refuse_zeros(name, parameter, sphere)
        errors = lambda weight: radius_errors(weight, sphere)
        repair = group["init_on_manifold"]
        put_on_manifold(name, parameter, errors, sphere.nearest_point, TOLERANCE["hypersphere_muon"], repair, when)

    def _state_of(self, parameter: Tensor, held: Holding, group: dict[str, Any]) -> dict[str, Tensor]:
        """Radii are those of the first step; a mean of squared norms below 0 stands for none yet."""
        state = super()._state_of(parameter, held, group)
        shape = _norms_shape(parameter.shape, group["mode"])
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if group["radius"] is None and "radius" not in state:
            state["radius"] = new_state(parameter, held, shape, dtype)
            copy_whole(state["radius"], Sphere(group["mode"]).norm(whole(parameter.detach())))
        if group["beta2"] and "gradient_norm_squared" not in state:
            state["gradient_norm_squared"] = new_state(parameter, held, shape, dtype).fill_(-1.0)
        return state

    def _refuse_zeros(self, name: str, parameter: Tensor, sphere: Sphere) -> None:
        zeros = (sphere.norm(whole(parameter.detach())) == 0).flatten().nonzero()
        if len(zeros):
            raise UsageError(
                f"{name} has a zero vector (number {zeros[0].item()}), which cannot be scaled to radius "
                f"{sphere.radius}: initialize it, or use radius=None to keep every vector's own norm"
            )

    def _sphere(self, state: dict[str, Tensor], group: dict[str, Any]) -> Sphere:
        return Sphere(group["mode"], state["radius"] if group["radius"] is None else group["radius"])

    def _on_manifold(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        return weight  # its norms define the radius, or were checked against it

    def _holding(self, parameter: Tensor, group: dict[str, Any]) -> Holding:
        """Work on vectors is too little to be shared: whole ones are stepped by every rank that has them."""
        held = holding(parameter, None)
        if isinstance(parameter, DTensor) and not isinstance(held, Alone):
            cut = {placement.dim for placement in parameter.placements if not placement.is_replicate()}
            if not cut & {dim % parameter.ndim for dim in SPHERE_DIMS[group["mode"]]}:
                return Alone()
        return held

    def _step_alone(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            piece.move_to(self._moved(piece))

    def _task(self, piece: Piece) -> Task:
        """Weight, state and gradient travel; the first two come back."""
        weight = slab_of(piece.holding, tuple(piece.shape))
        norms = slab_of(piece.holding, _norms_shape(piece.shape, piece.group["mode"]), is_state=True)
        state = [norms if name in _OF_VECTORS else weight for name in _state_names(piece)]
        size = piece.shape.numel()
        return Task(piece, (weight, *state, weight), 1 + len(state), size, piece.weight.dtype, piece.weight.device)

    def _load(self, piece: Piece) -> list[Tensor]:
        return [piece.weight, *(piece.state[name] for name in _state_names(piece)), piece.gradient]

    def _work(self, pieces: list[Piece], wholes: list[list[Tensor]]) -> list[list[Tensor]]:
        results = []
        for piece, (weight, *values, gradient) in zip(pieces, wholes, strict=True):
            state = dict(zip(_state_names(piece), values, strict=True))
            weight = self._moved(piece._replace(weight=weight, gradient=gradient, state=state))
            results.append([weight, *state.values()])
        return results

    def _store(self, piece: Piece, results: list[Tensor]) -> None:
        weight, *state = results
        piece.move_to(weight)
        for name, value in zip(_state_names(piece), state, strict=True):
            piece.state[name].copy_(value)

    def _moved(self, piece: Piece) -> Tensor:
        """The new weight of a piece with whole vectors; its state changes in place."""
        group, weight = piece.group, piece.weight
        sphere = self._sphere(piece.state, group)
        gradient = sphere.projection(weight, piece.gradient.to(weight.dtype))
        if group["momentum"]:  # transport by projection onto the tangent space at the present point
            buffer = piece.state["momentum_buffer"]
            buffer.copy_(sphere.projection(weight, buffer))
        direction = sphere.projection(weight, piece.with_momentum(gradient))
        lengths = self._lengths(sphere.norm(direction), sphere.norm(gradient), piece)
        size = -group["lr"] * piece.scale * sphere.radius
        return sphere.retraction(weight, direction * (size * lengths).to(weight.dtype))

    def _lengths(self, norm: Tensor, gradient_norm: Tensor, piece: Piece) -> Tensor:
        """Factors that give every vector's direction the length it moves, in radii per lr."""
        beta2 = piece.group["beta2"]
        if not beta2:
            return torch.where(norm > 0, 1 / norm, 0.0)
        mean, square = piece.state["gradient_norm_squared"], gradient_norm.square()
        mean.copy_(torch.where(mean < 0, square, mean.lerp(square, 1 - beta2)))
        return torch.where(mean > 0, 1 / mean.sqrt().maximum(norm), 0.0)


def _norms_shape(shape: Sequence[int], mode: SphereMode) -> tuple[int, ...]:
    """Of one number for each vector, dimensions kept."""
    reduced = {dim % len(shape) for dim in SPHERE_DIMS[mode]}
    return tuple(1 if dim in reduced else size for dim, size in enumerate(shape))


def _state_names(piece: Piece) -> list[str]:
    """What of the state travels: not the copy of the weight, which does so itself."""
    return [name for name in piece.state if name != "master_weight"]
