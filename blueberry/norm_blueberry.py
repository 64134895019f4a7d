"""RMS normalization, with a backward of its own on the CPU.

The file ships to the Hub as remote code, so it imports torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


class _FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight with half the passes over memory that autograd's own backward takes."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., size), weight (size,) -> (..., size)."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With y = x s w: dx = s (g w) - x s^3 <g w, x> / size and dw = sum g x s."""
        x, weight, scale = ctx.saved_tensors
        product = grad * x
        grad_weight = scale.reshape(-1) @ product.reshape(-1, x.shape[-1])
        coefficient = (product @ weight).unsqueeze(-1).mul_(scale.pow(3)).div_(x.shape[-1])
        return (grad * weight).mul_(scale).addcmul_(x, coefficient, value=-1), grad_weight, None


class BlueberryRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 at least (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        if self._can_fuse(x):
            return _FusedRMSNorm.apply(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)

    def _can_fuse(self, x: Tensor) -> bool:
        """In eager mode on the CPU, plain tensors of one dtype with all the precision that is asked for."""
        plain = type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
        return plain and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
