"""Matrix products on the CPU: in which dtype, and by which library.

The file ships to the Hub as remote code, so it imports torch only.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Lock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FEW_ROWS = 2.5  # up to which reading the weights once for each takes less time than oneDNN's way
AT_ONCE = 2**22  # elements of a product before they are copied: 16 MiB, half of the last cache; 1 to 16 are as fast
# The operator that torch's own compiler uses for linear layers; private, so used only if it is exactly this one.
ONEDNN_LINEAR = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def trains_on_cpu(x: Tensor) -> bool:
    """Whether x is a plain tensor on the CPU in training in eager mode, which operations of our own are for."""
    plain = type(x) is Tensor and x.device.type == "cpu"
    return plain and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes through a module, which must then be called as a whole."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


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

    oneDNN writes to memory of its own, so `out` is filled from the cache, some columns at a time. Left to torch.mm are
    tensors with gaps, such as some columns of wider ones (of such weights oneDNN makes a product in a thousand times
    the time), and all under a dispatch mode: torch's counter of operations does not know oneDNN's.
    """
    single = x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0
    dense = x.is_contiguous() and (weight.is_contiguous() or weight.t().is_contiguous())
    if not (single and dense and has_onednn_linear()) or is_in_torch_dispatch_mode():
        return torch.mm(x, weight.t(), out=out)
    if out is None:
        return _onednn_linear(x, weight)
    if not weight.is_contiguous():  # its parts have gaps
        return out.copy_(_onednn_linear(x, weight))
    columns = max(1, AT_ONCE // len(x) // 64) * 64
    for part, out_part in zip(weight.split(columns), out.split(columns, dim=1), strict=True):
        out_part.copy_(_onednn_linear(x, part))
    return out


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _WithoutOneDNN(AbstractContextManager):
    """torch's own products in place of oneDNN's. For the whole process, as torch knows it: the last one out restores
    what the first one found, so that threads may come and go in any order."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.backends.mkldnn.enabled = self.before


_without_onednn = _WithoutOneDNN()


def products_of_few_rows(x: Tensor, rows: float | None = None) -> AbstractContextManager:
    """For products of a few rows with bf16 weights outside training, as in decoding on a CPU: by torch.

    oneDNN rearranges the weights before it multiplies, and reads 8 GB of them in a second where torch's kernel reads
    22 to 30, as fast as the memory gives them (Zen 4, two cores), once for each row.

    x (..., in) tells device and dtype; `rows` meet each matrix of weights, on average: those of x unless given.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or not has_avx512():
        return nullcontext()
    few = (x.shape[:-1].numel() if rows is None else rows) <= FEW_ROWS and product_dtype(x) == torch.bfloat16
    return _without_onednn if few and not torch.backends.flags_frozen() else nullcontext()


@cache
def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
