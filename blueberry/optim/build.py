"""`build_optimizer`: from a model to its hybrid optimizer."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UsageError
from .composed import ComposedOptimizer
from .groups import adamw_groups, adamw_part, matrix_groups, pop_adamw_settings
from .manifold import FAMILIES, create_manifold_optimizer
from .muon import Muon
from .param_groups import Assignment, assign_parameters
from .splits import Layout

if TYPE_CHECKING:
    from ..training.arguments import BlueberryTrainingArguments

OPTIMIZERS = ("muon", "adamw", "manifold")


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
        settings: `optimizer` (`muon`; `adamw` for everything; `manifold`, see `create_manifold_optimizer`, whose
            settings it takes, with `muon_lr` for `base_lr`), `muon_lr`, `adamw_lr`, `weight_decay` (decoupled, of
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
    if kind == "manifold":
        values["base_lr"] = values.pop("muon_lr", None)
        routing = {"rules": rules, "layouts": layouts, "split_heads": split_heads}
        return create_manifold_optimizer(model, max_skipped_steps=max_skipped_steps, **routing, **values)
    assignments = assign_parameters(model, rules, layouts, split_heads)
    if kind == "adamw":
        assignments = [_without_muon(assignment) for assignment in assignments]
    adamw = pop_adamw_settings(values)
    parts: dict[str, torch.optim.Optimizer] = {}
    if kind == "muon":
        groups = matrix_groups(assignments, "muon", "muon")
        _check_muon(groups, values)
        parts["muon"] = Muon(groups, lr=values.pop("muon_lr", 0.02), **values)
    if rest := adamw_groups(assignments, adamw):
        parts["adamw"] = adamw_part(rest, adamw)
    if not parts:
        raise UsageError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to optimize")
    return ComposedOptimizer(parts, assignments, max_skipped_steps)


def _settings_of(args: "BlueberryTrainingArguments") -> dict[str, Any]:
    manifold = {
        "preset": args.manifold_preset,
        "families": ("attention",) if args.manifold_attention_only else FAMILIES,
        "modular_lr": args.manifold_modular_lr,
        "hypersphere_lr": args.hypersphere_lr,
    }
    return (manifold if args.optimizer == "manifold" else {}) | {
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


def _without_muon(assignment: Assignment) -> Assignment:
    if assignment.optimizer != "muon":
        return assignment
    return replace(assignment, optimizer="adamw", reason=f"{assignment.reason}; optimizer=adamw", layout=None)


def _check_muon(groups: list[dict[str, Any]], values: dict[str, Any]) -> None:
    if not groups:
        raise UsageError("no parameter is a hidden matrix, so Muon would do nothing: add rules or use optimizer=adamw")
    known = inspect.signature(Muon).parameters.keys() - {"params", "lr"} | {"muon_lr"}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"setting {unknown[0]!r} is unknown: neither Muon nor AdamW takes it")
