"""RMS normalization, alone and followed by the rotation of positions, with backwards of their own on the CPU.

Autograd's own backwards of these small operations take several times the passes over memory. The file ships to the Hub
as remote code, so it imports torch and its siblings only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .first_order_blueberry import first_order
from .products_blueberry import product_dtype, trains_on_cpu


def widen(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(mean of squares + eps)^(-1/2) over the last dimension: (..., size) -> (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """With y = x s w: dx = s (g w) - x s^3 <g w, x> / size and dw = sum g x s. Overwrites grad (..., size)."""
    product = grad * x
    grad_weight = (scale.reshape(1, -1) @ product.reshape(-1, x.shape[-1]))[0]  # faster than a vector's product
    coefficient = (product @ weight).unsqueeze(-1).mul_(scale.pow(3)).div_(x.shape[-1])
    return grad.mul_(weight).mul_(scale).addcmul_(x, coefficient, value=-1), grad_weight


class _FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, in the dtype of the products that follow."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """x (..., size), weight (size,) -> (..., size) in `dtype`."""
        wide = widen(x)
        scale = inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide_grad = grad.to(scale.dtype, copy=True, memory_format=torch.contiguous_format)
        grad_x, grad_weight = rms_norm_backward(wide_grad, widen(x), weight, scale)
        return grad_x.to(x.dtype), grad_weight, None, None


class _NormalizeAndRotate(torch.autograd.Function):
    """RMS normalization of each head, then the rotation of its position."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """x (batch, seq, heads, size), cos and sin (batch or 1, seq, size / 2) -> (batch, heads, seq, size)."""
        wide = widen(x)
        scale = inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, cos, sin, scale)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (batch, seq, 1, size / 2)
        batch, seq, heads, size = x.shape
        rotated = wide.new_empty(batch, heads, seq, size)
        first, second = rotated.transpose(1, 2).chunk(2, dim=-1)
        (a, b), (weight_a, weight_b) = wide.chunk(2, dim=-1), weight.chunk(2)
        torch.mul(a, cos * weight_a, out=first).addcmul_(b, sin * weight_b, value=-1)
        torch.mul(b, cos * weight_b, out=second).addcmul_(a, sin * weight_a)
        return rotated.mul_(scale.transpose(1, 2)).to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Rotate back, then as for the norm alone."""
        x, weight, cos, sin, scale = ctx.saved_tensors
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        wide = widen(x)
        a, b = widen(grad).transpose(1, 2).chunk(2, dim=-1)
        back = torch.empty_like(wide, memory_format=torch.contiguous_format)
        first, second = back.chunk(2, dim=-1)
        torch.mul(a, cos, out=first).addcmul_(b, sin)
        torch.mul(b, cos, out=second).addcmul_(a, sin, value=-1)
        grad_x, grad_weight = rms_norm_backward(back, wide, weight, scale)
        return grad_x.to(x.dtype), grad_weight, None, None, None


class BlueberryRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 at least (https://arxiv.org/abs/1910.07467).

    Under autocast the result is in autocast's dtype, because matrix products follow.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        if self.can_fuse(x):
            return _FusedRMSNorm.apply(x, self.weight, self.eps, product_dtype(x))
        dtype, weight = product_dtype(x), self.weight
        if x.dtype != weight.dtype:
            x, weight = widen(x), widen(weight)
        return F.rms_norm(x, weight.shape, weight, self.eps).to(dtype)

    def can_fuse(self, x: Tensor) -> bool:
        """In training in eager mode on the CPU, plain tensors, weights in full precision."""
        return trains_on_cpu(x) and self.weight.dtype == torch.promote_types(x.dtype, torch.float32)


class BlueberryHeadRMSNorm(BlueberryRMSNorm):
    """The norm of queries or keys, followed by the rotation of their positions; the dtype stays."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (batch, seq, heads, size), cos and sin (batch or 1, seq, size / 2) -> (batch, heads, seq, size)."""
        if self.can_fuse(x) and type(cos) is Tensor:
            return _NormalizeAndRotate.apply(x, self.weight, cos, sin, self.eps)
        return apply_rotary_pos_emb(super().forward(x).transpose(1, 2), cos, sin)


class Rotation(nn.Module):
    """The rotation alone, for heads without a norm."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `BlueberryHeadRMSNorm`."""
        return apply_rotary_pos_emb(x.transpose(1, 2), cos, sin)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x (batch, heads, seq, head_dim) into each other by angles (batch, seq, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), dim=-1)
