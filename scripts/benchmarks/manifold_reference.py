"""The manifold Muon of Thinking Machines, rebuilt from its published description, to compare with.

J. Bernstein, "Modular Manifolds", Thinking Machines Lab, 2025: dual ascent with a step that decays from `alpha` to 0
over at most 100 steps from L = -(W^T G + G^T W)/4, every polar factor by ten steps of Polar Express in bfloat16, the
retraction too. One matrix at a time, without warm start.
"""

import torch
from torch import Tensor

from blueberry.polar import newton_schulz

ALPHA = 0.01


def reference_direction(
    point: Tensor, gradient: Tensor, steps: int = 100, tolerance: float = 1e-6
) -> tuple[Tensor, int]:
    """The A, (long, short), that the reference descends along, and its iterations. `ALPHA` is absolute: see
    `favourable`."""
    inner = point.T @ gradient
    dual = (inner + inner.T) / -4
    for step in range(steps):
        direction = polar_express(gradient + 2 * point @ dual)
        violation = point.T @ direction
        violation = violation + violation.T
        if violation.square().mean().sqrt() < tolerance:
            break
        dual = dual - ALPHA * (1 - step / steps) * violation
    return direction, step + 1


def reference_step(point: Tensor, gradient: Tensor, lr: float = 0.02) -> Tensor:
    """The next weight."""
    return polar_express(point - lr * reference_direction(point, gradient)[0])


def favourable(gradient: Tensor) -> Tensor:
    """The gradient at the scale where `ALPHA` serves the reference best: a tenth of the mean singular value."""
    return gradient * (10 * ALPHA / torch.linalg.svdvals(gradient).mean())


def polar_express(matrix: Tensor) -> Tensor:
    """Five steps of the published coefficients, then five of (15/8, -10/8, 3/8), to which they converge."""
    x = newton_schulz(matrix.bfloat16(), 5, "polar_express", torch.bfloat16)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(5):
        gram = x.mT @ x
        x = x @ (1.875 * eye - 1.25 * gram + 0.375 * gram @ gram)
    return x.to(matrix.dtype)
