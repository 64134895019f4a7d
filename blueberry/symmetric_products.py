"""Products known to be symmetric, from three quarters of the operations."""

import torch
from torch import Tensor

from .scratch import Scratch

MIN_ROWS = 384  # below, moving the mirrored quarter takes what the products save (measured)


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
    if out is None or out.device.type != "cpu" or out.shape[-1] < MIN_ROWS:
        if addend is None:
            return torch.bmm(left, right, out=out)
        return torch.baddbmm(addend, left, right, beta=beta, alpha=alpha, out=out)
    half = out.shape[-1] // 2
    rest = out.shape[-1] - half
    corner = scratch.take("corner", (rest, rest), out)
    for index, (a, b, result) in enumerate(zip(left, right, out, strict=True)):
        if addend is None:
            torch.mm(a[half:], b[:, half:], out=corner)
            torch.mm(a[:half], b, out=result[:half])
        else:
            c = addend[index]
            torch.addmm(c[half:, half:], a[half:], b[:, half:], beta=beta, alpha=alpha, out=corner)
            torch.addmm(c[:half], a[:half], b, beta=beta, alpha=alpha, out=result[:half])
        result[half:, half:] = corner
        _mirror(result, half, scratch)
    return out


def _mirror(matrix: Tensor, half: int, scratch: Scratch) -> None:
    """Write the upper right block, transposed, over the lower left one. Torch transposes dense blocks faster."""
    rest = len(matrix) - half
    block = scratch.take("block", (half, rest), matrix).copy_(matrix[:half, half:])
    matrix[half:, :half] = scratch.take("transposed", (rest, half), matrix).copy_(block.T)
