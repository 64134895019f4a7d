"""Parameter groups of the hybrid optimizers, made from assignments."""

from itertools import count
from typing import Any

import torch
from torch import Tensor

from .param_groups import Assignment
from .splits import Layout


def pop_adamw_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Take AdamW's settings out of `values`, with defaults; `weight_decay` stays for the other parts."""
    return {
        "lr": values.pop("adamw_lr", 0.008),
        "betas": (values.pop("adam_beta1", 0.9), values.pop("adam_beta2", 0.95)),
        "eps": values.pop("adam_epsilon", 1e-8),
        "max_grad_norm": values.pop("max_grad_norm", 1.0) or 0.0,
        "weight_decay": values.get("weight_decay", 0.0),
    }


def matrix_groups(assignments: list[Assignment], optimizer: str, name: str) -> list[dict[str, Any]]:
    """One group for each layout, plain matrices first; the layout goes in as a plain tuple, which checkpoints take.

    They are called `name` for the first, then `name_transposed`, `name_split_1`, `name_split_2`, ...
    """
    by_layout: dict[Layout | None, list[tuple[str, Tensor]]] = {}
    for assignment in assignments:
        if assignment.optimizer == optimizer:
            by_layout.setdefault(assignment.layout, []).append((assignment.name, assignment.parameter))
    ordered = sorted(by_layout.items(), key=lambda item: item[0] is not None)  # stable: plain ones first
    names = _group_names(name, [layout for layout, _ in ordered])
    return [
        {"params": named, "name": group_name, "layout": None if layout is None else tuple(layout)}
        for group_name, (layout, named) in zip(names, ordered, strict=True)
    ]


def adamw_groups(assignments: list[Assignment], adamw: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay, vectors without."""
    groups = []
    for name, is_vector, decay in (("adamw", False, adamw["weight_decay"]), ("adamw_vectors", True, 0.0)):
        chosen = [a for a in assignments if a.optimizer == "adamw" and (a.group == "vectors") == is_vector]
        if chosen:
            groups.append(
                {
                    "params": [(a.name, a.parameter) for a in chosen],
                    "name": name,
                    "weight_decay": decay,
                    "max_grad_norm": adamw["max_grad_norm"],
                }
            )
    return groups


def adamw_part(groups: list[dict[str, Any]], adamw: dict[str, Any]) -> torch.optim.AdamW:
    """torch's AdamW; its fused kernel where every device has it."""
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"])
    return torch.optim.AdamW(groups, lr=adamw["lr"], betas=adamw["betas"], eps=adamw["eps"], fused=fused)


def _group_names(name: str, layouts: list[Layout | None]) -> list[str]:
    splits = count(1)
    rest = (f"{name}_split_{next(splits)}" if layout.shape else f"{name}_transposed" for layout in layouts[1:])
    return [name, *rest][: len(layouts)]
