"""Floating-point operations of the optimizers' maths, counted by torch on tensors without storage."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..polar import newton_schulz
from .splits import cut


@cache
def newton_schulz_flops(
    shape: tuple[int, ...],
    layout: tuple | None = None,
    ns_steps: int | None = None,
    coefficients: str = "robust",
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Operations of `newton_schulz` on all matrices of a weight (..., out, in); `dtype` of the products."""
    weight = torch.empty(shape, dtype=dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        for part in cut(weight, layout):
            newton_schulz(part, ns_steps, coefficients, dtype)
    return counter.get_total_flops()


@cache
def tangent_step_flops(shape: tuple[int, ...], layout: tuple | None, dual_steps: int) -> float:
    """About what a step of StiefelMuon takes, to balance ranks by: 20 short^3 an iteration (an eigendecomposition and
    products with its vectors), and ten products with the long side."""
    total = 0.0
    for part in cut(torch.empty(shape, device="meta"), layout):
        short, long = sorted(part.shape[-2:])
        steps = 1 if short == long else dual_steps
        total += part.numel() / (short * long) * (20 * steps * short**3 + 20 * long * short**2)
    return total
