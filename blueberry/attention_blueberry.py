"""Causal attention for training on a CPU: by blocks of queries, each with the keys it may see.

Each block is two (in the backward four) batched products and a softmax, one sequence at a time, so that it stays in
the cache: for sequences of 512 in bf16 half the time of torch's CPU kernel of `scaled_dot_product_attention`. The file
ships to the Hub as remote code, so it imports torch only.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK = 128  # queries at a time; measured fastest of 64 to 256 for sequences of 512
LONGEST = 1024  # keeping the weights for the backward pays up to here; torch's kernel is as fast at 2048


def can_attend_in_blocks(query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float) -> bool:
    """Whether `causal_attention` may stand in for torch's: training on a CPU on whole sequences without padding."""
    plain = type(query) is Tensor and query.device.type == "cpu" and not torch.compiler.is_compiling()
    training = torch.is_grad_enabled() and query.requires_grad and dropout == 0
    return plain and training and attention_mask is None and query.shape[2] == key.shape[2] <= LONGEST


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v over each position's past and itself.

    query (batch, heads, seq, size), key and value (batch, kv_heads, seq, size) -> (batch, seq, heads, size), in the
    dtype of value; gradients of first order.
    """
    return _CausalAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scaling)


class _CausalAttention(torch.autograd.Function):
    """One sequence and one block of queries at a time."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, seq, size = query.shape
        output = value.new_empty(batch, seq, heads, size)
        mask = future_mask(query)
        kept = []
        for index in range(batch):
            q, k, v = query[index] * scaling, spread(key[index], heads), spread(value[index], heads)
            for start in range(0, seq, BLOCK):
                weights = block_weights(q, k, start, mask)
                stop = start + weights.shape[1]
                output[index, start:stop] = (weights @ v[:, :stop]).transpose(0, 1)
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        heads, seq = query.shape[1:3]
        weights_kept = iter(kept)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        for index in range(len(query)):
            q, k, v = query[index] * ctx.scaling, spread(key[index], heads), spread(value[index], heads)
            grad = grad_output[index].transpose(0, 1).to(v.dtype, memory_format=torch.contiguous_format)
            grad_q = torch.empty_like(q)
            grad_k, grad_v = (torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in "kv")
            for start in range(0, seq, BLOCK):
                weights = next(weights_kept)  # (heads, block, stop)
                stop = start + weights.shape[1]
                grad_v[:, :stop] += weights.transpose(1, 2) @ grad[:, start:stop]
                grad_weights = grad[:, start:stop] @ v[:, :stop].transpose(1, 2)  # (heads, block, stop)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_q[:, start:stop] = grad_scores @ k[:, :stop]
                grad_k[:, :stop] += grad_scores.transpose(1, 2) @ q[:, start:stop]
            for result, part in zip(grads, (grad_q.mul_(ctx.scaling), grad_k, grad_v), strict=True):
                gather(part, out=result[index])
        return *grads, None


def future_mask(query: Tensor) -> Tensor:
    """(BLOCK, BLOCK): -inf above the diagonal, else 0."""
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)


def block_weights(query: Tensor, key: Tensor, start: int, mask: Tensor) -> Tensor:
    """Attention of the queries from `start` on to keys up to their own: (heads, block, start + block)."""
    stop = min(start + BLOCK, query.shape[1])
    scores = query[:, start:stop] @ key[:, :stop].transpose(1, 2)
    scores[:, :, start:] += mask[: stop - start, : stop - start]
    return scores.softmax(dim=-1)


def spread(x: Tensor, heads: int) -> Tensor:
    """x (kv_heads, seq, size) repeated for the query heads that share it: (heads, seq, size)."""
    return x.contiguous() if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0)


def gather(grad: Tensor, out: Tensor) -> None:
    """The adjoint of `spread`: sum grad (heads, seq, size) into out (kv_heads, seq, size)."""
    out.copy_(grad if len(grad) == len(out) else grad.unflatten(0, (len(out), -1)).sum(dim=1))
