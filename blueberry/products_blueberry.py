"""Matrix products on the CPU: in which dtype, and by which library.

The file ships to the Hub as remote code, so it imports torch only.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

# The operator that torch's own compiler uses for linear layers; private, so used only if it is exactly this one.
ONEDNN_LINEAR = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are computed: autocast's where it is on, but fp64 stays."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off; nothing where it is off anyway, because switching it takes as long as a small operation."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@cache
def has_onednn_linear() -> bool:
    """Whether fp32 products can go through oneDNN, which on AMD processors is faster than torch.mm's MKL."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return operator is not None and str(operator.default._schema) == ONEDNN_LINEAR


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x weight^T of x (rows, in) and weight (out, in), outside autograd -> (rows, out), written to `out` if given.

    A single row is left to torch.mm: it only reads the weights.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 1 and has_onednn_linear():
        product = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product if out is None else out.copy_(product)
    return torch.mm(x, weight.t(), out=out)
