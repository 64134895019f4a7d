"""Muon: momentum, then the polar factor of it, then a step.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..errors import UsageError
from ..polar import coefficient_steps, fastest_dtype, newton_schulz
from ..scratch import Scratch
from .batching import expert_slices, in_batches, step_batches
from .costs import newton_schulz_flops
from .distributed import Alone, Anyhow, Holding, Slabs, Steps, Task, holding, local, new_state, run_tasks, slab_of
from .sharing import BUCKET_BYTES
from .splits import cut, join

SCALE_MODES = ("shape", "rms_match", "none")
CPU_BATCH_BYTES, BATCH_BYTES = 32 * 2**20, 512 * 2**20  # for each thread of a CPU
CHUNK_ENTRIES = 2**18  # 1 MiB in float32


def update_scale(scale_mode: str, out_features: int, in_features: int) -> float:
    """Factor on the polar factor of an (out, in) matrix.

    `shape`: max(1, out/in)^0.5, so that a step changes the output by about lr whatever the shape (K. Jordan).
    `rms_match`: 0.2 max(out, in)^0.5, the RMS of a typical AdamW update, so that AdamW's learning rates carry over
    (Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982). `none`: 1.
    """
    if scale_mode == "shape":
        return max(1.0, out_features / in_features) ** 0.5
    if scale_mode == "rms_match":
        return 0.2 * max(out_features, in_features) ** 0.5
    return 1.0


class _Piece(NamedTuple):
    """What this rank holds of a parameter, or of some experts of one, with what belongs to it: all views."""

    parameter: Tensor
    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    shape: torch.Size  # of the whole weight, whose slab `weight` may be
    holding: Holding
    group: dict[str, Any]


class Muon(Optimizer):
    """Muon for matrices (out, in) and stacks of matrices (experts, out, in), each matrix orthogonalized by itself.

    State is one `momentum_buffer` per parameter (none with `momentum=0`), created at the first step, float32 unless
    the parameter is float64. Matrices of one shape are orthogonalized together.

    Args:
        params: parameters or parameter groups; every parameter has 2 or 3 dimensions.
        lr: learning rate, multiplied by the factor of `scale_mode`.
        momentum: decay of the running mean of gradients; 0 switches momentum off.
        nesterov: orthogonalize (1 - momentum) grad + momentum * buffer instead of the buffer.
        ns_steps, coefficients: see `blueberry.polar.newton_schulz`.
        scale_mode: `shape`, `rms_match` or `none`, see `update_scale`.
        weight_decay: decoupled: weights shrink by lr * weight_decay a step.
        cautious: decay only the entries that the update shrinks too (Chen et al., "Cautious Weight Decay",
            arXiv:2510.12402).
        neuron_beta: above 0, divide each row of the update by the root of a running mean of its squares and keep the
            update's norm (Li et al., "NorMuon", arXiv:2510.05491; there 0.95). One number more of state per row.
        orthogonalize: False steps along the momentum itself (ablation).
        ns_dtype: dtype of the Newton-Schulz products; None takes the device's fastest.
        layout: how the weights of a group hold their matrices, see `blueberry.optim.splits.Layout`.
        batch_bytes: bound on temporary memory, as far as one matrix allows; None takes 32 MiB for each thread on a
            CPU, measured fastest, and 512 MiB elsewhere.
        bucket_bytes: bound on a buffer for what ranks send one another, as far as one weight allows.

    Weights may be DTensors (FSDP2, tensor parallelism), see `blueberry.optim.distributed`. Ranks of the process group
    `replicas` (DDP) share the work on plain weights; with None, the default, each does all of it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | None = None,
        coefficients: str = "robust",
        scale_mode: str = "shape",
        weight_decay: float = 0.0,
        cautious: bool = False,
        neuron_beta: float = 0.0,
        orthogonalize: bool = True,
        layout: Sequence | None = None,
        ns_dtype: torch.dtype | None = None,
        batch_bytes: int | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.ns_dtype = ns_dtype
        self.batch_bytes = batch_bytes
        self.bucket_bytes = bucket_bytes
        self.replicas: ProcessGroup | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "scale_mode": scale_mode,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "neuron_beta": neuron_beta,
            "orthogonalize": orthogonalize,
            "layout": None if layout is None else tuple(layout),
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient. Never writes into a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = [piece for group in self.param_groups for piece in self._pieces(group)]
        self._step_alone([piece for piece in pieces if isinstance(piece.holding, Alone)])
        shared = [(piece.holding, self._task(piece)) for piece in pieces if not isinstance(piece.holding, Alone)]
        run_tasks(shared, Steps(self._load, self._work, self._move), self.bucket_bytes)
        return loss

    def orthogonalize(self, directions: Tensor, group: dict[str, Any], scratch: Scratch | None = None) -> Tensor:
        """(..., out, in) descent directions -> (..., out, in) updates of unit scale. What a variant overrides."""
        return newton_schulz(directions, group["ns_steps"], group["coefficients"], directions.dtype, scratch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_state_dtype(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("ns_dtype", "batch_bytes", "bucket_bytes")}
        return {**super().__getstate__(), **own, "replicas": None}  # a process group cannot be copied

    def _pieces(self, group: dict[str, Any]) -> Iterator[_Piece]:
        """Every parameter with a gradient; a stack of experts in slices where it alone would break `batch_bytes`, and
        where ranks share its experts."""
        for parameter in group["params"]:
            if parameter.grad is None or parameter.numel() == 0:
                continue
            needs_whole = group["orthogonalize"] or group["neuron_beta"]
            held = holding(parameter, self.replicas) if needs_whole else Alone()
            state = {name: local(tensor) for name, tensor in self._state_of(parameter, held, group).items()}
            piece = _Piece(parameter, local(parameter), local(parameter.grad), state, parameter.shape, held, group)
            if parameter.ndim == 2 or isinstance(held, Slabs | Anyhow):
                yield piece
                continue
            for chosen in expert_slices(piece.weight, self._fitting, held.ranks):
                weight, views = piece.weight[chosen], {name: tensor[chosen] for name, tensor in state.items()}
                yield piece._replace(weight=weight, gradient=piece.gradient[chosen], state=views, shape=weight.shape)

    def _fitting(self, weight: Tensor) -> int:
        """How many weights like this one a batch may have, at least one; batches that a CPU's threads have in the
        works together share the bound on memory."""
        if weight.device.type != "cpu":
            limit = self.batch_bytes or BATCH_BYTES
        elif self.batch_bytes is None:
            limit = CPU_BATCH_BYTES
        else:
            limit = self.batch_bytes // torch.get_num_threads()
        return max(1, limit // self._temporary_bytes(weight))

    def _threads_each(self, batches: Sequence[list[_Piece]]) -> int:
        """BLAS threads for each batch in the works: all of torch's are busy also where there are few batches, or where
        single weights are so large that fewer at once keep to the bound on memory."""
        threads = torch.get_num_threads()
        limit = self.batch_bytes or threads * CPU_BATCH_BYTES
        largest = max(map(self._bytes_of_batch, batches), default=1)
        together = max(1, min(threads, len(batches), limit // largest))
        return -(-threads // together)

    def _bytes_of_batch(self, pieces: list[_Piece]) -> int:
        return len(pieces) * self._temporary_bytes(pieces[0].weight)

    def _temporary_bytes(self, weight: Tensor) -> int:
        """In the dtype of the products three of the weight's size and seven Gram matrices; one update in float32."""
        short, long = sorted(weight.shape[-2:])
        matrices = weight.numel() // max(1, short * long)
        size = self._product_dtype(weight).itemsize * (3 * short * long + 7 * short * short) + 4 * short * long
        return max(1, matrices * size)

    def _product_dtype(self, weight: Tensor) -> torch.dtype:
        if weight.dtype == torch.float64:
            return torch.float64
        return self.ns_dtype or fastest_dtype(weight.device)

    def _state_of(self, parameter: Tensor, held: Holding, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, created when first asked for."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        state = self.state[parameter] if group["momentum"] or group["neuron_beta"] else {}
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
        if group["neuron_beta"] and "neuron_second_moment" not in state:
            neurons = parameter.shape[-1 if _is_transposed(group) else -2]
            shape = (*parameter.shape[:-2], neurons, 1)
            state["neuron_second_moment"] = new_state(parameter, held, shape, dtype)
        return state

    def _step_alone(self, pieces: list[_Piece]) -> None:
        """Step pieces in batches: on a CPU its threads take one each, the largest first, elsewhere one by one."""
        work = partial(self._step_batch, scratch=Scratch())
        batches = sorted(in_batches(pieces, self._fitting), key=self._bytes_of_batch, reverse=True)
        step_batches(work, batches, self._threads_each(batches))

    def _step_batch(self, pieces: list[_Piece], scratch: Scratch) -> None:
        """Step pieces whose matrices are whole on this rank."""
        updates = self._updates(pieces, self._directions(pieces), scratch)
        for piece, update in zip(pieces, updates, strict=True):
            self._move(piece, [update])

    def _updates(self, pieces: list[_Piece], directions: Tensor, scratch: Scratch | None = None) -> Sequence[Tensor]:
        """What to step along, up to lr and `_scale`, from the whole directions (pieces, ..., out, in) of one group."""
        group = pieces[0].group
        updates = self._orthogonalize_parts(directions, group, scratch) if group["orthogonalize"] else directions
        if not group["neuron_beta"]:
            return updates.unbind()
        moments = [piece.state["neuron_second_moment"] for piece in pieces]
        return [_normalize_stored(update, one, group) for update, one in zip(updates, moments, strict=True)]

    def _orthogonalize_parts(self, directions: Tensor, group: dict[str, Any], scratch: Scratch | None) -> Tensor:
        """Orthogonalize each matrix that the group's layout finds in a weight; other scales are brought to one."""
        parts = cut(directions, group["layout"])
        scales = [update_scale(group["scale_mode"], *part.shape[-2:]) for part in parts]
        shared = scratch if len(parts) == 1 else None  # the next part would overwrite this one's update
        updates = [self.orthogonalize(part, group, shared) for part in parts]
        if len(set(scales)) > 1:
            updates = [update * (scale / scales[0]) for update, scale in zip(updates, scales, strict=True)]
        return join(updates, group["layout"])

    def _directions(self, pieces: list[_Piece]) -> Tensor:
        """Gradients with momentum, stacked, in the dtype of the products: (pieces, ..., out, in)."""
        weight = pieces[0].weight
        dtype = self._direction_dtype(pieces[0])
        stack = torch.empty(len(pieces), *weight.shape, dtype=dtype, device=weight.device)
        for place, piece in zip(stack.unbind(), pieces, strict=True):
            _write_direction(place, piece)
        return stack

    def _direction_dtype(self, piece: _Piece) -> torch.dtype:
        return self._product_dtype(piece.weight) if piece.group["orthogonalize"] else _wide(piece.weight.dtype)

    def _move(self, piece: _Piece, results: list[Tensor]) -> None:
        """Step a weight along its update, and keep the state that came with it."""
        update, *state = results
        for tensor in state:
            piece.state["neuron_second_moment"].copy_(tensor)
        group = piece.group
        scale = _scale(piece.shape, group["layout"], group["scale_mode"]) if group["orthogonalize"] else 1.0
        _apply(piece.weight, update, group, scale)

    def _task(self, piece: _Piece) -> Task:
        """For the ranks that share a weight: the direction travels, of NorMuon the second moment as well."""
        slabs, dtype = [slab_of(piece.holding, tuple(piece.shape))], self._direction_dtype(piece)
        if piece.group["neuron_beta"]:
            neurons = piece.shape[-1 if _is_transposed(piece.group) else -2]
            slabs.append(slab_of(piece.holding, (*piece.shape[:-2], neurons, 1), is_state=True))
            dtype = _wide(piece.weight.dtype)
        return Task(piece, tuple(slabs), len(slabs), self._cost(piece), dtype, piece.weight.device)

    def _cost(self, piece: _Piece) -> float:
        """Operations on a weight: all that Newton-Schulz does to its matrices, and one for each entry."""
        group, shape = piece.group, tuple(piece.shape)
        if not group["orthogonalize"]:
            return piece.shape.numel()
        settings = group["layout"], group["ns_steps"], group["coefficients"], self._direction_dtype(piece)
        return piece.shape.numel() + newton_schulz_flops(shape, *settings)

    def _load(self, piece: _Piece) -> list[Tensor]:
        moments = [piece.state["neuron_second_moment"]] if piece.group["neuron_beta"] else []
        return [self._directions([piece])[0], *moments]

    def _work(self, pieces: list[_Piece], wholes: list[list[Tensor]]) -> list[list[Tensor]]:
        """The updates of whole directions, with the second moments of NorMuon."""
        whole = [
            piece._replace(weight=direction, state=dict(zip(["neuron_second_moment"], moments, strict=False)))
            for piece, (direction, *moments) in zip(pieces, wholes, strict=True)
        ]
        updates: dict[int, Tensor] = {}
        for batch in in_batches(whole, self._fitting):
            directions = torch.stack([piece.weight for piece in batch]).to(self._direction_dtype(batch[0]))
            updates |= zip(map(id, batch), self._updates(batch, directions), strict=True)
        return [[updates[id(piece)], *piece.state.values()] for piece in whole]


@cache
def _scale(shape: torch.Size, layout: tuple | None, scale_mode: str) -> float:
    """`update_scale` of the first matrix of a weight, which `Muon._orthogonalize_parts` makes that of all."""
    return update_scale(scale_mode, *cut(torch.empty(shape, device="meta"), layout)[0].shape[-2:])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _write_direction(place: Tensor, piece: _Piece) -> None:
    """Gradient with momentum, computed in the dtype of the momentum buffer, into `place`."""
    momentum = piece.group["momentum"]
    if momentum == 0:
        place.copy_(piece.gradient)
        return
    for part, gradient, buffer in _in_chunks(place, piece.gradient, piece.state["momentum_buffer"]):
        gradient = gradient.to(buffer.dtype)
        buffer.lerp_(gradient, 1 - momentum)
        part.copy_(gradient.lerp(buffer, momentum) if piece.group["nesterov"] else buffer)


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors of one shape along the first dimension, so that temporaries stay in a CPU's caches."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= CHUNK_ENTRIES:
        yield tensors
        return
    length = max(1, CHUNK_ENTRIES // (first.numel() // len(first)))
    yield from zip(*(tensor.split(length) for tensor in tensors), strict=True)


def _is_transposed(group: dict[str, Any]) -> bool:
    return group["layout"] is not None and group["layout"][0]


def _normalize_stored(update: Tensor, second_moment: Tensor, group: dict[str, Any]) -> Tensor:
    """`normalize_neurons` of an update that may be stored as (..., in, out)."""
    if _is_transposed(group):
        return normalize_neurons(update.mT, second_moment, group["neuron_beta"]).mT
    return normalize_neurons(update, second_moment, group["neuron_beta"])


def normalize_neurons(update: Tensor, second_moment: Tensor, beta: float) -> Tensor:
    """Divide rows by the root of the running mean of their squares, and keep the norm of each matrix.

    update (..., out, in); second_moment (..., out, 1), written. Source: Li et al., "NorMuon", arXiv:2510.05491.
    """
    update = update.to(second_moment.dtype)
    second_moment.lerp_(update.square().mean(dim=-1, keepdim=True), 1 - beta)
    normalized = update / (second_moment.sqrt() + 1e-8)
    norm, new_norm = (torch.linalg.matrix_norm(x, keepdim=True) for x in (update, normalized))
    return normalized * (norm / new_norm.clamp_min(1e-30))


def _apply(weight: Tensor, update: Tensor, group: dict[str, Any], scale: float) -> None:
    """weight <- (1 - lr * weight_decay) weight - lr * scale * update."""
    decay = group["lr"] * group["weight_decay"]
    for part, change in _in_chunks(weight, update):
        if decay and group["cautious"]:
            part.sub_(part * (part * change > 0), alpha=decay)
        elif decay:
            part.mul_(1 - decay)
        part.add_(change, alpha=-group["lr"] * scale)


def _check_group(group: dict[str, Any]) -> None:
    """Refuse what cannot work, naming parameter, value and remedy."""
    if not 0 <= group["lr"] < float("inf"):
        raise UsageError(f"lr={group['lr']} is no step size: at least 0, Muon's is typically 0.01 to 0.05")
    if not 0 <= group["momentum"] < 1:
        raise UsageError(
            f"momentum={group['momentum']} is outside [0, 1): Muon's is typically 0.95, 0 switches it off"
        )
    if not 0 <= group["weight_decay"] < float("inf"):
        raise UsageError(f"weight_decay={group['weight_decay']} is no share: at least 0, which is none")
    if not 0 <= group["neuron_beta"] < 1:
        raise UsageError(f"neuron_beta={group['neuron_beta']} is outside [0, 1): NorMuon's is 0.95, 0 switches it off")
    if group["scale_mode"] not in SCALE_MODES:
        raise UsageError(f"scale_mode={group['scale_mode']!r} is unknown: use one of {', '.join(SCALE_MODES)}")
    try:
        coefficient_steps(group["coefficients"], group["ns_steps"])
    except ValueError as error:
        raise UsageError(str(error)) from None
    names = group.get("param_names", [f"params[{i}]" for i in range(len(group["params"]))])
    for name, parameter in zip(names, group["params"], strict=True):
        _check_parameter(name, parameter)


def _check_parameter(name: str, parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if parameter.ndim not in (2, 3):
        raise UsageError(
            f"{name} has shape {shape}: Muon takes matrices (out, in) and stacks (experts, out, in); give it to AdamW"
        )
    if not parameter.is_floating_point():
        raise UsageError(f"{name} is {parameter.dtype}: Muon takes real floating-point parameters; give it to AdamW")


def restore_state_dtype(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Undo torch's cast of loaded state to the parameter's dtype: for a bfloat16 parameter it stays float32."""
    saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved_ids, parameters, strict=True):
        for name, saved in state_dict["state"].get(index, {}).items():
            if isinstance(saved, Tensor) and saved.dtype != optimizer.state[parameter][name].dtype:
                optimizer.state[parameter][name] = saved.to(parameter.device, copy=True)
