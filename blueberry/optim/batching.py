"""Which matrices an optimizer takes at once, those of one kind, as many as fit; and the steps of such batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..threads_blueberry import run_on_workers


class HasWeight(Protocol):
    @property
    def weight(self) -> Tensor: ...

    @property
    def group(self) -> dict[str, Any]: ...


_Piece = TypeVar("_Piece", bound=HasWeight)
Fitting = Callable[[Tensor], int]  # how many weights like this one to take at once, at least one


def in_batches(pieces: Iterable[_Piece], fitting: Fitting) -> Iterator[list[_Piece]]:
    """Pieces of one group whose weights have one shape, dtype and device, at most `fitting(weight)` at once."""
    alike: dict[Any, list[_Piece]] = {}
    for piece in pieces:
        kind = id(piece.group), piece.weight.shape, piece.weight.dtype, piece.weight.device
        alike.setdefault(kind, []).append(piece)
    for some in alike.values():
        size = fitting(some[0].weight)
        for start in range(0, len(some), size):
            yield some[start : start + size]


def step_batches(step: Callable[[list[_Piece]], None], batches: Sequence[list[_Piece]], threads_each: int = 1) -> None:
    """Step each batch, without gradients: on a CPU on workers with so many threads each, elsewhere one by one."""
    if all(batch[0].weight.device.type == "cpu" for batch in batches):
        return run_on_workers(step, batches, threads_each)
    with torch.no_grad():
        for batch in batches:
            step(batch)


def expert_slices(stack: Tensor, fitting: Fitting, parts: int = 1) -> Iterator[slice]:
    """The experts of a stack (experts, out, in) in at least `parts` slices, as many experts in each as fit."""
    if not stack.numel():
        return
    experts = min(fitting(stack[0]), -(-len(stack) // parts))
    for start in range(0, len(stack), experts):
        yield slice(start, start + experts)
