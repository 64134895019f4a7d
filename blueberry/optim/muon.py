"""Muon: momentum, then the polar factor of it, then a step.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import UsageError
from ..polar import coefficient_steps, newton_schulz

SCALE_MODES = ("shape", "rms_match", "none")


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


class Muon(Optimizer):
    """Muon for matrices (out, in) and stacks of matrices (experts, out, in), each matrix orthogonalized by itself.

    State is one `momentum_buffer` per parameter (none with `momentum=0`), created at the first step, float32 unless
    the parameter is float64. Matrices of one shape are orthogonalized together, at most `batch_bytes` at a time.

    Args:
        params: parameters or parameter groups; every parameter has 2 or 3 dimensions.
        lr: learning rate, multiplied by the factor of `scale_mode`.
        momentum: decay of the running mean of gradients; 0 switches momentum off.
        nesterov: orthogonalize (1 - momentum) grad + momentum * buffer instead of the buffer.
        ns_steps, coefficients: see `blueberry.polar.newton_schulz`.
        scale_mode: `shape`, `rms_match` or `none`, see `update_scale`.
        weight_decay: decoupled: weights shrink by lr * weight_decay a step.
        orthogonalize: False steps along the momentum itself (ablation).
        ns_dtype: dtype of the Newton-Schulz products; None takes the device's fastest.
        batch_bytes: bound on the bytes of one batch of same-shaped matrices.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | None = None,
        coefficients: str = "polar_express",
        scale_mode: str = "shape",
        weight_decay: float = 0.0,
        orthogonalize: bool = True,
        ns_dtype: torch.dtype | None = None,
        batch_bytes: int = 64 * 2**20,
    ):
        self.ns_dtype = ns_dtype
        self.batch_bytes = batch_bytes
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "scale_mode": scale_mode,
            "weight_decay": weight_decay,
            "orthogonalize": orthogonalize,
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
        for group in self.param_groups:
            for batch in self._batches(group):
                self._step_batch(batch, group)
        return loss

    def orthogonalize(self, directions: Tensor, group: dict[str, Any]) -> Tensor:
        """(..., out, in) descent directions -> (..., out, in) updates of unit scale. What a variant overrides."""
        return newton_schulz(directions, group["ns_steps"], group["coefficients"], self.ns_dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_state_dtype(self, state_dict)

    def _batches(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """Parameters with gradients, those of one shape, dtype and device together, bounded by `batch_bytes`."""
        alike: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
        for parameters in alike.values():
            size = max(1, self.batch_bytes // max(1, parameters[0].numel() * 4))
            for start in range(0, len(parameters), size):
                yield parameters[start : start + size]

    def _step_batch(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = torch.stack([self._direction(parameter, group) for parameter in parameters])
        scale = 1.0
        if group["orthogonalize"]:
            directions = self.orthogonalize(directions, group)
            scale = update_scale(group["scale_mode"], *parameters[0].shape[-2:])
        decay = 1 - group["lr"] * group["weight_decay"]
        for parameter, update in zip(parameters, directions.unbind(), strict=True):
            if decay != 1:
                parameter.mul_(decay)
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Gradient with momentum, in the dtype of the momentum buffer."""
        momentum = group["momentum"]
        state_dtype = torch.promote_types(parameter.dtype, torch.float32)
        gradient = parameter.grad.to(state_dtype)
        if momentum == 0:
            return gradient
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=state_dtype)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum) if group["nesterov"] else buffer


def _check_group(group: dict[str, Any]) -> None:
    """Refuse what cannot work, naming parameter, value and remedy."""
    if group["lr"] < 0:
        raise UsageError(f"lr={group['lr']} is negative: Muon's learning rate is typically 0.01 to 0.05")
    if not 0 <= group["momentum"] < 1:
        raise UsageError(
            f"momentum={group['momentum']} is outside [0, 1): Muon's is typically 0.95, 0 switches it off"
        )
    if group["weight_decay"] < 0:
        raise UsageError(f"weight_decay={group['weight_decay']} is negative: use 0 for none")
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
    """Undo torch's cast of loaded state to the parameter's dtype: momentum of a bfloat16 parameter stays float32."""
    saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved_ids, parameters, strict=True):
        saved = state_dict["state"].get(index, {}).get("momentum_buffer")
        if saved is not None and saved.dtype != optimizer.state[parameter]["momentum_buffer"].dtype:
            optimizer.state[parameter]["momentum_buffer"] = saved.to(parameter.device, copy=True)
