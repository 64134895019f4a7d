"""Products known to be symmetric, from three quarters of the operations."""

from itertools import repeat

import torch
from torch import Tensor

from .scratch import Scratch

MIN_ROWS, MIN_COLUMNS = 384, 512  # below, moving the mirrored quarter takes what the products save (measured)


def symmetric_product(
    left: Tensor,
    right: Tensor,
    scratch: Scratch | None,
    out: Tensor | None,
    addend: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """alpha left right + beta addend, in exact arithmetic symmetric: (batch, n, k), (batch, k, n) -> (batch, n, n).

    `out`, memory from `scratch`, may be the memory of the addend. A CPU computes the upper half of the rows and the
    last quarter, and mirrors the rest, one matrix at a time; other devices like one large product better.
    """
    rows, columns = left.shape[-2:]
    if scratch is None or out is None or out.device.type != "cpu" or rows < MIN_ROWS or columns < MIN_COLUMNS:
        if addend is None:
            return torch.bmm(left, right, out=out)
        return torch.baddbmm(addend, left, right, beta=beta, alpha=alpha, out=out)
    _three_quarters(left, right, scratch, out, addend, beta, alpha)
    return out


def _three_quarters(
    left: Tensor, right: Tensor, scratch: Scratch, out: Tensor, addend: Tensor | None, beta: float, alpha: float
) -> None:
    half, rest = out.shape[-1] // 2, out.shape[-1] - out.shape[-1] // 2
    corner = scratch.take("corner", (rest, rest), out)
    block, turned = (
        scratch.take(name, shape, out) for name, shape in (("block", (half, rest)), ("turned", (rest, half)))
    )
    addends = repeat((None, None)) if addend is None else zip(addend[:, :half], addend[:, half:, half:], strict=True)
    upper_halves = zip(left[:, :half], right, out[:, :half], strict=True)
    quarters = zip(left[:, half:], right[..., half:], out[:, half:, half:], strict=True)
    sides = zip(out[:, :half, half:], out[:, half:, :half], strict=True)
    for (c, last_c), (a, b, upper), (last_a, last_b, last), (source, mirrored) in zip(
        addends, upper_halves, quarters, sides, strict=False
    ):
        _product(last_a, last_b, corner, last_c, beta, alpha)
        _product(a, b, upper, c, beta, alpha)
        last.copy_(corner)
        mirrored.copy_(turned.copy_(block.copy_(source).T))  # torch transposes dense blocks faster


def _product(left: Tensor, right: Tensor, out: Tensor, addend: Tensor | None, beta: float, alpha: float) -> None:
    if addend is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(addend, left, right, beta=beta, alpha=alpha, out=out)
