"""Which parameter gets which optimizer, and why.

A parameter is routed by its role, read from the module that owns it: the matrices of hidden linear layers and of
experts go to Muon; embeddings, heads, routers, convolutions, norms and biases go to AdamW.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Assignment:
    """What one parameter got: `optimizer` is `muon`, `adamw` or `frozen`; `group` is its role; `reason` says why."""

    name: str
    parameter: Tensor
    optimizer: str
    group: str
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)


def assign_parameters(model: nn.Module, rules: Mapping[str, str] | None = None) -> list[Assignment]:
    """One assignment for every parameter of the model, tied parameters once, in the order of `named_parameters`.

    Args:
        model: any module.
        rules: regular expression -> `muon` or `adamw`; the first one found in a parameter's name decides for it.

    Raises UsageError when a rule matches nothing, names an unknown optimizer, or gives Muon something without rows
    and columns.
    """
    rules = dict(rules or {})
    unused = set(rules)
    heads = _heads(model)
    assignments = []
    for name, owner, parameter in _owned_parameters(model):
        assignment = _assign(name, owner, parameter, heads)
        rule = next((pattern for pattern in rules if re.search(pattern, name)), None)
        if rule is not None:
            unused.discard(rule)
            assignment = _apply_rule(rule, rules[rule], assignment)
        assignments.append(assignment)
    if unused:
        raise UsageError(f"rule {sorted(unused)[0]!r} matches no parameter: use a regular expression for names like "
                         f"{assignments[0].name!r}")  # fmt: skip
    return assignments


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        yield name, modules[name.rpartition(".")[0]], parameter


def _assign(name: str, owner: nn.Module, parameter: Tensor, heads: Mapping[int, str]) -> Assignment:
    if not parameter.requires_grad:
        return Assignment(name, parameter, "frozen", "frozen", "requires_grad is False")
    group, reason = _role(owner, parameter, heads)
    optimizer = "muon" if group in ("matrices", "experts") else "adamw"
    return Assignment(name, parameter, optimizer, group, reason)


def _role(owner: nn.Module, parameter: Tensor, heads: Mapping[int, str]) -> tuple[str, str]:
    """(group, reason) from the module that owns the parameter."""
    kind = type(owner).__name__
    if isinstance(owner, nn.Embedding):
        return "embeddings", f"weight of {kind}" + (", tied to the head" if id(parameter) in heads else "")
    if id(parameter) in heads:
        return "head", heads[id(parameter)]
    if parameter.ndim < 2:
        return "vectors", f"{parameter.ndim}-D parameter of {kind}"
    if "Router" in kind:
        return "router", f"weight of {kind}"
    if isinstance(owner, _CONVOLUTIONS):
        return "convolutions", f"weight of {kind}"
    if min(parameter.shape[-2:]) == 1:
        return "vectors", f"a single row or column of {kind}"
    if kind.endswith("Experts"):
        return ("experts", f"stack of {kind}") if parameter.ndim == 3 else ("vectors", f"biases of {kind}")
    if isinstance(owner, nn.Linear | Conv1D):
        return "matrices", f"weight of {kind}"
    return "other", f"parameter of {kind}, not of a linear layer"


def _heads(model: nn.Module) -> dict[int, str]:
    """id of each parameter that maps hidden states to outputs -> why it is one."""
    heads: dict[int, str] = {}
    if isinstance(model, PreTrainedModel):
        output = model.get_output_embeddings()
        if output is not None:
            heads.update({id(parameter): "output embeddings" for parameter in output.parameters()})
        if model.base_model is not model:
            inside = {id(parameter) for parameter in model.base_model.parameters()}
            outside = (parameter for parameter in model.parameters() if id(parameter) not in inside)
            heads.update(
                {id(parameter): "outside the base model" for parameter in outside if id(parameter) not in heads}
            )
        return heads
    vocabularies = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and tuple(module.weight.shape) in vocabularies:
            heads[id(module.weight)] = "linear layer from hidden size to vocabulary"
    return heads


def _apply_rule(rule: str, optimizer: str, assignment: Assignment) -> Assignment:
    if optimizer not in ("muon", "adamw"):
        raise UsageError(f"rule {rule!r} names optimizer {optimizer!r}: use muon or adamw")
    if assignment.optimizer == "frozen":
        return assignment
    if optimizer == "muon" and assignment.parameter.ndim not in (2, 3):
        raise UsageError(
            f"rule {rule!r} gives Muon {assignment.name} of shape {assignment.shape}: it takes matrices and 3-D stacks"
        )
    return Assignment(assignment.name, assignment.parameter, optimizer, assignment.group, f"rule {rule!r}")
