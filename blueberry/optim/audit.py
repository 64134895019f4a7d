"""What each parameter got, as a table, and what the first steps did to it."""

import math
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..threads_blueberry import one_blas_thread
from .distributed import copies, groups_of
from .finite import whole
from .muon import Muon

Row = dict[str, Any]

FIRST_STEPS = 2  # of a process; the last of them is measured: in the first, warm-up has lr 0 and LoRA's A no gradient
MAX_SINGULAR_VALUE = 1.5  # of a polar factor 1; Newton-Schulz stays within [0, 1.3] of its own accord
MAX_UPDATE_TO_WEIGHT_RATIO = 1.0  # a step as large as the weights replaces what they hold
_SAMPLED_ROWS = 512  # of a sampled matrix: bounds the cost of its spectrum to a fraction of a second
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_HEADER = ("parameter", "shape", "optimizer", "group", "reason", "orthogonalized", "singular values", "dW/W")


class UpdateMeter:
    """Measures Muon's updates while it steps.

    `measurements` maps a parameter's name to

    - `orthogonalizations`: matrices of it that were orthogonalized in one step;
    - `singular_values`: [least, largest] of the polar factor (the update over lr and scale), of a sample: where names
      differ in numbers only, the matrix with the largest update in the first batch. Of a matrix whose short side
      exceeds 512 that many rows, whose singular values lie between the least and the largest of the whole;
    - `update_to_weight_ratio`: norm(dW) / norm(W), weight decay included; None where it says nothing, for W = 0 and
      lr = 0.
    """

    def __init__(self) -> None:
        self.measurements: dict[str, Row] = {}

    @contextmanager
    def watch(self, muon: Muon) -> Iterator[None]:
        """Measure the step of `muon` that is made within the context."""
        step = _StepMeasurement(muon)
        # shadows, on this object only
        muon._updates, muon.orthogonalize, muon._move = step.updates, step.orthogonalize, step.move
        try:
            yield
        finally:
            del muon._updates, muon.orthogonalize, muon._move
        self.measurements |= {name: sums.row() for name, sums in step.of_all_ranks(muon).items()}


@dataclass
class _Sums:
    """Of one parameter in one step, over the pieces that Muon cuts it into."""

    matrices: float = 0  # a rank counts its share of what several do alike
    singular_values: list[float] = field(default_factory=list)
    squared_change: float = 0.0
    squared_weight: float = 0.0
    lr: float = 0.0

    def row(self) -> Row:
        says_something = self.lr > 0 and self.squared_weight > 0
        ratio = math.sqrt(self.squared_change / self.squared_weight) if says_something else None
        row: Row = {"orthogonalizations": round(self.matrices), "update_to_weight_ratio": ratio}
        if self.singular_values:
            row["singular_values"] = [min(self.singular_values), max(self.singular_values)]
        return row


class _Sample(NamedTuple):
    """The update of one matrix."""

    norm: float
    name: str  # of the parameter
    matrix: Tensor


def _added(sums: Sequence[_Sums]) -> _Sums:
    """Those of one parameter, from several ranks."""
    return _Sums(
        sum(one.matrices for one in sums),
        [value for one in sums for value in one.singular_values],
        sum(one.squared_change for one in sums),
        sum(one.squared_weight for one in sums),
        max((one.lr for one in sums), default=0.0),
    )


class _StepMeasurement:
    """Stands in for three methods of a Muon during one step."""

    def __init__(self, muon: Muon):
        self.sums: dict[str, _Sums] = defaultdict(_Sums)
        self._names = parameter_names(muon)
        self._inner_updates, self._inner_move = muon._updates, muon._move
        self._inner_orthogonalize = muon.orthogonalize
        self._works = threading.local()  # of each worker: the `pieces` in the works
        self._lock = threading.Lock()
        self._largest: dict[tuple[str, torch.Size], _Sample] = {}  # of each kind of parameter

    def updates(self, pieces: list[Any], directions: Tensor, *scratch: Any) -> Sequence[Tensor]:
        self._works.pieces = pieces
        return self._inner_updates(pieces, directions, *scratch)

    def move(self, piece: Any, results: list[Tensor]) -> None:
        before = piece.weight.detach().clone()
        self._inner_move(piece, results)
        squares = _squared_norm(before), _squared_norm(piece.weight - before)
        with self._lock:
            sums = self._sums(piece)
            sums.squared_weight += squares[0]
            sums.squared_change += squares[1]
            sums.lr = float(piece.group["lr"])

    def orthogonalize(self, directions: Tensor, group: dict[str, Any], *scratch: Any) -> Tensor:
        update = self._inner_orthogonalize(directions, group, *scratch)
        pieces = self._works.pieces
        matrices = update.reshape(len(pieces), -1, *update.shape[-2:])  # (pieces, matrices, out, in)
        with self._lock:
            for piece in pieces:
                self._sums(piece).matrices += matrices.shape[1] / copies(piece.parameter, piece.holding)
            self._sample(pieces, matrices)
        return update

    def of_all_ranks(self, muon: Muon) -> dict[str, _Sums]:
        """The sums, also over the ranks that work on the parameters with this one."""
        for sample in self._largest.values():
            self.sums[sample.name].singular_values += _singular_value_range(sample.matrix)
        found = [dict(self.sums)]
        example = next(iter(self._names), None)
        for ranks in [] if example is None else groups_of(example, muon.replicas):
            gathered: list[Any] = [None] * ranks.size()
            dist.all_gather_object(gathered, found, group=ranks)
            found = [sums for of_rank in gathered for sums in of_rank]
        names = [name for name in self._names.values() if any(name in sums for sums in found)]
        return {name: _added([sums[name] for sums in found if name in sums]) for name in names}

    def _sample(self, pieces: list[Any], matrices: Tensor) -> None:
        """Keep the matrix with the largest norm of each kind of parameter, over all batches of the step."""
        largest, which = torch.linalg.vector_norm(matrices, dim=(-2, -1)).max(dim=1)
        for index, norm in enumerate(largest.nan_to_num(nan=math.inf).tolist()):
            name = self._names[pieces[index].parameter]
            kind = _NUMBER.sub("{}", name), matrices.shape[-2:]
            if kind not in self._largest or norm > self._largest[kind].norm:
                self._largest[kind] = _Sample(norm, name, matrices[index, which[index]].clone())

    def _sums(self, piece: Any) -> _Sums:
        return self.sums[self._names[piece.parameter]]


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
        (without_gradient, f"got no gradient in the first {FIRST_STEPS} steps: freeze it, or check that the loss "
         "depends on it"),
        (zero, "got an update of zero from Muon: its gradient is zero; check the initialization (two zero matrices in "
         "a row never move)"),
        (large, f"got an update with singular values above {MAX_SINGULAR_VALUE}: take more ns_steps, another set of "
         "coefficients, or ns_dtype=torch.float32"),
        (lost, "did not change: its gradient is zero, or its updates are lost in rounding; keep weights in float32"),
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


def _squared_norm(tensor: Tensor) -> float:
    return whole(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))).item() ** 2


def _singular_value_range(matrix: Tensor) -> tuple[float, float]:
    """(least, largest) of (out, in), from the eigenvalues of the Gram matrix of at most 512 rows of its short side."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows = wide[:_SAMPLED_ROWS]
    rows = rows.cpu().double() if rows.device.type == "mps" else rows.double()  # MPS has no float64
    if not rows.isfinite().all():
        return math.inf, math.inf
    with one_blas_thread():
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
