"""What each parameter of a model is for: its role, read from the types of the modules around it, not from its name."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ROUTER = re.compile(r"Router|Top[Kk]Gating")  # GPT-OSS, Switch, Zaya...: Router; JetMoe: TopKGating
MUON_GROUPS = ("matrices", "experts", "lora")  # the roles that Muon is for


@dataclass(frozen=True)
class Place:
    """A parameter and where it is: `name`, `parameter`, and the modules from the owner up to the model."""

    name: str
    parameter: Tensor
    modules: tuple[nn.Module, ...]

    @property
    def owner(self) -> nn.Module:
        return self.modules[0]

    @property
    def parent(self) -> nn.Module:
        """The module around the owner; the owner itself when it is the model."""
        return self.modules[min(1, len(self.modules) - 1)]

    @property
    def leaf(self) -> str:
        """The parameter's name in its owner."""
        return self.name.rpartition(".")[2]

    @property
    def attribute(self) -> str:
        """The owner's name in its parent."""
        return self.name.rpartition(".")[0].rpartition(".")[2]

    @cached_property
    def lora_layer(self) -> nn.Module | None:
        """PEFT's layer when this is one of its factors: the layer's adapters, not the layer that it adapts."""
        if len(self.modules) < 3 or not isinstance(self.modules[1], nn.ModuleDict):
            return None
        peft_lora = sys.modules.get("peft.tuners.lora")  # a model with adapters has it imported
        layer = self.modules[2]
        is_factor = self.name.split(".")[-3] in ("lora_A", "lora_B")
        return layer if is_factor and peft_lora and isinstance(layer, peft_lora.LoraLayer) else None


def places(model: nn.Module) -> list[Place]:
    """Every parameter once, in the order of `named_parameters`; a tied one belongs to its embedding."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owned: dict[int, Place] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = Place(name, parameter, tuple(modules[path] for path in _paths_up(name)))
        first = owned.setdefault(id(parameter), place)
        if isinstance(place.owner, nn.Embedding) and not isinstance(first.owner, nn.Embedding):
            owned[id(parameter)] = Place(first.name, parameter, place.modules)
    return list(owned.values())


def role(place: Place, heads: Mapping[int, str]) -> tuple[str, str]:
    """(group, reason): embeddings, head, vectors, router, convolutions, experts, lora, matrices or other."""
    parameter, owner, kind = place.parameter, place.owner, type(place.owner).__name__
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embeddings", f"weight of {kind}" + (", tied to the head" if id(parameter) in heads else "")
    if parameter.ndim < 2:
        return "vectors", f"{parameter.ndim}-D parameter of {kind}"
    if id(parameter) in heads:
        return "head", heads[id(parameter)]
    if _is_router(place):
        return "router", f"weight of {kind}, chooses experts"
    if isinstance(owner, _CONVOLUTIONS):
        return "convolutions", f"weight of {kind}"
    if place.lora_layer is not None:
        return _role_of_lora(place)
    if min(parameter.shape[-2:]) == 1:
        return "vectors", f"a single row or column of {kind}"
    if is_experts(owner):
        return ("experts", f"stack of {kind}") if parameter.ndim == 3 else ("vectors", f"biases of {kind}")
    if isinstance(owner, nn.Linear | Conv1D | nn.MultiheadAttention) and parameter.ndim == 2:
        return "matrices", f"weight of {kind}"
    return "other", f"parameter of {kind}, not of a linear layer"


def find_heads(model: nn.Module) -> dict[int, str]:
    """id of each parameter that maps hidden states to outputs -> why it is one.

    With transformers models inside (under whatever wrappers): their output embeddings and everything outside their
    base models. Otherwise: linear layers of an embedding's shape.
    """
    pretrained = list(_outermost_pretrained(model))
    heads: dict[int, str] = {}
    inside: set[int] = set()
    for root in pretrained:
        inside |= {id(parameter) for parameter in root.base_model.parameters()}
        if (output := root.get_output_embeddings()) is not None:
            heads |= {id(parameter): "output embeddings" for parameter in output.parameters()}
    if pretrained:
        outside = (parameter for parameter in model.parameters() if id(parameter) not in inside)
        return {id(parameter): "outside the base model" for parameter in outside} | heads
    vocabularies = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and tuple(module.weight.shape) in vocabularies:
            heads[id(module.weight)] = "linear layer from hidden size to vocabulary"
    return heads


def is_experts(module: nn.Module) -> bool:
    """A module that holds the weights of all experts as stacks: marked by transformers, or named so."""
    return "is_concatenated" in vars(module) or type(module).__name__.endswith("Experts")


def _paths_up(name: str) -> Iterator[str]:
    """The paths of the modules around a parameter, the owner's first, the model's ("") last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_router(place: Place) -> bool:
    if any(_ROUTER.search(type(module).__name__) for module in place.modules[:3]):
        return True
    return isinstance(place.owner, nn.Linear) and place.parameter.shape[0] in _counts_of_experts(place.parent)


def _counts_of_experts(block: nn.Module) -> Iterator[int]:
    """How many experts each stack or list of experts directly inside `block` has."""
    for name, module in block.named_children():
        if is_experts(module):
            yield from (parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3)
        elif isinstance(module, nn.ModuleList) and name == "experts":
            yield len(module)


def _role_of_lora(place: Place) -> tuple[str, str]:
    base = place.lora_layer.get_base_layer()
    if _ROUTER.search(type(base).__name__):
        return "router", f"LoRA factor of {type(base).__name__}"
    if place.lora_layer.r[place.attribute] == 1:  # the attribute is the adapter's name
        return "vectors", "LoRA factor of rank 1"
    return "lora", f"LoRA factor of {type(base).__name__}"


def _outermost_pretrained(module: nn.Module) -> Iterator[PreTrainedModel]:
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost_pretrained(child)
