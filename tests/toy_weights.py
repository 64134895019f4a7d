"""Small random parameters and gradients for the tests of optimizers."""

import torch
from torch import nn


def parameters(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(*parameter.shape, generator=generator).to(parameter.dtype)


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()
