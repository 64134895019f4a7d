"""What each parameter got, as a table, and what the first steps did to it."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .finite import whole
from .muon import Muon

Row = dict[str, Any]

MEASURED_STEPS = 2  # the first real steps of a process
MAX_SINGULAR_VALUE = 1.5  # of a polar factor 1; Newton-Schulz stays within [0, 1.3] of its own accord
MAX_UPDATE_TO_WEIGHT_RATIO = 1.0  # a step as large as the weights replaces what they hold
_SAMPLED_ROWS = 512  # of a sampled matrix: bounds the cost of its spectrum to a fraction of a second
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_HEADER = ("parameter", "shape", "optimizer", "group", "reason", "orthogonalized", "singular values", "dW/W")


class UpdateMeter:
    """Measures Muon's updates while it steps.

    `measurements` maps a parameter's name to

    - `orthogonalizations`: matrices of it that were orthogonalized in one step;
    - `singular_values`: [least, largest] of the polar factor (the update over lr and scale), over a sample: of each
      shape and step two parameters, and of a stack the matrix with the largest norm. Of a matrix whose short side
      exceeds 512 that many rows, whose singular values lie between the least and the largest of the whole;
    - `update_to_weight_ratio`: norm(dW) / norm(W), weight decay included, in the last measured step with lr > 0; None
      for W = 0.
    """

    def __init__(self) -> None:
        self.measurements: dict[str, Row] = {}

    @contextmanager
    def watch(self, muon: Muon) -> Iterator[None]:
        """Measure the updates of `muon` as long as the context lasts."""
        names = parameter_names(muon)
        step_batch, orthogonalize = muon._step_batch, muon.orthogonalize
        updates: list[Tensor] = []
        seen: set[torch.Size] = set()

        def keep_update(directions: Tensor, group: dict[str, Any]) -> Tensor:
            updates.append(orthogonalize(directions, group))
            return updates[-1]

        def measure(parameters: list[Tensor], group: dict[str, Any]) -> None:
            updates.clear()
            before = [parameter.detach().clone() for parameter in parameters]
            step_batch(parameters, group)
            rows = [self.measurements.setdefault(names[parameter], {}) for parameter in parameters]
            self._count(rows, updates)
            self._spectra(rows, updates, seen)
            if group["lr"] > 0:
                self._ratios(rows, before, parameters)

        muon._step_batch, muon.orthogonalize = measure, keep_update  # shadow the methods, on this object only
        try:
            yield
        finally:
            del muon._step_batch, muon.orthogonalize

    def _count(self, rows: list[Row], updates: list[Tensor]) -> None:
        matrices = sum(math.prod(update.shape[:-2]) for update in updates)
        for row in rows:
            row["orthogonalizations"] = matrices // len(rows)

    def _spectra(self, rows: list[Row], updates: list[Tensor], seen: set[torch.Size]) -> None:
        """First and last parameter of the first batch of each shape."""
        for update in updates:
            if update.shape[1:] in seen:
                continue
            seen.add(update.shape[1:])
            for index in {0, len(update) - 1}:
                row = rows[min(index, len(rows) - 1)]
                low, high = _singular_value_range(update[index])
                old_low, old_high = row.get("singular_values", (low, high))
                row["singular_values"] = [min(low, old_low), max(high, old_high)]

    def _ratios(self, rows: list[Row], before: list[Tensor], after: list[Tensor]) -> None:
        for row, old, new in zip(rows, before, after, strict=True):
            size = whole(torch.linalg.vector_norm(old, dtype=torch.float32)).item()
            change = whole(torch.linalg.vector_norm(new.float() - old.float())).item()
            row["update_to_weight_ratio"] = change / size if size > 0 else None


def parameter_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """Parameter -> its name; `params[i]` of a group that was given none."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        fallback = [f"params[{len(names) + i}]" for i in range(len(group["params"]))]
        names.update(zip(group["params"], group.get("param_names", fallback), strict=True))
    return names


