"""Who works on what under DDP, FSDP2 and tensor parallelism, and the collectives for it.

An optimizer that needs whole matrices says what to load, what to do with whole tensors and what to store. How ranks
hold a weight, which `holding` finds out, decides how the tensors get together:

| the weight | what happens | bytes sent per rank and step, for N elements of s bytes on W ranks |
|---|---|---|
| `Alone`: whole here, or all its matrices are | nothing | 0 |
| `Replicas`: the same on all ranks (DDP) | each rank works on some, one all-gather of the results | N s (W-1)/W |
| `Slabs`: cut along one dimension (FSDP2) | all-to-all to the owners, and back | 2 N s (W-1)/W^2 |
| `Anyhow`: HSDP, tensor parallelism, several meshes | every rank gathers the whole and works on it | N s (W-1)/W |
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor, zeros

from .sharing import Load, Slab, chunk_sizes, share_out

Shape = tuple[int, ...]


class Task(NamedTuple):
    """A weight that one rank works on: `tensors` travel in `dtype`, the first `returned` of them come back."""

    item: Any
    tensors: tuple[Slab, ...]
    returned: int
    flops: float
    dtype: torch.dtype
    device: torch.device

    def load(self) -> Load:
        return Load(self.flops, self.dtype.itemsize * sum(prod(slab.shape) for slab in self.tensors))

    def results(self) -> tuple[Slab, ...]:
        return self.tensors[: self.returned]


class Steps(NamedTuple):
    """What an optimizer does with an item: its part of the tensors, results from whole ones, what becomes of them."""

    load: Callable[[Any], list[Tensor]]
    work: Callable[[list[Any], list[list[Tensor]]], list[list[Tensor]]]
    store: Callable[[Any, list[Tensor]], None]


@dataclass(frozen=True)
class Alone:
    """All matrices of the weight that this rank holds are whole, and no other rank helps with them."""

    ranks = 1


@dataclass(frozen=True)
class Replicas:
    """All ranks of `group` hold the same weight: each works on some and all get the results."""

    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        return self.group.size()

    def run(self, tasks: Sequence[Task], steps: Steps, bucket_bytes: int) -> None:
        loads = tuple(task.load() for task in tasks)
        for bucket in share_out(loads, self.ranks, self.ranks, bucket_bytes):
            self._run_bucket(bucket.of_ranks(tasks, self.ranks), steps)

    def _run_bucket(self, tasks: list[list[Task]], steps: Steps) -> None:
        """`tasks[rank]` are those of a rank."""
        mine = tasks[self.group.rank()]
        loaded = [[steps.load(task.item) for task in some] for some in tasks]  # all of them: momenta move everywhere
        results = steps.work([task.item for task in mine], loaded[self.group.rank()])
        shapes = [[slab.shape for task in some for slab in task.results()] for some in tasks]
        share = max(sum(map(prod, some)) for some in shapes)
        example = next(task for some in tasks for task in some)
        sent = torch.zeros(share, dtype=example.dtype, device=example.device)
        _pack(_flat(results), sent)
        received = sent.new_empty(len(tasks) * share)
        dist.all_gather_single(received, sent, group=self.group)
        for some, buffer, of_some in zip(tasks, received.split(share), shapes, strict=True):
            _store(some, _unpack(buffer, of_some), steps)


@dataclass(frozen=True)
class Slabs:
    """Each rank of `group` holds a slab of the weight along `dim`: owners get the whole and send the results back."""

    group: dist.ProcessGroup
    dim: int

    def run(self, tasks: Sequence[Task], steps: Steps, bucket_bytes: int) -> None:
        ranks = self.group.size()
        for bucket in share_out(tuple(task.load() for task in tasks), ranks, 1, bucket_bytes):
            self._run_bucket(bucket.of_ranks(tasks, ranks), steps)

    def _run_bucket(self, tasks: list[list[Task]], steps: Steps) -> None:
        """`tasks[rank]` are those of a rank."""
        rank, ranks = self.group.rank(), self.group.size()
        mine = tasks[rank]
        slabs = [slab for task in mine for slab in task.tensors]
        example = next(task for some in tasks for task in some)
        loaded = [_flat(steps.load(task.item) for task in some) for some in tasks]
        parts = self._exchange(
            loaded, [[slab.on_rank(other, ranks) for slab in slabs] for other in range(ranks)], example
        )
        wholes = iter([torch.cat(of_one, slab.dim) for slab, *of_one in zip(slabs, *parts, strict=True)])
        results = steps.work([task.item for task in mine], [[next(wholes) for _ in task.tensors] for task in mine])
        sent = _split(_flat(results), [slab for task in mine for slab in task.results()], ranks)
        shapes = [[slab.on_rank(rank, ranks) for task in some for slab in task.results()] for some in tasks]
        for some, tensors in zip(tasks, self._exchange(sent, shapes, example), strict=True):
            _store(some, tensors, steps)

    def _exchange(self, sent: list[list[Tensor]], shapes: list[list[Shape]], example: Task) -> list[list[Tensor]]:
        """Send the tensors `sent[rank]` to each rank, and get tensors of `shapes[rank]` from it."""
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        incoming = [sum(map(prod, some)) for some in shapes]
        buffer = torch.empty(sum(sizes), dtype=example.dtype, device=example.device)
        _pack([tensor for tensors in sent for tensor in tensors], buffer)
        received = buffer.new_empty(sum(incoming))
        dist.all_to_all_single(received, buffer, incoming, sizes, group=self.group)
        return [_unpack(part, some) for part, some in zip(received.split(incoming), shapes, strict=True)]


@dataclass(frozen=True)
class Anyhow:
    """The weight is spread over `mesh` in another way: every rank gathers the whole and does all the work."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def run(self, tasks: Sequence[Task], steps: Steps, bucket_bytes: int) -> None:
        for bucket in share_out(tuple(task.load() for task in tasks), 1, 1, bucket_bytes):
            some = [tasks[index] for index in bucket.tasks]
            wholes = [list(map(self._whole, steps.load(task.item), task.tensors)) for task in some]
            results = steps.work([task.item for task in some], wholes)
            for task, tensors in zip(some, results, strict=True):
                steps.store(task.item, list(map(self._part, tensors, task.results())))

    def _whole(self, part: Tensor, slab: Slab) -> Tensor:
        if slab.dim is None:
            return part
        return spread(part, torch.Size(slab.shape), self.mesh, self.placements).full_tensor()

    def _part(self, tensor: Tensor, slab: Slab) -> Tensor:
        if slab.dim is None:
            return tensor
        return distribute_tensor(tensor, self.mesh, self.placements, src_data_rank=None).to_local()


