"""Memory for large tensors that every training step takes and frees, on a CPU.

glibc gives back to the system what lies free at the end of its heap, and freed blocks of more than 32 MiB: all
gradients, once they are set to None. Faulting new memory in took up to a tenth of a training step of `blueberry-moe`.
Here it stays for the next step, while a weight lives that it was taken for. The file ships to the Hub as remote code,
so it imports torch and NumPy only.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

LARGE = 2**20  # bytes; faulting in 256 pages takes many times as long as looking for a block
ALIGNMENT = 64  # bytes, as torch has it


def large_empty(weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor on the weight's device; if it is large, in memory that is kept for as long as that."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or weight.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=weight.device)
    memory = torch.from_numpy(_blocks[size].take(size + ALIGNMENT, weight))
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size].view(dtype).view(shape)


class _Blocks:
    """Freed memory of one size, and the weights it was taken for."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.weights: set[int] = set()

    def take(self, size: int, weight: Tensor) -> np.ndarray:
        """A block that comes back when nothing refers to it any more: torch holds on to it while a tensor does."""
        if id(weight) not in self.weights:
            self.weights.add(id(weight))
            _when_gone(weight, self.forget, id(weight))
        try:
            memory = self.free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        block = memory[:]
        _when_gone(block, self.give_back, memory)
        return block

    def give_back(self, memory: np.ndarray) -> None:
        """Keep it, up to two for each weight: a step's gradient and the one it is added to."""
        if len(self.free) < 2 * len(self.weights):
            self.free.append(memory)

    def forget(self, weight: int) -> None:
        self.weights.discard(weight)
        if not self.weights:
            self.free.clear()


_blocks: defaultdict[int, _Blocks] = defaultdict(_Blocks)  # size in bytes -> blocks


def _when_gone(thing: Any, call: Callable[[Any], None], argument: Any) -> None:
    finalize(thing, call, argument).atexit = False
