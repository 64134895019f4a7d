"""How far weights are from their manifold, and putting them on it."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UsageError
from ..manifolds import Sphere, Stiefel, tall
from .distributed import copy_whole
from .finite import whole
from .splits import cut

TOLERANCE = {"stiefel_muon": 1e-4, "hypersphere_muon": 1e-6}


def is_low_precision(weight: Tensor) -> bool:
    """Narrower than float32: the weight is the rounding of a float32 copy."""
    return weight.dtype not in (torch.float32, torch.float64)


def stiefel_errors(weight: Tensor, radius: float, layout: tuple | None) -> Tensor:
    """norm_F(W^T W / radius^2 - I) of each matrix that a weight holds, float64: (matrices,)."""
    parts = cut(weight, layout)
    return torch.cat([Stiefel(radius).orthogonality_error(part).flatten() for part in parts])


def stiefel_singular_values(weight: Tensor, radius: float, layout: tuple | None) -> Tensor:
    """(least, largest) singular value of each matrix over the radius, float64: (matrices, 2)."""
    ranges = []
    for part in cut(weight, layout):
        matrix = tall(part).double() / radius
        squares = torch.linalg.eigvalsh(matrix.mT @ matrix).clamp_min(0)  # ascending
        ranges.append(squares[..., [0, -1]].sqrt().reshape(-1, 2))
    return torch.cat(ranges)


def radius_errors(weight: Tensor, sphere: Sphere) -> Tensor:
    """Largest |norm - radius| / radius of the vectors of each matrix, float64: (matrices,)."""
    return sphere.radius_error(weight).flatten()


def rounding_bound(weight: Tensor) -> float:
    """What rounding a matrix on the manifold to the dtype of `weight` can add to its constraint error, at most.

    Stiefel, (..., out, in): norm_F(E) <= u norm_F(W) = u sqrt(short) with the unit roundoff u, and so
    norm_F(W^T W - I) <= 2 u sqrt(short) + u^2 short. A sphere's error, at most u, is below it.
    """
    if not is_low_precision(weight):
        return 0.0
    change = torch.finfo(weight.dtype).eps / 2 * min(weight.shape[-2:]) ** 0.5
    return 2 * change + change**2


@torch.no_grad()
def put_on_manifold(
    name: str,
    parameter: Tensor,
    errors: Callable[[Tensor], Tensor],
    nearest: Callable[[Tensor], Tensor],
    tolerance: float,
    repair: bool,
    when: str = "",
) -> None:
    """Replace a weight by the nearest point of its manifold unless it is there within `tolerance`, so bit for bit.

    Raises UsageError when it is off and `repair` is False, or when there is no nearest point; warns if `when` is set.
    """
    present = whole(parameter.detach())
    worst = errors(present).max().item() if present.numel() else 0.0
    tolerance += rounding_bound(parameter)
    if worst <= tolerance:
        return
    if not repair:
        raise UsageError(f"{name} is off its manifold by {worst:.3g}, more than {tolerance:.3g}: use "
                         "init_on_manifold=True to project it")  # fmt: skip
    wide = present.to(torch.promote_types(parameter.dtype, torch.float32))
    try:
        copy_whole(parameter, nearest(wide))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    if when:
        warnings.warn(f"{name} was off its manifold by {worst:.3g} {when}: projected", stacklevel=6)
