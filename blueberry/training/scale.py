"""What a step on many ranks computes, sends and holds, from the shapes alone: the plan that the optimizer follows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..optim.costs import newton_schulz_flops
from ..optim.param_groups import Assignment, assign_parameters
from ..optim.sharing import BUCKET_BYTES, Load, Slab, chunk_sizes, numel, share_out

ENGINES = ("ddp", "fsdp2")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Of the rank that has most to do; bytes and operations of one optimizer step.

    `optimizer_bytes` are sent for Newton-Schulz, `model_bytes` for weights and gradients: DDP's all-reduce (every
    element twice, (ranks - 1) / ranks times), FSDP2's two all-gathers and its reduce-scatter, padded to equal shards.
    `memory` holds weights, gradients, optimizer state, and the larger of the optimizer's buffers and of the weights
    that FSDP2 has gathered at a time: what is in no layer, a layer and the next. Activations are left out.
    """

    optimizer_flops: float
    optimizer_bytes: int
    model_bytes: float
    memory: float


def plan(
    model: PreTrainedModel, engine: str, ranks: int, sharing: int | None = None, wire: torch.dtype = torch.bfloat16
) -> Plan:
    """For Muon and AdamW as `build_optimizer` sets them up.

    `sharing`: how many ranks of DDP share the optimizer's work, those of a node; `wire`: dtype of directions and
    gathered weights.
    """
    assignments = assign_parameters(model)
    muon = [assignment for assignment in assignments if assignment.optimizer == "muon"]
    together = min(ranks, sharing or ranks) if engine == "ddp" else ranks
    flops, sent, buffers = matrices(muon, engine, together, wire)
    shards = 1 if engine == "ddp" else ranks
    held = [_largest_part(a.parameter, shards) for a in assignments]
    state = sum((1 if a.optimizer == "muon" else 2) * part for a, part in zip(assignments, held, strict=True))
    gathered = wire.itemsize * _gathered(model) if shards > 1 else 0
    if engine == "ddp":
        model_bytes = 2 * 4 * sum(held) * (ranks - 1) / ranks
    else:
        model_bytes = (2 * wire.itemsize + 4) * sum(held) * (ranks - 1)  # gradients are reduced in fp32
    return Plan(flops, sent, model_bytes, 4 * (2 * sum(held) + state) + max(buffers, gathered))


def model_flops(model: PreTrainedModel, tokens: int, length: int) -> float:
    """Operations of forward and backward on `tokens` tokens in sequences of `length`: three products for each in the
    forward pass, attention over whole sequences (what a causal kernel leaves out is counted too)."""
    config = model.config.get_text_config()
    lookups = set() if config.tie_word_embeddings else {model.get_input_embeddings().weight}
    active = 0.0
    for parameter in set(model.parameters()) - lookups:
        if parameter.ndim == 3:
            active += parameter.numel() * config.num_experts_per_tok / len(parameter)
        elif parameter.ndim == 2:
            active += parameter.numel()
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6 * tokens * (active + 2 * length * width)


def _largest_part(parameter: Tensor, ranks: int) -> int:
    """Elements that the first rank holds of a weight that is cut along its rows."""
    return max(chunk_sizes(len(parameter), ranks)) * prod(parameter.shape[1:])


def _gathered(model: PreTrainedModel) -> int:
    """Elements: accelerate wraps each of the model's layers, and the rest as a whole; the next layer is fetched while
    one is at work."""
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return sum(parameter.numel() for parameter in model.parameters()) - sum(sizes) + 2 * max(sizes, default=0)


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
