"""Norms of gradients, and whether gradients are finite."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norms(gradients: Mapping[float, Sequence[Tensor]]) -> tuple[dict[float, Tensor], float]:
    """Norm of each list of gradients, and the norm of all of them as a number: the one wait for the device.

    The total is inf or NaN exactly if an entry is: a float32 norm that overflows over finite entries is computed
    again in float64.
    """
    norms = {key: whole(get_total_norm(some)) for key, some in gradients.items()}
    total = _combine(norms.values())
    if not torch.isfinite(torch.tensor(total)):
        norms = {key: whole(_wide_norm(some)) for key, some in gradients.items()}
        total = _combine(norms.values())
    return norms, total


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Name of the first tensor with an inf or NaN in it; `"none"` if there is none."""
    return next((name for name, tensor in named if not whole(tensor.isfinite().all())), "none")


def _combine(norms: Iterable[Tensor]) -> float:
    norms = list(norms)
    device = norms[0].device
    return (
        torch.stack([norm.to(device, torch.promote_types(norm.dtype, torch.float32)) for norm in norms]).norm().item()
    )


def _wide_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm in float64, whose range is twice that of float32 in the exponent's square."""
    device = gradients[0].device
    norms = [whole(torch.linalg.vector_norm(gradient, dtype=torch.float64)).to(device) for gradient in gradients]
    return torch.stack(norms).norm()


def whole(value: Tensor) -> Tensor:
    """A reduction over shards as a plain tensor; every rank of the mesh takes part."""
    return value.full_tensor() if isinstance(value, DTensor) else value
