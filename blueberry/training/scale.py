"""What a step on many ranks computes, sends and holds, from the shapes alone: the plan that the optimizer follows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from ..optim.costs import newton_schulz_flops
from ..optim.param_groups import Assignment, assign_parameters
from ..optim.sharing import BUCKET_BYTES, Load, Slab, chunk_sizes, numel, share_out

ENGINES = ("ddp", "fsdp2")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Of the rank that has most to do; bytes and operations of one optimizer step.

    `optimizer_bytes` are sent for Newton-Schulz, `model_bytes` for weights and gradients by collectives that send
    every element (ranks - 1) / ranks times: DDP's all-reduce (twice), FSDP2's two all-gathers and its reduce-scatter.
    `memory` holds weights, gradients, optimizer state and the optimizer's buffers, but no activations.
    """

    optimizer_flops: float
    optimizer_bytes: int
    model_bytes: float
    memory: float


def plan(
    model: nn.Module, engine: str, ranks: int, sharing: int | None = None, wire: torch.dtype = torch.bfloat16
) -> Plan:
    """For Muon and AdamW as `build_optimizer` sets them up.

    `sharing`: how many ranks of DDP share the optimizer's work, those of a node; `wire`: dtype of directions and
    gathered weights.
    """
    assignments = assign_parameters(model)
    muon = [assignment for assignment in assignments if assignment.optimizer == "muon"]
    together = min(ranks, sharing or ranks) if engine == "ddp" else ranks
    flops, sent, buffers = matrices(muon, engine, together, wire)
    elements = sum(assignment.parameter.numel() for assignment in assignments)
    state = sum((1 if a.optimizer == "muon" else 2) * a.parameter.numel() for a in assignments)
    share = 1 if engine == "ddp" else 1 / ranks
    passes = 2 * 4 if engine == "ddp" else 2 * wire.itemsize + 4  # gradients are reduced in fp32
    model_bytes = passes * elements * (ranks - 1) / ranks
    return Plan(flops, sent, model_bytes, 4 * share * (2 * elements + state) + buffers)


def matrices(
    muon: Sequence[Assignment], engine: str, ranks: int, wire: torch.dtype, bucket_bytes: int = BUCKET_BYTES
) -> tuple[float, int, int]:
    """(operations, bytes sent, bytes of buffers) of the busiest rank."""
    whole = [] if engine == "ddp" else [a for a in muon if a.parameter.ndim == 3]
    tasks = [
        (Slab(shape, 0), newton_schulz_flops(shape, a.layout, dtype=wire))
        for a in muon
        if a not in whole
        for shape in (_slices(tuple(a.parameter.shape), ranks) if engine == "ddp" else [tuple(a.parameter.shape)])
    ]
    flops, sent, buffer = _shared(tasks, engine, ranks, wire, bucket_bytes)
    experts = ((max(chunk_sizes(len(a.parameter), ranks)), *a.parameter.shape[1:]) for a in whole)
    own = sum(newton_schulz_flops(shape, a.layout, dtype=wire) for a, shape in zip(whole, experts, strict=True))
    return flops + own, sent, buffer


def _slices(shape: Shape, ranks: int) -> Iterable[Shape]:
    """As ranks share a stack of experts; a matrix as it is."""
    if len(shape) == 2:
        return [shape]
    size = -(-shape[0] // ranks)
    return [(min(size, shape[0] - start), *shape[1:]) for start in range(0, shape[0], size)]


def _shared(
    tasks: Sequence[tuple[Slab, float]], engine: str, ranks: int, wire: torch.dtype, bucket_bytes: int
) -> tuple[float, int, int]:
    if ranks == 1:
        return sum(flops for _, flops in tasks), 0, 0
    sizes = [prod(slab.shape) for slab, _ in tasks]
    loads = tuple(Load(flops + size, size * wire.itemsize) for size, (_, flops) in zip(sizes, tasks, strict=True))
    busy, sent, buffer = [0.0] * ranks, [0] * ranks, 0
    for bucket in share_out(loads, ranks, ranks if engine == "ddp" else 1, bucket_bytes):
        shares = [0] * ranks  # elements
        for task, owner in zip(bucket.tasks, bucket.owners, strict=True):
            busy[owner] += tasks[task][1]
            shares[owner] += sizes[task]
        if engine == "ddp":  # an all-gather of equal shares
            here = [max(shares) * (ranks - 1)] * ranks
            buffer = max(buffer, max(shares) * (ranks + 1))
        else:
            here = _all_to_all(bucket.of_ranks([slab for slab, _ in tasks], ranks), ranks)
            buffer = max(buffer, 2 * max(shares))
        sent = [total + wire.itemsize * one for total, one in zip(sent, here, strict=True)]
    return max(busy), max(sent), buffer * wire.itemsize


def _all_to_all(slabs: list[list[Slab]], ranks: int) -> list[int]:
    """Elements that each rank sends to others: its slabs of their weights, then their slabs of its own weights."""
    held = [numel([slab for some in slabs for slab in some], rank, ranks) for rank in range(ranks)]
    own = [numel(slabs[rank], rank, ranks) for rank in range(ranks)]
    whole = [sum(prod(slab.shape) for slab in some) for some in slabs]
    return [held[rank] - own[rank] + whole[rank] - own[rank] for rank in range(ranks)]
