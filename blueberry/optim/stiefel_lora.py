"""LoRA with one factor on the Stiefel manifold: B stays orthonormal, A carries the size of the update.

The columns of B (out, r) are a basis of what the adapter may write, kept orthonormal by StiefelMuon, so that no
direction of the rank is lost; Muon trains A (r, in). B cannot be zero there, so A is, and BA starts at zero as usual.
"""

from dataclasses import replace

import torch
from torch import nn

from ..errors import UsageError
from .build import pop_adamw_settings
from .composed import ComposedOptimizer
from .groups import adamw_groups, adamw_part, matrix_groups
from .muon import Muon
from .param_groups import Assignment, assign_parameters
from .stiefel_muon import StiefelMuon

STIEFEL = "stiefel_muon"


def start_orthonormal(model: nn.Module) -> None:
    """Before training: B of every adapter random (the optimizer makes it orthonormal), A zero."""
    with torch.no_grad():
        for assignment in _factors(assign_parameters(model)):
            if _is_b(assignment):
                assignment.parameter.normal_()
            else:
                assignment.parameter.zero_()


def create_stiefel_lora_optimizer(
    model: nn.Module, *, muon_lr: float = 0.02, momentum: float = 0.95, **adamw: float
) -> ComposedOptimizer:
    """StiefelMuon for the factors B, Muon for the factors A, AdamW for what else is trained.

    adamw: `adamw_lr`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, `max_grad_norm`, `weight_decay`.
    """
    settings = pop_adamw_settings(adamw)
    assignments = [_on_manifold(assignment) for assignment in assign_parameters(model)]
    groups = matrix_groups(assignments, STIEFEL, "stiefel_lora")
    if not groups:
        raise UsageError("no LoRA factor of rank 2 or more: wrap the model with peft.get_peft_model first")
    parts: dict[str, torch.optim.Optimizer] = {STIEFEL: StiefelMuon(groups, lr=muon_lr, momentum=momentum)}
    if groups := matrix_groups(assignments, "muon", "muon"):
        parts["muon"] = Muon(groups, lr=muon_lr, momentum=momentum)
    if groups := adamw_groups(assignments, settings):
        parts["adamw"] = adamw_part(groups, settings)
    return ComposedOptimizer(parts, assignments)


def _factors(assignments: list[Assignment]) -> list[Assignment]:
    return [assignment for assignment in assignments if assignment.group == "lora" and assignment.optimizer == "muon"]


def _is_b(assignment: Assignment) -> bool:
    return ".lora_B." in assignment.name


def _on_manifold(assignment: Assignment) -> Assignment:
    if not _factors([assignment]) or not _is_b(assignment):
        return assignment
    return replace(assignment, optimizer=STIEFEL, reason=f"{assignment.reason}; columns orthonormal")
