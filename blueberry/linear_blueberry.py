"""Linear layers that oneDNN multiplies in fp32 training on a CPU.

On AMD processors torch's own products, by MKL, take up to a quarter longer. The file ships to the Hub as remote code,
so it imports torch and its siblings only.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .first_order_blueberry import first_order
from .memory_blueberry import large_empty
from .products_blueberry import has_onednn_linear, linear, product_dtype, trains_on_cpu

ENOUGH = 100_000_000  # multiplications from which oneDNN took less time, of 1 to 5000 million (Zen 4, two cores)


class _Linear(torch.autograd.Function):
    """x weight^T, its gradients written once."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., in), weight (out, in) -> (..., out)."""
        ctx.save_for_backward(x, weight)
        return linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grad_x, grad_weight = grad.reshape(-1, grad.shape[-1]), None, None  # (rows, out)
        if ctx.needs_input_grad[0]:
            grad_x = linear(rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = large_empty(weight, weight.shape, weight.dtype)
            torch.mm(rows.t(), x.reshape(-1, x.shape[-1]), out=grad_weight)
        return grad_x, grad_weight


class BlueberryLinear(nn.Linear):
    """A linear layer. Large products of fp32 training on a CPU go through oneDNN, all others through torch."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return _Linear.apply(x, self.weight) if self.can_use_onednn(x) else super().forward(x)

    def can_use_onednn(self, x: Tensor) -> bool:
        """In training in eager mode on the CPU, plain tensors in fp32."""
        plain = type(self.weight) is nn.Parameter and self.weight.device == x.device and self.bias is None
        if not (plain and trains_on_cpu(x) and has_onednn_linear()):
            return False
        single = x.dtype == self.weight.dtype == product_dtype(x) == torch.float32
        return single and x.shape[-1] == self.in_features and x.numel() * self.out_features >= ENOUGH


class BlueberryResidualLinear(BlueberryLinear):
    """A linear layer whose output is added to the residual stream: initialized smaller than the others."""
