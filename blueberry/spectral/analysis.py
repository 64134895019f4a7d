"""Metrics of many matrices at once: batched by shape, spread over threads, one BLAS thread each."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads_blueberry import one_blas_thread
from .metrics import Row, update_rows, weight_rows
from .names import matrix_name

BATCH_ELEMENTS = 2**19  # matrix elements taken at once: small ones share calls, large ones stay in the cache


class _Matrix(NamedTuple):
    parameter: str
    expert: int | None
    weight: Tensor  # (out, in)
    update: Tensor | None  # (out, in)


def analyze(
    matrices: Mapping[str, Tensor],
    updates: Mapping[str, Tensor] | None = None,
    *,
    top_k: int = 10,
    k: int = 5,
    updated: bool = False,
    exact: bool = False,
    power_law: bool = False,
    workers: int | Executor = 1,
) -> list[Row]:
    """`spectral_metrics` of every named matrix (out, in) and stack (E, out, in), and `update_metrics` of `updates`.

    Returns one row per matrix, experts one by one, in the order of `matrices`: the metrics, `reason`, and `parameter`,
    `layer`, `module`, `projection`, `expert`, `rows`, `columns`. Names missing from `updates` get no update metrics.

    updated: `matrices` already contain `updates`; update metrics then refer to `matrices - updates`, the weights
        that the updates were applied to. (Measured against the result, an update aligns with itself.)
    exact: SVDs in fp64 throughout; by default fast, to 1e-3 relative.
    power_law: also `power_law_exponent` (see `spectral_metrics`).
    workers: threads, or the executor that has them; each takes a batch of equal shapes at a time and one BLAS thread.
    """
    slices = list(_slices(matrices, updates or {}))
    rows: list[Row | None] = [None] * len(slices)
    batches = list(_batches(slices))

    def work(indices: list[int]) -> None:
        with one_blas_thread():
            batch = _analyze_batch([slices[i] for i in indices], top_k, k, updated, exact, power_law)
        for i, row in zip(indices, batch, strict=True):
            rows[i] = row

    if workers == 1:
        for batch in batches:
            work(batch)
    elif isinstance(workers, int):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, batches))
    else:
        list(workers.map(work, batches))
    return rows


def _slices(matrices: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Iterator[_Matrix]:
    for name, weight in matrices.items():
        update = updates.get(name)
        if update is not None and update.shape != weight.shape:
            raise ValueError(f"{name}: update {tuple(update.shape)} and weight {tuple(weight.shape)} differ in shape")
        if weight.ndim == 2:
            yield _Matrix(name, matrix_name(name).expert, weight, update)
        elif weight.ndim == 3:
            for e in range(len(weight)):
                yield _Matrix(name, e, weight[e], None if update is None else update[e])
        else:
            raise ValueError(f"{name}: expected a matrix or a stack of matrices, got shape {tuple(weight.shape)}")


def _batches(slices: list[_Matrix]) -> list[list[int]]:
    """Indices of matrices of one shape, kind and device, at most `BATCH_ELEMENTS` elements together; largest first."""
    groups: dict[tuple, list[int]] = {}
    for i, (_, _, weight, update) in enumerate(slices):
        groups.setdefault((weight.shape, weight.dtype, weight.device, update is None), []).append(i)
    cost = lambda group: -(min(slices[group[0]].weight.shape) ** 2) * max(slices[group[0]].weight.shape)
    batches = []
    for group in sorted(groups.values(), key=cost):
        size = max(1, BATCH_ELEMENTS // slices[group[0]].weight.numel())
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _analyze_batch(batch: list[_Matrix], top_k: int, k: int, updated: bool, exact: bool, power_law: bool) -> list[Row]:
    weights = _stack([matrix.weight for matrix in batch])  # (B, out, in)
    rows = weight_rows(weights, top_k, exact=exact, power_law=power_law)
    if batch[0].update is not None:
        updates = _stack([matrix.update for matrix in batch]).double()
        before = weights.double() - updates if updated else weights
        for row, update_row in zip(rows, update_rows(before, updates, k, exact=exact), strict=True):
            reasons = [reason for reason in (row["reason"], update_row["reason"]) if reason]
            row |= update_row | {"reason": "; ".join(reasons) or None}
    return [_identity(matrix) | row for matrix, row in zip(batch, rows, strict=True)]


def _stack(matrices: list[Tensor]) -> Tensor:
    """(B, out, in); a view of one alone."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]


def _identity(matrix: _Matrix) -> Row:
    name = matrix_name(matrix.parameter)
    out, columns = matrix.weight.shape
    return {
        "parameter": matrix.parameter,
        "layer": name.layer,
        "module": name.module,
        "projection": name.projection,
        "expert": matrix.expert,
        "rows": out,
        "columns": columns,
    }
