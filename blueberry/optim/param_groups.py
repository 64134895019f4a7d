"""Which parameter gets which optimizer, and why.

A parameter is routed by its role, read from the modules around it: the matrices of hidden linear layers, of experts
and of LoRA adapters go to Muon; embeddings, heads, routers, convolutions, norms and biases go to AdamW.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError
from .checks import check_model, check_quantized
from .layouts import is_unknown_fusion, layout_of
from .roles import MUON_GROUPS, Place, find_heads, places, role
from .splits import Layout, check_layout, describe

_OPTIMIZERS = ("muon", "adamw")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+")  # DDP's, torch.compile's, PEFT's
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Assignment:
    """What one parameter got.

    `optimizer` is `muon`, `adamw` or `frozen`; `group` is its role; `reason` says why; `layout` tells Muon which
    matrices a parameter holds, None for plain (..., out, in).
    """

    name: str
    parameter: Tensor
    optimizer: str
    group: str
    reason: str
    layout: Layout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)


def assign_parameters(
    model: nn.Module,
    rules: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    split_heads: bool = False,
) -> list[Assignment]:
    """One assignment for every parameter of the model, tied parameters once, in the order of `named_parameters`.

    Args:
        model: any module, wrapped or not.
        rules: regular expression -> `muon` or `adamw`, searched in the names with and without wrappers' prefixes.
        layouts: regular expression -> how Muon unfolds a weight, over what is known of transformers' models.
        split_heads: orthogonalize each head of query, key and value projections by itself.

    Raises UsageError for rules and layouts that match nothing, contradict each other or do not fit, and for models
    that cannot be trained (see `check_model`).
    """
    rules, layouts = dict(rules or {}), dict(layouts or {})
    for rule, optimizer in rules.items():
        if optimizer not in _OPTIMIZERS:
            raise UsageError(f"rule {rule!r} names optimizer {optimizer!r}: use muon or adamw")
    check_model(model)
    heads, found = find_heads(model), places(model)
    if split_heads and all(layout_of(place) == layout_of(place, split_heads=True) for place in found):
        raise UsageError(f"split_heads=True knows no heads in {type(model).__name__}: declare them in layouts, as "
                         "{r'q_proj': Layout(shape=(-1, head_dim))}")  # fmt: skip
    used: set[str] = set()
    assignments = []
    for place in found:
        assignment = _assign(place, heads)
        assignment = _apply_rules(assignment, rules, used)
        assignments.append(_apply_layouts(assignment, place, layouts, split_heads, used))
    if not any(assignment.group in MUON_GROUPS for assignment in assignments):
        check_quantized(model)
    _check_used("rule", rules, used, assignments)
    _check_used("layout", layouts, used, [a for a in assignments if a.optimizer == "muon"])
    return assignments


def check_holds_trainable_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise UsageError unless `optimizer` holds every parameter of `model` that requires a gradient.

    An optimizer that was built before PEFT wrapped the model holds none of them and trains nothing.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in held]
    if missing:
        raise UsageError(
            f"the optimizer holds {len(trainable) - len(missing)} of {len(trainable)} trainable parameters, not "
            f"{missing[0]!r}: build it after the model got its adapters (PEFT's get_peft_model), or freeze what shall "
            "not train with requires_grad_(False)"
        )


def _assign(place: Place, heads: Mapping[int, str]) -> Assignment:
    if not place.parameter.requires_grad:
        return Assignment(place.name, place.parameter, "frozen", "frozen", "requires_grad is False")
    group, reason = role(place, heads)
    optimizer = "muon" if group in MUON_GROUPS else "adamw"
    return Assignment(place.name, place.parameter, optimizer, group, reason)


def _apply_rules(assignment: Assignment, rules: Mapping[str, str], used: set[str]) -> Assignment:
    rule = _the_match("rule", assignment.name, rules, used)
    if rule is None or assignment.optimizer == "frozen":
        return assignment
    if rules[rule] == "muon" and assignment.parameter.ndim not in (2, 3):
        raise UsageError(
            f"rule {rule!r} gives Muon {assignment.name} of shape {assignment.shape}: it takes matrices and 3-D stacks"
        )
    return replace(assignment, optimizer=rules[rule], reason=f"rule {rule!r}")


def _apply_layouts(
    assignment: Assignment, place: Place, layouts: Mapping[str, Layout], split_heads: bool, used: set[str]
) -> Assignment:
    if assignment.optimizer != "muon":
        return assignment
    pattern = _the_match("layout", assignment.name, layouts, used)
    layout = layout_of(place, split_heads) if pattern is None else Layout(*layouts[pattern])
    note = describe(layout)
    if layout is not None:
        check_layout(assignment.name, assignment.shape, layout)
    if pattern is None and is_unknown_fusion(place, layout):
        note = "may fuse query, key and value: declare it in layouts"
    reason = f"{assignment.reason}; {note}" if note else assignment.reason
    return replace(assignment, reason=reason, layout=None if layout == Layout() else layout)


def _the_match(kind: str, name: str, patterns: Mapping[str, _Value], used: set[str]) -> str | None:
    """The pattern found in `name`; several that say the same are fine, several that differ are an error."""
    bare = _WRAPPERS.sub("", name)
    matches = [pattern for pattern in patterns if re.search(pattern, name) or re.search(pattern, bare)]
    used.update(matches)
    for other in matches[1:]:
        if patterns[other] != patterns[matches[0]]:
            raise UsageError(
                f"{kind}s {matches[0]!r} and {other!r} both match {name} and differ "
                f"({patterns[matches[0]]}, {patterns[other]}): make one of them narrower"
            )
    return matches[0] if matches else None


def _check_used(kind: str, patterns: Iterable[str], used: set[str], assignments: list[Assignment]) -> None:
    unused = sorted(set(patterns) - used)
    if unused:
        names = f"names like {assignments[0].name!r}" if assignments else "parameters that Muon gets"
        whose = "parameter" if kind == "rule" else "parameter of Muon's"
        raise UsageError(f"{kind} {unused[0]!r} matches no {whose}: use a regular expression for {names}")
