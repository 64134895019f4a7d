"""`create_manifold_optimizer`: from a model to a composition of Stiefel, hypersphere, Muon and AdamW parts."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..manifolds import Sphere, check_radius
from .composed import ComposedOptimizer
from .finite import whole
from .groups import adamw_groups, adamw_part, matrix_groups, pop_adamw_settings
from .hypersphere_muon import HypersphereMuon
from .manifold_weights import TOLERANCE, put_on_manifold, radius_errors
from .muon import Muon
from .param_groups import Assignment, assign_parameters
from .roles import Place, places
from .splits import cut
from .stiefel_muon import StiefelMuon

# From document to document of the original authors: careful, recommended, fast.
PRESETS: dict[str, dict[str, Any]] = {
    "conservative": {"base_lr": 0.01, "dual_steps": 15, "dual_lr": 0.05},
    "balanced": {"base_lr": 0.02, "dual_steps": 10, "dual_lr": 0.1},
    "aggressive": {"base_lr": 0.03, "dual_steps": 5, "dual_lr": 0.2},
}
STIEFEL, SPHERE = "stiefel_muon", "hypersphere_muon"
FAMILIES = ("attention", "feed_forward", "embeddings", "router")
_ROUTING = ("rules", "layouts", "split_heads")
_MUON_SETTINGS = ("momentum", "nesterov", "scale_mode", "weight_decay")
_LAYER = re.compile(r"\.(\d+)\.")


def create_manifold_optimizer(
    model: nn.Module,
    config: PreTrainedConfig | None = None,
    *,
    preset: str = "balanced",
    families: Collection[str] = FAMILIES,
    base_lr: float | None = None,
    dual_steps: int | None = None,
    dual_lr: float | None = None,
    solver: str = "reweighted",
    radius: float = 1.0,
    hypersphere_lr: float | None = None,
    hypersphere_radius: float | None = 1.0,
    modular_lr: bool = False,
    init_on_manifold: bool = True,
    max_skipped_steps: int = 10,
    **settings: Any,
) -> ComposedOptimizer:
    """Manifold Muon for a transformer: every component on its manifold, the rest as `build_optimizer` has it.

    | component | family | optimizer | constraint |
    |---|---|---|---|
    | query, key, value, output | `attention` | StiefelMuon | short side orthonormal |
    | experts and MLP, each matrix by itself | `feed_forward` | StiefelMuon | short side orthonormal |
    | embeddings (tied ones once) | `embeddings` | HypersphereMuon | each row has norm 1 |
    | router rows | `router` | HypersphereMuon | each row has norm 1 |
    | norms, biases, an untied head | | AdamW | none |
    | matrices of a family left out, LoRA factors | | Muon (embeddings and routers: AdamW) | none |

    Args:
        model: Blueberry or any other decoder; fused and transposed weights are cut into their matrices first.
        config: where `num_hidden_layers` is read for `modular_lr`; by default counted in the parameters' names.
        preset: `conservative`, `balanced` or `aggressive`: defaults of `base_lr`, `dual_steps` and `dual_lr`.
        families: which are constrained; `("attention",)` is the easiest start.
        base_lr: spectral norm of a Stiefel step, Muon's learning rate for what is left to it.
        dual_steps, dual_lr, solver: see `blueberry.stiefel.steepest_tangent_step`.
        radius: singular value of the Stiefel matrices.
        hypersphere_lr: step of embeddings and router rows relative to their norm; 10 `base_lr` by default.
        hypersphere_radius: norm that their rows get, except for rows of zeros (padding), which stay; None keeps the
            norms of the initialization. Logits of tied embeddings are bounded by it, so that a small one cannot fit.
        modular_lr: multiply a Stiefel matrix' learning rate by (layer + 1) / layers * sqrt(out / in).
        init_on_manifold: project weights that are off the manifold; False raises UsageError for them.
        max_skipped_steps: as in `build_optimizer`.
        settings: `rules`, `layouts`, `split_heads` as in `build_optimizer` (a rule takes its parameters off the
            manifold); `momentum`, `nesterov`; `adamw_lr`, `adam_beta1`, `adam_beta2`, `adam_epsilon`,
            `max_grad_norm`; `scale_mode`, `weight_decay` of the unconstrained matrices.

    Raises UsageError for unknown settings and when no matrix would be on the Stiefel manifold.
    """
    values = _preset(preset, {"base_lr": base_lr, "dual_steps": dual_steps, "dual_lr": dual_lr})
    routing = {name: settings.pop(name) for name in _ROUTING if name in settings}
    adamw = pop_adamw_settings(settings)
    _check_names(settings, families)
    assignments = _assign(model, families, routing)
    shared = {name: settings[name] for name in ("momentum", "nesterov") if name in settings}
    shared["init_on_manifold"] = init_on_manifold
    groups = _stiefel_groups(assignments, _modular_scales(assignments, config) if modular_lr else None)
    lr = values.pop("base_lr")
    stiefel = StiefelMuon(groups, lr=lr, solver=solver, radius=radius, **values, **shared)
    parts: dict[str, Optimizer] = {STIEFEL: stiefel}
    if groups := _sphere_groups(assignments):
        _put_on_sphere(groups, hypersphere_radius, init_on_manifold)
        sphere_lr = 10 * lr if hypersphere_lr is None else hypersphere_lr
        parts[SPHERE] = HypersphereMuon(groups, lr=sphere_lr, **shared)
    if groups := matrix_groups(assignments, "muon", "muon"):
        parts["muon"] = Muon(groups, lr=lr, **settings)
    if groups := adamw_groups(assignments, adamw):
        parts["adamw"] = adamw_part(groups, adamw)
    return ComposedOptimizer(parts, assignments, max_skipped_steps)


def _check_names(settings: Mapping[str, Any], families: Collection[str]) -> None:
    if unknown := sorted(set(settings) - set(_MUON_SETTINGS)):
        raise UsageError(f"setting {unknown[0]!r} is unknown: neither a manifold optimizer nor AdamW takes it")
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise UsageError(f"family {unknown[0]!r} is unknown: choose from {', '.join(FAMILIES)}")


def _assign(model: nn.Module, families: Collection[str], routing: Mapping[str, Any]) -> list[Assignment]:
    """As `build_optimizer` routes them, then moved to the manifolds."""
    found = {place.name: place for place in places(model)}
    return [_on_manifold(a, found[a.name], families) for a in assign_parameters(model, **routing)]


def _preset(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    if preset not in PRESETS:
        raise UsageError(f"preset={preset!r} is unknown: use one of {', '.join(PRESETS)}")
    return PRESETS[preset] | {name: value for name, value in given.items() if value is not None}


def _on_manifold(assignment: Assignment, place: Place, families: Collection[str]) -> Assignment:
    """The assignment of a parameter, moved to its manifold's optimizer if its family is switched on."""
    if assignment.optimizer == "frozen" or assignment.reason.startswith("rule "):
        return assignment
    if assignment.group in ("embeddings", "router"):
        if assignment.group in families and assignment.parameter.ndim >= 2:
            return replace(assignment, optimizer=SPHERE, reason=f"{assignment.reason}; rows keep their norms")
        return assignment
    if assignment.group not in ("matrices", "experts"):
        return assignment
    is_attention = any("attention" in type(module).__name__.lower() for module in place.modules[:-1])
    family = "attention" if is_attention else "feed_forward"
    if family not in families:
        return assignment
    return replace(assignment, optimizer=STIEFEL, group=family, reason=f"{assignment.reason}; orthonormal")


