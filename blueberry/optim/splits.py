"""Which matrices a stored weight holds: transposed storage and fused projections, cut apart and joined again.

The polar factor of a fused weight mixes what are separate maps (gate and up; query, key and value; the experts of a
stacked adapter): each is orthogonalized by itself. A `Layout` says how, as plain data; `cut` and `join` do it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError


class Layout(NamedTuple):
    """How a stored weight unfolds into matrices (out, in).

    `transposed`: the last two dimensions are stored as (in, out), as Conv1D and the experts of gpt-oss do.
    `dim`: the dimension that is cut once the matrix is (out, in): -2 the outputs (rows), -1 the inputs (columns).
    `shape`: what that dimension unfolds to, one entry may be -1; () leaves the matrix whole.
    `axis`: the axis of `shape` that counts the parts; `sizes`: entries of it for each part, () for one each.

    Examples: `Layout(shape=(2, -1))` two halves; `Layout(shape=(-1, 2), axis=1)` even and odd rows;
    `Layout(shape=(-1, 3, 64), axis=1)` query, key and value of each head of 64 in turn;
    `Layout(shape=(-1,), sizes=(32, 8, 8))` unequal blocks; `Layout(shape=(-1, 64))` heads of 64 rows.
    """

    transposed: bool = False
    dim: int = -2
    shape: tuple[int, ...] = ()
    axis: int = 0
    sizes: tuple[int, ...] = ()


def cut(stack: Tensor, layout: Sequence | None) -> list[Tensor]:
    """(..., out, in), or (..., in, out) when transposed -> the parts, views wherever strides allow.

    Equal parts come as one tensor (..., parts, out_i, in_i), unequal ones as one tensor (..., out_i, in_i) each.
    `layout` is a Layout, the plain tuple of one, or None for a plain (out, in).
    """
    transposed, dim, shape, axis, sizes = layout or Layout()
    matrix = stack.mT if transposed else stack
    if not shape:
        return [matrix]
    first = dim - len(shape) + 1  # where the unfolded axes begin
    unfolded = matrix.unflatten(dim, shape)
    if sizes:
        return [part.flatten(first, dim) for part in unfolded.split(sizes, first + axis)]
    parts = unfolded.movedim(first + axis, -len(shape) - 1)  # (..., parts, the other axes and the uncut dimension)
    return [parts.flatten(first + 1, dim)]


def join(parts: Sequence[Tensor], layout: Sequence | None) -> Tensor:
    """The inverse of `cut`: a tensor of the shape that `cut` was given, its last two dimensions as stored."""
    transposed, dim, shape, axis, sizes = layout or Layout()
    matrix = parts[0]
    first = dim - len(shape) + 1
    if sizes:
        unfolded = [part.unflatten(dim, _replace(shape, axis, size)) for part, size in zip(parts, sizes, strict=True)]
        matrix = torch.cat(unfolded, first + axis).flatten(first, dim)
    elif shape:
        unfolded = matrix.unflatten(dim, shape[:axis] + shape[axis + 1 :])
        matrix = unfolded.movedim(-len(shape) - 1, first + axis).flatten(first, dim)
    return matrix.mT if transposed else matrix


def check_layout(name: str, shape: Sequence[int], layout: Layout) -> None:
    """Raise UsageError when a weight called `name` of this shape cannot be cut by `layout`."""
    if layout.dim not in (-2, -1) or (layout.shape and not 0 <= layout.axis < len(layout.shape)):
        raise UsageError(f"{layout} of {name}: dim is -2 (outputs) or -1 (inputs), axis an index of shape")
    if len(layout.shape) == 1 and not layout.sizes:
        raise UsageError(f"{layout} of {name} makes every row a part: give sizes, or a shape such as (2, -1)")
    try:
        cut(torch.empty(tuple(shape), device="meta"), layout)
    except RuntimeError:
        raise UsageError(f"{layout} does not fit {name} of shape {tuple(shape)}: its sizes must add up") from None


def describe(layout: Layout | None) -> str:
    """A few words for the audit: how the weight is stored and cut."""
    if layout is None:
        return ""
    words = ["stored transposed"] if layout.transposed else []
    if layout.shape:
        side = "rows" if layout.dim == -2 else "columns"
        words.append(f"{side} {list(layout.shape)} cut along axis {layout.axis}")
    if layout.sizes:
        words[-1] += f" into {list(layout.sizes)}"
    return ", ".join(words)


def _replace(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