Holding = Alone | Replicas | Slabs | Anyhow


def holding(parameter: Tensor, replicas: dist.ProcessGroup | None) -> Holding:
    """How ranks hold a weight (out, in) or (experts, out, in); those of `replicas` hold all plain ones alike."""
    if not isinstance(parameter, DTensor):
        return Alone() if replicas is None or replicas.size() == 1 else Replicas(replicas)
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    cut = [placement for placement in placements if not placement.is_replicate()]
    if not cut or mesh.size() == 1 or (parameter.ndim == 3 and all(placement.dim == 0 for placement in cut)):
        return Alone()
    if mesh.ndim == 1:
        return Slabs(mesh.get_group(), cut[0].dim)
    return Anyhow(mesh, placements)


def copies(parameter: Tensor, held: Holding) -> int:
    """How many ranks do the same work on what one of them holds of a weight."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    redundant = placements if isinstance(held, Anyhow) else [one for one in placements if one.is_replicate()]
    return prod(size for size, placement in zip(mesh.shape, placements, strict=True) if placement in redundant)


def slab_of(holding: Holding, shape: Shape, is_state: bool = False) -> Slab:
    """How a tensor travels: one of the shape of the weight, or one of its state with a shape of its own."""
    if isinstance(holding, Slabs):
        return Slab(shape, 0 if is_state else holding.dim)
    return Slab(shape, None if is_state or isinstance(holding, Replicas) else 0)


def new_state(parameter: Tensor, holding: Holding, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Zeros of a shape of their own, spread as `slab_of` says; where the weight is held `Alone`, as that is."""
    if not isinstance(parameter, DTensor):
        return parameter.new_zeros(shape, dtype=dtype)
    mesh = parameter.device_mesh
    if isinstance(holding, Slabs):
        return zeros(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    if isinstance(holding, Anyhow):
        return zeros(shape, dtype=dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    part = local(parameter)
    cut = {dim: own for dim, (size, own) in enumerate(zip(parameter.shape, part.shape, strict=True)) if own != size}
    sizes = [cut.get(dim, size) for dim, size in enumerate(shape)]
    return spread(part.new_zeros(sizes, dtype=dtype), torch.Size(shape), mesh, parameter.placements)


def run_tasks(tasks: Iterable[tuple[Holding, Task]], steps: Steps, bucket_bytes: int) -> None:
    """Work on weights together with the ranks that hold them: those held alike and alike in dtype at a time."""
    alike: dict[Any, list[Task]] = {}
    for held, task in tasks:
        alike.setdefault((held, task.dtype, task.device), []).append(task)
    for (held, _, _), some in alike.items():
        held.run(some, steps, bucket_bytes)


def spread(part: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """The tensor of `shape` of which each rank has its `part`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def groups_of(parameter: Tensor, replicas: dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
    """The groups over which something that ranks found out about a weight must be reduced, one after the other."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.get_all_groups()
    return [] if replicas is None else [replicas]


def copy_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over ranks."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def _flat(lists: Iterable[list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def _pack(tensors: Sequence[Tensor], buffer: Tensor) -> None:
    """Copy tensors one behind the other into the beginning of a flat buffer, in its dtype."""
    start = 0
    for tensor in tensors:
        buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
        start += tensor.numel()


def _unpack(buffer: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Views of a flat buffer, one behind the other."""
    sizes = [prod(shape) for shape in shapes]
    parts = buffer[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _split(tensors: Sequence[Tensor], slabs: Sequence[Slab], ranks: int) -> list[list[Tensor]]:
    """The slabs of whole tensors that each rank holds."""
    cut = [
        tensor.split(chunk_sizes(slab.shape[slab.dim], ranks), slab.dim)
        for tensor, slab in zip(tensors, slabs, strict=True)
    ]
    return [[parts[rank] for parts in cut] for rank in range(ranks)]


def _store(tasks: Sequence[Task], tensors: Sequence[Tensor], steps: Steps) -> None:
    """Hand each task the results that came for it, in the order of the tasks."""
    remaining = iter(tensors)
    for task in tasks:
        steps.store(task.item, [next(remaining) for _ in task.results()])
