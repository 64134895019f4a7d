"""Memory that is used again: an iteration of many products of one shape would else ask the system for each result.

The CPU's allocator gives large blocks back at once, and taking them again costs a fault for each page, in all up to a
seventh of an optimizer's step.
"""

import threading
from math import prod

import torch
from torch import Tensor


class Scratch(threading.local):
    """Buffers by name, to each thread its own. A tensor taken under a name is overwritten by what the thread takes
    under that name next."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialized tensor of a shape, of the dtype and device of another."""
        key, size = (name, like.dtype, like.device), prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = like.new_empty(size)
        return self._buffers[key][:size].view(shape)


def place(scratch: Scratch | None, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """What to give an operation as `out`: a buffer, or without scratch memory None, for a new tensor."""
    return None if scratch is None else scratch.take(name, shape, like)