def audit_warnings(rows: Sequence[Row], without_gradient: Sequence[str] = ()) -> list[str]:
    """What is wrong with the first steps, one line each with the remedy."""
    measured = [row for row in rows if "orthogonalizations" in row]
    sampled = [row for row in measured if "singular_values" in row]
    zero = [row["name"] for row in sampled if row["singular_values"][1] == 0]
    large = [row["name"] for row in sampled if not row["singular_values"][1] <= MAX_SINGULAR_VALUE]
    ratios = {row["name"]: row.get("update_to_weight_ratio") for row in measured}
    lost = [name for name, ratio in ratios.items() if ratio == 0 and name not in zero]
    huge = [name for name, ratio in ratios.items() if ratio is not None and not ratio <= MAX_UPDATE_TO_WEIGHT_RATIO]
    found = (
        (without_gradient, f"got no gradient in the first {MEASURED_STEPS} steps: freeze it, or check that the loss "
         "depends on it"),
        (zero, "got an update of zero from Muon: its gradient is zero; check the initialization (two zero matrices in "
         "a row never move)"),
        (large, f"got an update with singular values above {MAX_SINGULAR_VALUE}: take more ns_steps, another set of "
         "coefficients, or ns_dtype=torch.float32"),
        (lost, "did not change: its updates are lost in rounding; keep the weights in float32 or raise muon_lr"),
        (huge, f"got an update of more than {MAX_UPDATE_TO_WEIGHT_RATIO:g} times its own norm: lower muon_lr"),
    )  # fmt: skip
    return [f"{', '.join(collapse(names))} {text}" for names, text in found if names]


def format_audit(rows: Sequence[Row]) -> str:
    """Markdown table of `optimizer.audit()`; parameters whose names differ in numbers only share a line."""
    families: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (_NUMBER.sub("{}", row["name"]), *(str(row[name]) for name in ("shape", "optimizer", "group", "reason")))
        families.setdefault(key, []).append(row)
    lines = [_line(family) for family in families.values()]
    used = [i for i in range(len(_HEADER)) if i < 5 or any(line[i] for line in lines)]
    return f"{_totals(rows)}\n\n{_markdown([[line[i] for i in used] for line in [_HEADER, *lines]])}\n"


def collapse(names: Sequence[str]) -> list[str]:
    """`a.0.w, a.1.w, b` -> `a.{0-1}.w x2, b`."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_NUMBER.sub("{}", name), []).append(name)
    return [_collapsed(family) for family in families.values()]


def _singular_value_range(matrices: Tensor) -> tuple[float, float]:
    """Of the matrix with the largest norm among (..., out, in), from the eigenvalues of its Gram matrix."""
    matrices = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
    matrix = matrices[torch.linalg.vector_norm(matrices, dim=(-2, -1)).argmax()]
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows = wide[:_SAMPLED_ROWS]
    rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()  # MPS has no float64
    if not rows.isfinite().all():
        return math.nan, math.nan
    squares = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0)  # ascending
    return squares[0].sqrt().item(), squares[-1].sqrt().item()


def _totals(rows: Sequence[Row]) -> str:
    totals: dict[str, list[int]] = {}
    for row in rows:
        totals.setdefault(row["optimizer"], []).append(math.prod(row["shape"]))
    return "; ".join(f"{name}: {len(sizes)} parameters, {sum(sizes):,} values" for name, sizes in totals.items())


def _line(family: Sequence[Row]) -> tuple[str, ...]:
    first = family[0]
    matrices = [row["orthogonalizations"] for row in family if "orthogonalizations" in row]
    spectra = [row["singular_values"] for row in family if row.get("singular_values")]
    ratios = [row["update_to_weight_ratio"] for row in family if row.get("update_to_weight_ratio") is not None]
    return (
        _collapsed([row["name"] for row in family]),
        " x ".join(map(str, first["shape"])),
        first["optimizer"],
        first["group"],
        first["reason"],
        _range(matrices, "d"),
        f"{min(s[0] for s in spectra):.2f} to {max(s[1] for s in spectra):.2f}" if spectra else "",
        _range(ratios, ".2g"),
    )


def _range(values: Sequence[float], spec: str) -> str:
    ends = dict.fromkeys(format(end(values), spec) for end in (min, max)) if values else ()
    return " to ".join(ends)


def _collapsed(names: Sequence[str]) -> str:
    """One name for names that differ in their numbers only."""
    if len(names) == 1:
        return names[0]
    places = zip(*([int(number) for number in _NUMBER.findall(name)] for name in names), strict=True)
    numbers = iter([_numbers(sorted(set(place))) for place in places])
    return f"{_NUMBER.sub(lambda _: next(numbers), names[0])} x{len(names)}"


def _numbers(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if list(values) == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}-{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    padded.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in padded)
