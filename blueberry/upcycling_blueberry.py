"""From the weights of a dense model to those of a mixture of experts that computes the same.

Every expert starts as a copy of the dense feed-forward network (https://arxiv.org/abs/2212.05055). The file ships to
the Hub as remote code, so it imports torch and its sibling only.
"""

from typing import Any

import torch
from torch import Tensor

from .configuration_blueberry import BlueberryConfig

_OPTIONS = ("router_aux_loss_coef", "router_z_loss_coef", "router_noise", "output_router_logits")


def upcycled_config(
    config: BlueberryConfig, num_experts: int, num_experts_per_tok: int, **options: Any
) -> BlueberryConfig:
    """The dense `config` with ungated experts of its width whose weights add up to one.

    Raises ValueError for a mixture of experts, for no experts, and for options that would change the output.
    """
    if config.num_experts:
        raise ValueError(f"num_experts={config.num_experts}: the model is a mixture of experts already, not dense")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if wrong := sorted(set(options) - set(_OPTIONS)):
        raise ValueError(f"option {wrong[0]!r} is not one of {', '.join(_OPTIONS)}")
    experts = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": config.intermediate_size,
        "gated_experts": False,
        "norm_topk_prob": True,
    }
    fields = config.to_dict() | experts | options
    return BlueberryConfig.from_dict(fields, attn_implementation=config._attn_implementation)


def upcycled_weights(weights: dict[str, Tensor], num_experts: int, noise: float) -> dict[str, Tensor]:
    """The state dict of a dense model with each feed-forward matrix (out, in) as a stack (experts, out, in).

    `noise` is the standard deviation of the Gaussian noise added to each copy, in units of the matrix's own.
    """
    if not noise >= 0:
        raise ValueError(f"noise={noise} must not be negative: 0 makes exact copies")
    result = {}
    for name, weight in weights.items():
        module, _, rest = name.partition(".mlp.")
        if rest:
            name = f"{module}.mlp.experts.{rest.removesuffix('.weight')}"
            weight = weight.expand(num_experts, -1, -1)
            if noise:
                weight = weight + noise * weight[0].std() * torch.randn_like(weight)
        result[name] = weight
    return result
