"""`HypersphereMuon`: Muon for vectors of fixed norm.

J. Bernstein, "Modular Manifolds", Thinking Machines Lab, 2025. See docs/manifold_muon.md for the equations.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..manifolds import Sphere, SphereMode
from .manifold_base import ManifoldOptimizer
from .manifold_weights import TOLERANCE, put_on_manifold, radius_errors


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
            if group["momentum"]:  # transport by projection onto the tangent space at the present point
                buffer = piece.state["momentum_buffer"]
                buffer.copy_(sphere.projection(weight, buffer))
            direction = sphere.projection(weight, piece.with_momentum(gradient, group))
            lengths = self._lengths(sphere.norm(direction), sphere.norm(gradient), piece.state, group)
            size = -group["lr"] * piece.scale * sphere.radius
            piece.move_to(sphere.retraction(weight, direction * (size * lengths).to(weight.dtype)))

    def _lengths(self, norm: Tensor, gradient_norm: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Factors that give every vector's direction the length it moves, in radii per lr."""
        if not group["beta2"]:
            return torch.where(norm > 0, 1 / norm, 0.0)
        if "gradient_norm_squared" not in state:
            state["gradient_norm_squared"] = gradient_norm.square()
        mean = state["gradient_norm_squared"].lerp_(gradient_norm.square(), 1 - group["beta2"])
        return torch.where(mean > 0, 1 / mean.sqrt().maximum(norm), 0.0)
