"""The optimizer step of Muon against its peers, on all hidden matrices of a model."""

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blueberry.optim import Muon
from blueberry.polar import KELLER_JORDAN, fastest_dtype
from blueberry.threads_blueberry import one_blas_thread

from .common import Record, device, interleaved_medians, machine

# Shapes (out, in) or (experts, out, in) of all hidden matrices of a model, and how many layers have them.
DENSE = [(512, 512), (256, 512), (256, 512), (512, 512), (2048, 512), (512, 2048)]  # blueberry-88m, 22 layers
MOE = [(384, 384)] * 4 + [(8, 1536, 384), (8, 384, 1536)]  # blueberry-moe, 6 layers
SETS = {"dense": DENSE * 22, "moe": MOE * 6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", choices=sorted(SETS), help="default: all")
    parser.add_argument(
        "--loss", action="store_true", help="instead: loss after 300 steps with the default coefficients and torch's"
    )


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    if arguments.loss:
        from .optimizer_loss import benchmark_loss

        yield from benchmark_loss(arguments.repeats)
        return
    for name in [arguments.set] if arguments.set else sorted(SETS):
        yield from benchmark_optimizer(name, arguments.repeats)


def make_parameters(shapes: list[tuple[int, ...]], stacks: bool) -> list[nn.Parameter]:
    """Gaussian parameters with Gaussian gradients; `stacks=False` gives each expert a parameter of its own."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        weight, gradient = (torch.randn(shape, generator=generator).to(device()) for _ in range(2))
        pairs = [(weight, gradient)] if stacks or len(shape) == 2 else zip(weight, gradient, strict=True)
        for part, part_gradient in pairs:
            parameter = nn.Parameter(part.clone())
            parameter.grad = part_gradient.clone()
            parameters.append(parameter)
    return parameters


class KellerJordanForm(torch.optim.Optimizer):
    """The update rule as published (https://kellerjordan.github.io/posts/muon/): one matrix at a time, bfloat16."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 0.05)
            update = published_newton_schulz(parameter.grad.lerp(buffer, 0.95))
            parameter.add_(update, alpha=-0.02 * max(1, parameter.shape[-2] / parameter.shape[-1]) ** 0.5)


def published_newton_schulz(matrix: Tensor) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, five times from X / norm_F(X), on the short side."""
    x = matrix.bfloat16()
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for a, b, c in KELLER_JORDAN:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def contestants(shapes: list[tuple[int, ...]]) -> dict[str, torch.optim.Optimizer]:
    """Name -> optimizer on its own copy of the parameters. Peers take 2-D parameters only."""
    from pytorch_optimizer import Muon as PytorchOptimizerMuon

    plain = {"coefficients": "keller_jordan", "ns_dtype": fastest_dtype(device())}
    peer_groups = {"params": make_parameters(shapes, stacks=False), "use_muon": True}
    return {
        "blueberry": Muon(make_parameters(shapes, stacks=True)),
        "blueberry, keller_jordan": Muon(make_parameters(shapes, stacks=True), **plain),
        "torch.optim.Muon": torch.optim.Muon(make_parameters(shapes, stacks=False), lr=0.02, weight_decay=0.0),
        "pytorch_optimizer": PytorchOptimizerMuon([peer_groups]),
        "Keller Jordan's form": KellerJordanForm(make_parameters(shapes, stacks=False)),
        "AdamW fused (for scale)": torch.optim.AdamW(make_parameters(shapes, stacks=True), fused=True),
    }


def benchmark_optimizer(name: str, repeats: int) -> Iterator[Record]:
    """One record for each optimizer, and one with the distance to the limit."""
    shapes = SETS[name]
    optimizers = contestants(shapes)
    seconds = interleaved_medians({key: optimizer.step for key, optimizer in optimizers.items()}, repeats)
    peers = ("torch.optim.Muon", "pytorch_optimizer", "Keller Jordan's form")
    fastest_peer = min(seconds[peer] for peer in peers)
    for key, value in seconds.items():
        yield {"benchmark": "optimizer", "set": name, "optimizer": key, "step_ms": round(1000 * value, 1),
               "over_fastest_peer": round(value / fastest_peer, 3), "n": repeats, **machine()}  # fmt: skip
    rate = gemm_rate(shapes)
    flops = product_flops(optimizers["blueberry"])
    yield {"benchmark": "optimizer", "set": name, "limit": "its products alone at the measured GEMM rate",
           "gflop": round(flops / 1e9, 1), "gflop_per_s": round(rate / 1e9, 1),
           "step_ms": round(1000 * flops / rate, 1),
           "share_of_limit": round(flops / rate / seconds["blueberry"], 3), **machine()}  # fmt: skip


def product_flops(optimizer: torch.optim.Optimizer) -> int:
    """Operations of the matrix products of a step."""
    with one_blas_thread(), FlopCounterMode(display=False) as counter:  # which counts those of its own thread
        optimizer.step()
    return counter.get_total_flops()


def gemm_rate(shapes: list[tuple[int, ...]]) -> float:
    """Operations per second of batched square products at the commonest short side, in the dtype of the iteration."""
    short = statistics.mode(min(shape[-2:]) for shape in shapes)
    matrices: Tensor = torch.randn(8, short, short, device=device()).to(fastest_dtype(device()))
    result = torch.empty_like(matrices)
    seconds = interleaved_medians({"bmm": lambda: torch.bmm(matrices, matrices, out=result)}, 20)["bmm"]
    return 8 * 2 * short**3 / seconds
