"""Causal attention for training on a CPU: by blocks of queries, each with the keys it may see.

Each block is two (in the backward four) batched products and a softmax, one sequence at a time on each thread, so that
it stays in the cache: for sequences of 512 in bf16 half the time of torch's CPU kernel of
`scaled_dot_product_attention`. The file ships to the Hub as remote code, so it imports torch and its siblings only.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .first_order_blueberry import first_order
from .products_blueberry import trains_on_cpu
from .threads_blueberry import run_on_workers, workers_pay

BLOCK = 128  # queries at a time; measured fastest of 64 to 256 for sequences of 512
LONGEST = 1024  # keeping the weights for the backward pays up to here; torch's kernel is as fast at 2048


def can_attend_in_blocks(query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float) -> bool:
    """Whether `causal_attention` may stand in for torch's: training on a CPU on whole sequences without padding."""
    training = trains_on_cpu(query) and query.requires_grad and dropout == 0
    return training and attention_mask is None and query.shape[2] == key.shape[2] <= LONGEST


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v over each position's past and itself.

    query (batch, heads, seq, size), key and value (batch, kv_heads, seq, size) -> (batch, seq, heads, size), in the
    dtype of value; gradients of first order.
    """
    return _CausalAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scaling)


class _CausalAttention(torch.autograd.Function):
    """One sequence (or some of its heads) to a worker, and one block of queries at a time."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query, key, value = query * scaling, key.contiguous(), value.contiguous()
        batch, heads, seq, size = query.shape
        output = value.new_empty(batch, seq, heads, size)
        mask = future_mask(query)
        pieces, threads_each = share(query, key.shape[1])
        kept: list[list[Tensor]] = [[] for _ in pieces]

        def work(number: int) -> None:
            index, own, shared = pieces[number]
            q = query[index, own]  # (heads, seq, size), as k and v
            k, v = (spread(x[index, shared], len(q)) for x in (key, value))
            k_transposed, stop = k.mT, 0
            for q_block, out_block in in_blocks(q, output[index, :, own].transpose(0, 1)):
                stop += q_block.shape[1]
                weights = block_weights(q_block, k_transposed[:, :, :stop], mask)
                torch.bmm(weights, v[:, :stop], out=out_block)
                kept[number].append(weights)

        run_on_workers(work, range(len(pieces)), threads_each)
        ctx.save_for_backward(query, key, value, *(weights for blocks in kept for weights in blocks))
        ctx.scaling, ctx.pieces, ctx.threads_each = scaling, pieces, threads_each
        return output

    @staticmethod
    @first_order
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        blocks = len(kept) // max(1, len(ctx.pieces))
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]

        def work(number: int) -> None:
            index, own, shared = ctx.pieces[number]
            q = query[index, own]  # (heads, seq, size), as k and v
            k, v = (spread(x[index, shared], len(q)) for x in (key, value))
            grad = grad_output[index, :, own].transpose(0, 1).to(v.dtype, memory_format=torch.contiguous_format)
            grad_q = grads[0][index, own]
            grad_k: Tensor | None = None
            grad_v: Tensor | None = None
            own_weights, v_transposed = kept[number * blocks : (number + 1) * blocks], v.mT
            each_block = list(zip(own_weights, in_blocks(q, grad, grad_q), strict=True))
            for weights, (q_block, grad_block, grad_q_block) in reversed(each_block):  # the first to all keys
                stop = weights.shape[2]  # weights (heads, block, stop)
                grad_v = add_rows_(grad_v, torch.bmm(weights.mT, grad_block))
                grad_weights = torch.bmm(grad_block, v_transposed[:, :, :stop])  # (heads, block, stop)
                grad_scores = torch._softmax_backward_data(
                    grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                )
                torch.bmm(grad_scores, k[:, :stop], out=grad_q_block)
                grad_k = add_rows_(grad_k, torch.bmm(grad_scores.mT, q_block))
            grad_q.mul_(ctx.scaling)
            gather(grad_k, out=grads[1][index, shared])
            gather(grad_v, out=grads[2][index, shared])

        run_on_workers(work, range(len(ctx.pieces)), ctx.threads_each)
        return *grads, None


Piece = tuple[int, slice, slice]  # a sequence, some of its heads, and the key-value heads that these share


def cut(batch: int, heads: int, kv_heads: int, workers: int) -> list[Piece]:
    """Each sequence, or the fewest equal parts of its heads that make as many pieces as there are workers."""
    parts = next((n for n in range(1, kv_heads) if kv_heads % n == 0 and batch * n >= workers), kv_heads)
    group, width = heads // kv_heads, kv_heads // parts
    starts = range(0, kv_heads, width)
    return [
        (index, slice(group * kv, group * (kv + width)), slice(kv, kv + width))
        for index in range(batch)
        for kv in starts
    ]


def share(query: Tensor, kv_heads: int) -> tuple[list[Piece], int]:
    """What a worker does at once, and its threads.

    Whole sequences if there are enough or their parts are too small; with all threads if whole ones are.
    """
    batch, heads, seq, size = query.shape
    threads = torch.get_num_threads()
    multiplications = batch * heads * min(seq, BLOCK) * seq * size  # of a block of queries with all keys
    for workers in (threads, 1):
        pieces = cut(batch, heads, kv_heads, workers)
        if pieces and workers_pay(multiplications // len(pieces)):
            return pieces, max(1, threads // len(pieces))
    return pieces, threads


def future_mask(query: Tensor) -> Tensor:
    """(BLOCK, BLOCK): -inf above the diagonal, else 0."""
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)


def in_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """BLOCK positions at a time of each (heads, seq, size).

    The views are made at once: workers wait for each other while they run Python.
    """
    return zip(*(x.split(BLOCK, dim=1) for x in tensors), strict=True)


def block_weights(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries (heads, block, size) to keys (heads, size, stop) up to their own: (heads, block, stop)."""
    scores, block = torch.bmm(query, key), query.shape[1]
    scores[:, :, -block:].add_(mask[:block, :block])
    return torch.softmax(scores, dim=-1, out=scores)


def add_rows_(total: Tensor | None, part: Tensor) -> Tensor:
    """Add part (heads, stop, size) to the first rows of total, in fp32 at least; the first part is the total."""
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    total[:, : part.shape[1]].add_(part)
    return total


def spread(x: Tensor, heads: int) -> Tensor:
    """x (kv_heads, seq, size) repeated for the query heads that share it: (heads, seq, size)."""
    return x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0)


def gather(grad: Tensor, out: Tensor) -> None:
    """The adjoint of `spread`: sum grad (heads, seq, size) into out (kv_heads, seq, size)."""
    out.copy_(grad if len(grad) == len(out) else grad.unflatten(0, (len(out), -1)).sum(dim=1))
