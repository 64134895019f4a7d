"""Pure arithmetic of work that ranks share: who works on which weight, in which order, and how much that sends.

Every rank computes the same plan from the same shapes, so nothing about it has to be sent.
"""

import heapq
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeVar

BUCKET_BYTES = 256 * 2**20

_Task = TypeVar("_Task")


class Slab(NamedTuple):
    """A tensor that travels: the shape of the whole, and the dimension along which each rank holds a slab of it.

    `dim` None: every rank holds the whole.
    """

    shape: tuple[int, ...]
    dim: int | None

    def on_rank(self, rank: int, ranks: int) -> tuple[int, ...]:
        """Shape of what `rank` holds."""
        if self.dim is None:
            return self.shape
        size = chunk_sizes(self.shape[self.dim], ranks)[rank]
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])


class Load(NamedTuple):
    """What one weight costs its owner."""

    flops: float
    bytes: int  # of everything that travels for it, whole


class Bucket(NamedTuple):
    """Weights that are worked on between two collectives; `owners[i]` works on weight number `tasks[i]`."""

    tasks: list[int]
    owners: list[int]

    def of_ranks(self, tasks: Sequence[_Task], ranks: int) -> list[list[_Task]]:
        """The weights of each rank, out of all `tasks`."""
        mine: list[list[_Task]] = [[] for _ in range(ranks)]
        for index, owner in zip(self.tasks, self.owners, strict=True):
            mine[owner].append(tasks[index])
        return mine


def chunk_sizes(size: int, ranks: int) -> list[int]:
    """How torch.chunk, FSDP2 and DTensor cut `size` rows over ranks: equal chunks, the last ones smaller or empty."""
    chunk = -(-size // ranks)
    return [max(0, min(chunk, size - rank * chunk)) for rank in range(ranks)]


@lru_cache(maxsize=64)
def share_out(loads: tuple[Load, ...], ranks: int, shares_in_buffer: int, bucket_bytes: int) -> list[Bucket]:
    """Buckets of weights with their owners, by FLOPs: the most expensive first, each to the rank with the least.

    (Largest processing time first: within 4/3 of the best makespan, R. L. Graham, 1969.) A bucket ends where a rank's
    buffer, `shares_in_buffer` times the largest share of an owner, would exceed `bucket_bytes`; a weight that exceeds
    it alone gets a bucket of its own.
    """
    buckets: list[Bucket] = []
    busy: list[tuple[float, int]] = []  # (FLOPs, rank) in the bucket, a heap
    share: list[int] = []  # bytes of each rank in it
    for task in sorted(range(len(loads)), key=lambda task: -loads[task].flops):  # stable, so the same everywhere
        if not buckets or shares_in_buffer * (share[busy[0][1]] + loads[task].bytes) > bucket_bytes:
            buckets.append(Bucket([], []))
            busy, share = [(0.0, rank) for rank in range(ranks)], [0] * ranks
        flops, owner = busy[0]
        heapq.heapreplace(busy, (flops + loads[task].flops, owner))
        share[owner] += loads[task].bytes
        buckets[-1].tasks.append(task)
        buckets[-1].owners.append(owner)
    return buckets


def numel(slabs: Sequence[Slab], rank: int, ranks: int) -> int:
    """Elements of several tensors that `rank` holds."""
    return sum(prod(slab.on_rank(rank, ranks)) for slab in slabs)
