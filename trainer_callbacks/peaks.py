"""The largest weight and gradient norm of each matrix between two logs, at the cost of reading both once a step."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from blueberry.spectral.tracked import Tracked

Key = tuple[str, int | None]  # name of the matrix, expert


class Peaks:
    """Running maxima of Frobenius norms since the last `take`, on the device, waiting for nothing.

    Products of LoRA factors and sharded parameters have none: their norms would cost a product or a message a step.
    """

    def __init__(self, tracked: Iterable[Tracked]):
        whole = [one for one in tracked if one.parameter is not None and not isinstance(one.parameter, DTensor)]
        self._of = {}  # device -> what lies on it
        for one in whole:
            self._of.setdefault(one.parameter.device, []).append(one)
        self._keys = {device: _keys(of_device) for device, of_device in self._of.items()}
        self._weights: dict[torch.device, Tensor] = {}
        self._gradients: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Look at the weights, and at the gradients as the optimizer is about to use them."""
        for device, tracked in self._of.items():
            weights = _norms(tracked, lambda one: one.parameter)
            gradients = _norms(tracked, lambda one: one.parameter.grad)
            self._weights[device] = torch.fmax(self._weights.get(device, weights), weights)
            self._gradients[device] = torch.fmax(self._gradients.get(device, gradients), gradients)

    def take(self) -> dict[Key, tuple[float | None, float | None]]:
        """(weight norm, gradient norm) of each matrix, and start anew; None where no finite one was seen."""
        found = {}
        for device, weights in self._weights.items():
            pairs = zip(weights.tolist(), self._gradients[device].tolist(), strict=True)
            found |= {key: tuple(map(_finite, pair)) for key, pair in zip(self._keys[device], pairs, strict=True)}
        self._weights, self._gradients = {}, {}
        return found

    def save(self, path: Path) -> None:
        """Write what was seen since the last log, for a run resumed from the checkpoint of this step."""
        seen = [[tensor.tolist() for tensor in norms.values()] for norms in (self._weights, self._gradients)]
        path.write_text(json.dumps(seen))

    def load(self, path: Path) -> None:
        """Go on from what was saved, if there is something and it fits."""
        if not path.is_file():
            return
        for target, saved in zip((self._weights, self._gradients), json.loads(path.read_text()), strict=True):
            for (device, keys), values in zip(self._keys.items(), saved, strict=False):
                if len(keys) == len(values):
                    target[device] = torch.tensor(values, device=device)


def _pieces(one: Tracked, tensor: Tensor) -> list[tuple[Key, Tensor]]:
    named = one.parts(tensor).items()
    return [
        ((name, expert), matrix)
        for name, piece in named
        for expert, matrix in (enumerate(piece) if piece.ndim == 3 else [(None, piece)])
    ]


def _keys(tracked: list[Tracked]) -> list[Key]:
    return [key for one in tracked for key, _ in _pieces(one, torch.empty_like(one.parameter, device="meta"))]


def _norms(tracked: list[Tracked], tensor_of: Callable[[Tracked], Tensor | None]) -> Tensor:
    """fp32 norms, one for each key; NaN, which `fmax` passes over, where there is no gradient."""
    norms: list[Tensor | None] = []
    flat: list[Tensor] = []
    for one in tracked:
        tensor = tensor_of(one)
        if tensor is None:
            count = len(_pieces(one, torch.empty_like(one.parameter, device="meta")))
            norms.append(torch.full((count,), torch.nan, device=one.parameter.device))
            continue
        for piece in one.parts(tensor).values():
            if piece.ndim == 3:
                norms.append(torch.linalg.vector_norm(piece, dim=(-2, -1), dtype=torch.float32))  # (E,)
            else:
                flat.append(piece)
                norms.append(None)
    singles = iter(torch._foreach_norm(flat, 2, dtype=torch.float32) if flat else [])
    return torch.cat([next(singles)[None] if norm is None else norm for norm in norms])


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
