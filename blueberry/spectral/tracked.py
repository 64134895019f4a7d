"""Which matrices of a model are tracked, and how each is read: fused projections cut apart, LoRA as the product BA."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import UsageError
from ..optim.layouts import layout_of
from ..optim.roles import Place, places
from ..optim.splits import Layout, cut
from .names import matrix_name

Selector = str | type[nn.Module]  # a regular expression for parameter names, or the type of the module that owns them


@dataclass(frozen=True)
class Tracked:
    """A parameter, or the product of two LoRA factors, and the matrices that it holds.

    `name` is the parameter's; the matrices of a fused one are called `<name without .weight>.<label>`. `read` gives
    its present value, a view where it can; `parameter` is None for a product.
    """

    name: str
    read: Callable[[], Tensor]
    parameter: nn.Parameter | None = None
    layout: Layout | None = None
    labels: tuple[str, ...] = ()

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        """The matrices (out, in) or stacks (E, out, in) inside a tensor of the parameter's shape, by name."""
        if self.layout is None:
            return {self.name: tensor}
        pieces = []
        for piece in cut(tensor, self.layout):
            pieces += piece.unbind(-3) if piece.ndim > tensor.ndim else [piece]
        if len(pieces) == 1:
            return {self.name: pieces[0]}
        stem = self.name.removesuffix(".weight")
        labels = self.labels or tuple(map(str, range(len(pieces))))
        return {f"{stem}.{label}": piece for label, piece in zip(labels, pieces, strict=True)}

    def names(self) -> list[str]:
        """The names of the matrices, without reading anything."""
        return list(self.parts(torch.empty_like(self.read(), device="meta")))


def tracked_matrices(model: nn.Module, modules: Iterable[Selector] | None = None) -> list[Tracked]:
    """The matrices and stacks of matrices of a model worth tracking.

    By default all trainable 2-D and 3-D parameters inside numbered layers, or, in a model without numbered layers,
    all of them; never embeddings, convolutions and biases. Routers count, being matrices. Of LoRA adapters the product
    BA is tracked instead of its factors. `modules` chooses otherwise: regular expressions that are searched in
    parameter names, and types of modules; one that matches nothing is a UsageError.
    """
    found = places(model)
    factors = [place for place in found if place.lora_layer is not None]
    plain = [place for place in found if place.lora_layer is None and place.parameter.ndim in (2, 3)]
    trainable = [place for place in plain if place.parameter.requires_grad]
    chosen = _selected(plain, modules) if modules is not None else _worth_tracking(trainable)
    products = _selected(factors, modules) if modules is not None else factors
    return [_of_parameter(place) for place in chosen] + _of_adapters(products)


def _worth_tracking(found: list[Place]) -> list[Place]:
    matrices = [place for place in found if not _is_no_matrix(place)]
    layered = [place for place in matrices if matrix_name(place.name).layer is not None]
    return layered or matrices


def _is_no_matrix(place: Place) -> bool:
    """Embeddings, convolutions, and biases of experts, which are stacks of vectors."""
    embedding_or_convolution = isinstance(place.owner, nn.Embedding | _ConvNd) or ".lora_embedding_" in place.name
    return embedding_or_convolution or place.leaf.endswith("bias")


def _selected(found: list[Place], selectors: Iterable[Selector]) -> list[Place]:
    return [place for place in found if any(_matches(selector, place) for selector in selectors)]


def check_selectors(model: nn.Module, selectors: Iterable[Selector]) -> None:
    """UsageError for a selector that matches no matrix of the model."""
    found = [place for place in places(model) if place.parameter.ndim in (2, 3)]
    for selector in selectors:
        if not any(_matches(selector, place) for place in found):
            shown = repr(selector) if isinstance(selector, str) else selector.__name__
            example = found[0].name if found else "none"
            raise UsageError(f"modules: {shown} matches no matrix of the model; a name looks like {example!r}")


def _matches(selector: Selector, place: Place) -> bool:
    if isinstance(selector, str):
        return re.search(selector, place.name) is not None
    return isinstance(place.lora_layer.get_base_layer() if place.lora_layer else place.owner, selector)


def _of_parameter(place: Place) -> Tracked:
    parameter = place.parameter
    layout = layout_of(place)
    return Tracked(place.name, lambda: parameter, parameter, layout, _labels(place, layout))


def _of_adapters(factors: list[Place]) -> list[Tracked]:
    """One product for each adapted layer and adapter; PEFT multiplies, scales and transposes as it would to merge."""
    tracked = {}
    for place in factors:
        layer, adapter = place.lora_layer, place.attribute
        if (id(layer), adapter) not in tracked:
            base = _adapted(place)
            suffix = "lora" if adapter == "default" else f"lora.{adapter}"
            name = f"{base.name.removesuffix('.weight')}.{suffix}"
            of_base = _of_parameter(base)
            tracked[id(layer), adapter] = replace(
                of_base, name=name, parameter=None, read=lambda a=layer, b=adapter: a.get_delta_weight(b).detach()
            )
    return list(tracked.values())


def _adapted(factor: Place) -> Place:
    """The place of the weight that a factor adapts, as it was before PEFT wrapped its module."""
    layer, owner = factor.lora_layer, factor.lora_layer.get_base_layer()
    leaf = vars(layer).get("parameter_name", "weight")
    path = re.sub(r"\.lora_[AB]\..*$", "", factor.name).replace(".base_layer", "")
    outer = [module for module in factor.modules[3:] if module is not owner and not _is_adapter(module)]
    return Place(f"{path}.{leaf}", getattr(owner, leaf), (owner, *outer))


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora")


def _labels(place: Place, layout: Layout | None) -> tuple[str, ...]:
    """Names of the parts of a fused projection, in the order they are stored; () numbers them."""
    if layout is None or not layout.shape:
        return ()
    owner, attribute = type(place.parent).__name__, place.attribute
    count = len(layout.sizes) or layout.shape[layout.axis]
    if owner.startswith("CodeGen"):
        return ("q", "v", "k")
    if owner.startswith("ModernBert") and attribute == "Wi":
        return ("up", "gate")
    if place.leaf == "gate_up_proj" or attribute in ("gate_up_proj", "input_linear"):
        return ("gate", "up")
    return {3: ("q", "k", "v"), 2: ("k", "v")}.get(count, ())
