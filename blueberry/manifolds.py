"""Pure maths of two manifolds: matrices with orthonormal short side (`Stiefel`) and vectors of fixed norm (`Sphere`).

Names follow the textbooks: `projection` of a vector onto the tangent space at a point, `retraction` from a point along
a tangent vector back onto the manifold, `distance` of any matrix to the manifold. All work on stacks (..., out, in).
P.-A. Absil, R. Mahony, R. Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, sections 3.3 to 4.1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import UsageError

SphereMode = Literal["per_row", "per_column", "whole"]

_MAX_POLAR_STEPS = 12
_SERIES_CONVERGES = 0.5  # norm_F(X^T X - I) from which three terms of the series (I + R)^(-1/2) shrink R to R^3


@dataclass(frozen=True)
class Stiefel:
    """Matrices whose short side is orthonormal up to `radius`: W^T W = radius^2 I if tall, W W^T = radius^2 I if wide.

    All singular values are `radius`. Tangent vectors A at W satisfy W^T A + A^T W = 0 (tall); the metric is Euclidean.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        check_radius(self.radius)

    def projection(self, point: Tensor, vector: Tensor) -> Tensor:
        """The tangent vector at `point` nearest to `vector`, both (..., out, in): Z - W sym(W^T Z) / radius^2."""
        w, z = tall(point), tall(vector)
        inner = w.mT @ z  # (..., short, short)
        tangent = z - w @ ((inner + inner.mT) / (2 * self.radius**2))
        return tangent.mT if is_wide(point) else tangent

    def retraction(self, point: Tensor, tangent: Tensor) -> Tensor:
        """The point nearest to `point + tangent`, the polar retraction; agrees with it to second order."""
        return self.nearest_point(point + tangent)

    def nearest_point(self, matrix: Tensor) -> Tensor:
        """The point nearest to any matrix of full rank, its polar factor; UsageError for a rank-deficient one."""
        factor = self.radius * orthonormalize(tall(matrix) / self.radius)
        return factor.mT if is_wide(matrix) else factor

    def orthogonality_error(self, point: Tensor) -> Tensor:
        """norm_F(W^T W / radius^2 - I) over the short side, in float64: (..., out, in) -> (...)."""
        return torch.linalg.matrix_norm(gram_residual(tall(point).double() / self.radius))

    def distance(self, matrix: Tensor) -> Tensor:
        """Frobenius distance of any matrix to the manifold, in float64: (sum (sigma_i - radius)^2)^(1/2)."""
        return (torch.linalg.svdvals(matrix.double()) - self.radius).norm(dim=-1)

    def random_point(
        self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A uniform (Haar) sample of shape (..., out, in): the polar factor of a Gaussian matrix."""
        gaussian = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return self.nearest_point(gaussian).to(dtype)


@dataclass(frozen=True, eq=False)
class Sphere:
    """Matrices whose rows (`per_row`), columns (`per_column`) or entries together (`whole`) have norm `radius`.

    `radius` is a number, or a tensor with one entry for each vector, such as (..., out, 1) for rows.
    """

    mode: SphereMode = "per_row"
    radius: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if self.mode not in SPHERE_DIMS:
            raise UsageError(f"mode={self.mode!r} is unknown: use one of {', '.join(SPHERE_DIMS)}")
        if not isinstance(self.radius, Tensor):
            check_radius(self.radius)

    def projection(self, point: Tensor, vector: Tensor) -> Tensor:
        """The tangent vector at `point` nearest to `vector`: z - x <x, z> / <x, x>."""
        inner, square = self._inner(point, vector), self._inner(point, point)
        return vector - point * (inner / square.clamp_min(torch.finfo(point.dtype).tiny))

    def retraction(self, point: Tensor, tangent: Tensor) -> Tensor:
        """The point nearest to `point + tangent`."""
        return self.nearest_point(point + tangent)

    def nearest_point(self, matrix: Tensor) -> Tensor:
        """Each vector scaled to its radius. A zero vector has no nearest point: it stays zero."""
        norm = self.norm(matrix)
        return matrix * torch.where(norm > 0, self.radius / norm, 0.0).to(matrix.dtype)

    def norm(self, matrix: Tensor) -> Tensor:
        """Norm of each vector with its dimensions kept, such as (..., out, 1), in float32 at least."""
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        return torch.linalg.vector_norm(matrix, dim=SPHERE_DIMS[self.mode], keepdim=True, dtype=dtype)

    def distance(self, matrix: Tensor) -> Tensor:
        """|norm - radius| of each vector, in float64, dimensions kept."""
        return (self.norm(matrix.double()) - self.radius).abs()

    def radius_error(self, matrix: Tensor) -> Tensor:
        """Largest |norm - radius| / radius of the vectors of each matrix, in float64: (..., out, in) -> (...).

        A vector of radius 0 counts with |norm|.
        """
        radius = torch.as_tensor(self.radius, dtype=torch.float64, device=matrix.device)
        return (self.distance(matrix) / torch.where(radius > 0, radius, 1.0)).amax(dim=(-2, -1))

    def random_point(
        self, *shape: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A uniform sample of shape (..., out, in): Gaussian vectors scaled to the radius."""
        return self.nearest_point(torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    def _inner(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dim=SPHERE_DIMS[self.mode], keepdim=True)


SPHERE_DIMS: dict[str, tuple[int, ...]] = {"per_row": (-1,), "per_column": (-2,), "whole": (-2, -1)}


def check_radius(radius: float) -> None:
    """Raise UsageError unless `radius` is a positive number."""
    if not 0 < radius < float("inf"):
        raise UsageError(f"radius={radius} is not a positive number: 1 gives singular values or norms of 1")


def is_wide(matrix: Tensor) -> bool:
    """More columns than rows: the rows are the short side."""
    return matrix.shape[-1] > matrix.shape[-2]


def tall(matrix: Tensor) -> Tensor:
    """(..., long, short): a view, transposed if wide."""
    return matrix.mT if is_wide(matrix) else matrix


def gram_residual(x: Tensor) -> Tensor:
    """X^T X - I of (..., long, short)."""
    residual = x.mT @ x
    residual.diagonal(dim1=-2, dim2=-1).sub_(1)
    return residual


def orthonormalize(x: Tensor, tolerance: float | None = None) -> Tensor:
    """Polar factor X (X^T X)^(-1/2) of each matrix in a stack (..., long, short), to the accuracy of its dtype.

    Near the manifold, with R = X^T X - I, the step X (I - R/2 + 3/8 R^2), the Newton-Schulz step with coefficients
    (15/8, -10/8, 3/8), leaves 5/8 R^3: one is enough after a step of training. Farther away the inverse root is taken
    exactly, in float64. Returns a matrix whose norm_F(X^T X - I) is within `tolerance`, by default a few rounding
    errors, unchanged if it is there already. UsageError for a matrix without full rank, which has no unique factor.
    """
    if tolerance is None:
        tolerance = 4 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5
    for _ in range(_MAX_POLAR_STEPS):
        residual = gram_residual(x)
        error = torch.linalg.matrix_norm(residual).max().item() if x.numel() else 0.0
        if error <= tolerance:
            return x
        if not error < _SERIES_CONVERGES:
            x = _exact_polar_factor(x)
        else:
            x = x + x @ (0.375 * residual @ residual - 0.5 * residual)
            if error**3 <= tolerance:
                return x
    return x


def _exact_polar_factor(x: Tensor) -> Tensor:
    """X V diag(1 / sigma) V^T from the eigenvalues sigma^2 of X^T X, in float64, in the dtype of `x`."""
    wide = x.double()
    scale = wide.abs().amax(dim=(-2, -1), keepdim=True)
    if not (scale.isfinite() & (scale > 0)).all():
        raise UsageError(
            f"a matrix of shape {tuple(x.shape)} is zero or not finite: it has no nearest orthonormal one"
        )
    wide = wide / scale
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)  # ascending
    if (squares[..., 0] <= 1e-14 * squares[..., -1]).any():
        raise UsageError(
            f"a matrix of shape {tuple(x.shape)} has a condition number above 1e7 or is rank-deficient, so it has no "
            "unique nearest orthonormal one: initialize it with random values"
        )
    return (wide @ ((vectors * squares.rsqrt().unsqueeze(-2)) @ vectors.mT)).to(x.dtype)
