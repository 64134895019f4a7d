"""`build_optimizer`: from a model to its hybrid optimizer."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .composed import ComposedOptimizer
from .muon import Muon
from .param_groups import Assignment, assign_parameters
from .splits import Layout

if TYPE_CHECKING:
    from ..training.arguments import BlueberryTrainingArguments

OPTIMIZERS = ("muon", "adamw")


def build_optimizer(
    model: nn.Module,
    args: "BlueberryTrainingArguments | None" = None,
    *,
    rules: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    split_heads: bool = False,
    max_skipped_steps: int = 10,
    **settings: Any,
) -> ComposedOptimizer:
    """Hybrid of Muon (hidden matrices and experts) and torch's AdamW (the rest) for any module.

    Args:
        model: every parameter that requires a gradient gets exactly one optimizer; `.audit()` tells which and why.
        args: takes the settings from BlueberryTrainingArguments; `settings` win over them.
        rules: regular expression -> `muon` or `adamw`, see `assign_parameters`.
        layouts: regular expression -> `Layout` of transposed or fused weights that are not known, see `splits`.
        split_heads: orthogonalize each head of query, key and value projections by itself.
        max_skipped_steps: steps with inf or NaN in the gradients that may be skipped in a row.
        settings: `optimizer` (`muon`, or `adamw` for everything), `muon_lr`, `adamw_lr`, `weight_decay` (decoupled, of
            both, not on norms and biases), `adam_beta1`, `adam_beta2`, `adam_epsilon`, `max_grad_norm` (of the AdamW
            parameters; 0 for none), and any of Muon's own: `momentum`, `nesterov`, `ns_steps`, ...

    Muon gets one group for each layout of its weights, in the group's `"layout"`; the first is named `muon`.

    Raises UsageError for unknown settings, for models that cannot be trained (see `checks`), and when the hybrid would
    hold no Muon matrix.
    """
    values = (_settings_of(args) if args is not None else {}) | settings
    kind = values.pop("optimizer", "muon")
    if kind not in OPTIMIZERS:
        raise UsageError(f"optimizer={kind!r} is unknown: use one of {', '.join(OPTIMIZERS)}")
    assignments = assign_parameters(model, rules, layouts, split_heads)
    if kind == "adamw":
        assignments = [_without_muon(assignment) for assignment in assignments]
    adamw = _pop_adamw_settings(values)
    parts: dict[str, torch.optim.Optimizer] = {}
    if kind == "muon":
        groups = _muon_groups(assignments)
        _check_muon(groups, values)
        parts["muon"] = Muon(groups, lr=values.pop("muon_lr", 0.02), **values)
    if adamw_groups := _adamw_groups(assignments, adamw):
        parts["adamw"] = torch.optim.AdamW(
            adamw_groups, lr=adamw["lr"], betas=adamw["betas"], eps=adamw["eps"], fused=_can_fuse(adamw_groups)
        )
    if not parts:
        raise UsageError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to optimize")
    return ComposedOptimizer(parts, assignments, max_skipped_steps)


def _settings_of(args: "BlueberryTrainingArguments") -> dict[str, Any]:
    return {
        "optimizer": args.optimizer,
        "muon_lr": args.muon_lr,
        "adamw_lr": args.adamw_lr,
        "momentum": args.muon_momentum,
        "scale_mode": args.scale_mode,
        "weight_decay": args.weight_decay,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_epsilon": args.adam_epsilon,
        "max_grad_norm": args.max_grad_norm,
    }


def _pop_adamw_settings(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "lr": values.pop("adamw_lr", 0.008),
        "betas": (values.pop("adam_beta1", 0.9), values.pop("adam_beta2", 0.95)),
        "eps": values.pop("adam_epsilon", 1e-8),
        "max_grad_norm": values.pop("max_grad_norm", 1.0) or 0.0,
        "weight_decay": values.get("weight_decay", 0.0),
    }


def _without_muon(assignment: Assignment) -> Assignment:
    if assignment.optimizer != "muon":
        return assignment
    return replace(assignment, optimizer="adamw", reason=f"{assignment.reason}; optimizer=adamw", layout=None)


def _named(assignments: list[Assignment], optimizer: str) -> list[tuple[str, Tensor]]:
    return [(a.name, a.parameter) for a in assignments if a.optimizer == optimizer]


def _muon_groups(assignments: list[Assignment]) -> list[dict[str, Any]]:
    """One group for each layout, plain matrices first; the layout goes in as a plain tuple, which checkpoints take."""
    by_layout: dict[Layout | None, list[tuple[str, Tensor]]] = {}
    for assignment in assignments:
        if assignment.optimizer == "muon":
            by_layout.setdefault(assignment.layout, []).append((assignment.name, assignment.parameter))
    ordered = sorted(by_layout.items(), key=lambda item: item[0] is not None)  # stable: plain ones first
    names = _group_names([layout for layout, _ in ordered])
    return [
        {"params": named, "name": name, "layout": None if layout is None else tuple(layout)}
        for name, (layout, named) in zip(names, ordered, strict=True)
    ]


def _group_names(layouts: list[Layout | None]) -> list[str]:
    """`muon` for the first, then `muon_transposed`, `muon_split_1`, `muon_split_2`, ..."""
    splits = count(1)
    rest = (f"muon_split_{next(splits)}" if layout.shape else "muon_transposed" for layout in layouts[1:])
    return ["muon", *rest][: len(layouts)]


def _check_muon(groups: list[dict[str, Any]], values: dict[str, Any]) -> None:
    if not groups:
        raise UsageError("no parameter is a hidden matrix, so Muon would do nothing: add rules or use optimizer=adamw")
    known = set(Muon.__init__.__code__.co_varnames) | {"muon_lr"}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"setting {unknown[0]!r} is unknown: neither Muon nor AdamW takes it")


def _adamw_groups(assignments: list[Assignment], adamw: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay, vectors without."""
    groups = []
    for name, is_vector, decay in (("adamw", False, adamw["weight_decay"]), ("adamw_vectors", True, 0.0)):
        chosen = [a for a in assignments if a.optimizer == "adamw" and (a.group == "vectors") == is_vector]
        if chosen:
            groups.append(
                {
                    "params": _named(chosen, "adamw"),
                    "name": name,
                    "weight_decay": decay,
                    "max_grad_norm": adamw["max_grad_norm"],
                }
            )
    return groups


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    """torch's fused AdamW kernel exists for these devices."""
    return all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group["params"])