def _stiefel_groups(assignments: Sequence[Assignment], scales: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """One group for each family and layout."""
    groups = []
    for family in ("attention", "feed_forward"):
        chosen = [a for a in assignments if a.optimizer == STIEFEL and a.group == family]
        groups += matrix_groups(chosen, STIEFEL, f"stiefel_{family}")
    if not groups:
        raise UsageError("no matrix would be on the Stiefel manifold: add attention or feed_forward to families, drop "
                         "rules that match every matrix, or use build_optimizer")  # fmt: skip
    if scales is not None:
        for group in groups:
            group["lr_scales"] = [scales[name] for name, _ in group["params"]]
    return groups


def _sphere_groups(assignments: Sequence[Assignment]) -> list[dict[str, Any]]:
    groups = []
    for family in ("embeddings", "router"):
        chosen = [(a.name, a.parameter) for a in assignments if a.optimizer == SPHERE and a.group == family]
        if chosen:
            groups.append({"params": chosen, "name": f"hypersphere_{family}"})
    return groups


def _put_on_sphere(groups: Sequence[dict[str, Any]], radius: float | None, repair: bool) -> None:
    """Give all rows but those of zeros the radius, which the optimizer keeps; rows that have it stay as they are."""
    if radius is None:
        return
    check_radius(radius)
    for name, parameter in (pair for group in groups for pair in group["params"]):
        if parameter.is_meta:
            raise UsageError(f"{name} is on the meta device, where its rows cannot get norm {radius}: use "
                             "hypersphere_radius=None and initialize them so")  # fmt: skip
        weight = whole(parameter.detach())
        norms = Sphere().norm(weight)
        if not norms.any():
            raise UsageError(f"{name} is zero, so its rows cannot get norm {radius}: initialize it")
        sphere = Sphere("per_row", torch.where(norms > 0, radius, 0.0))
        nearest, tolerance = sphere.nearest_point, TOLERANCE[SPHERE]
        put_on_manifold(name, parameter, lambda w, sphere=sphere: radius_errors(w, sphere), nearest, tolerance, repair)


def _modular_scales(assignments: Sequence[Assignment], config: PreTrainedConfig | None) -> dict[str, float]:
    """(layer + 1) / layers * sqrt(out / in) of each Stiefel parameter; of a part, where it is fused."""
    layers = {a.name: int(match[1]) for a in assignments if (match := _LAYER.search(a.name))}
    count = max(layers.values(), default=0) + 1 if config is None else config.get_text_config().num_hidden_layers
    scales = {}
    for assignment in assignments:
        if assignment.optimizer == STIEFEL:
            out_features, in_features = cut(assignment.parameter, assignment.layout)[0].shape[-2:]
            depth = (layers.get(assignment.name, count - 1) + 1) / count
            scales[assignment.name] = depth * (out_features / in_features) ** 0.5
    return scales
