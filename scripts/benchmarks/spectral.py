"""One spectral log of a model, weights and updates, against the original functions and WeightWatcher."""

import argparse
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.errors import UsageError
from blueberry.optim import build_optimizer
from blueberry.spectral import analyze
from blueberry.spectral.tracked import tracked_matrices

from .common import Record, interleaved_medians, machine

PARTS = ("log", "weightwatcher", "overhead")
PRESETS = ("blueberry-88m", "blueberry-moe", "tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default=PRESETS[0])
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="default: all; overhead trains with and without"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of a training run of the part overhead")


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    for part in arguments.part or PARTS:
        if part == "log":
            yield from benchmark_log(arguments.preset, arguments.repeats)
        elif part == "weightwatcher":
            yield from benchmark_weightwatcher(arguments.preset, arguments.repeats)
        else:
            from .spectral_overhead import benchmark_overhead

            yield from benchmark_overhead(arguments.steps, arguments.repeats)


def one_step(preset: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A model, its matrices after one Muon step on Gaussian gradients, and the change that the step made."""
    torch.manual_seed(0)
    model = BlueberryForCausalLM(BlueberryConfig.from_preset(preset)).train()
    optimizer = build_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    tracked = tracked_matrices(model)
    copy = lambda: {name: part.clone() for one in tracked for name, part in one.parts(one.read()).items()}
    before = copy()
    optimizer.step()
    after = copy()
    optimizer.zero_grad()
    return model, after, {name: after[name] - before[name] for name in after}


def original_log(weights: dict[str, Tensor], updates: dict[str, Tensor]) -> list[tuple]:
    """What the original scripts compute, with their cost: for each matrix one SVD of W, one of dW, two svdvals."""
    rows = []
    for name, weight in weights.items():
        for matrix, update in zip(_matrices(weight), _matrices(updates[name]), strict=True):
            rows.append((*_statistics(matrix), _entropy(matrix), _alignment(matrix, update)))
    return rows


def _matrices(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 3 else weight[None]


def _statistics(weight: Tensor) -> tuple[float, float, list[float]]:
    sigma = torch.linalg.svdvals(weight.float())
    return sigma[0].item(), (sigma[0] / sigma[1]).item(), sigma[:10].tolist()


def _entropy(weight: Tensor) -> float:
    sigma = torch.linalg.svdvals(weight.float())
    p = sigma.square() / sigma.square().sum()
    return (torch.special.entr(p).sum() / torch.tensor(float(len(p))).log()).item()


def _alignment(weight: Tensor, update: Tensor, k: int = 5) -> float:
    u = torch.linalg.svd(weight.float(), full_matrices=False).U[:, :k]
    v = torch.linalg.svd(update.float(), full_matrices=False).U[:, :k]
    return torch.linalg.svdvals(u.T @ v).mean().item()


def benchmark_log(preset: str, repeats: int) -> Iterator[Record]:
    """Seconds of one log by each."""
    _, after, updates = one_step(preset)
    workers = os.cpu_count() or 1
    sides = {
        "blueberry": partial(analyze, after, updates, updated=True, workers=workers),
        "original functions": partial(original_log, after, updates),
    }
    seconds = interleaved_medians(sides, repeats)
    yield from _records("log of weights and updates", preset, after, seconds, "original functions", repeats)


def benchmark_weightwatcher(preset: str, repeats: int) -> Iterator[Record]:
    """Seconds for the weights alone, power-law fits on both sides (WeightWatcher always fits)."""
    model, after, _ = one_step(preset)
    layers = {name: weight for name, weight in after.items() if weight.ndim == 2}  # it skips stacks of experts
    workers = os.cpu_count() or 1
    sides = {
        "blueberry": partial(analyze, layers, workers=workers),
        "blueberry, power_law": partial(analyze, layers, power_law=True, workers=workers),
        "weightwatcher": partial(weightwatcher_analyze, model.model.layers),  # without the embedding
    }
    seconds = interleaved_medians(sides, repeats)
    yield from _records("weights", preset, layers, seconds, "weightwatcher", repeats)


def weightwatcher_analyze(model: nn.Module) -> int:
    """How many layers it analyzed."""
    try:
        import weightwatcher
    except ImportError:
        raise UsageError("--part weightwatcher needs the package of that name: pip install weightwatcher") from None
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        details = weightwatcher.WeightWatcher(model=model).analyze()
    logging.disable(logging.NOTSET)
    return len(details)


def _records(
    what: str, preset: str, matrices: dict[str, Tensor], seconds: dict[str, float], reference: str, repeats: int
) -> Iterator[Record]:
    count = sum(len(_matrices(matrix)) for matrix in matrices.values())
    for name, value in seconds.items():
        yield {"benchmark": "spectral", "what": what, "preset": preset, "matrices": count, "side": name,
               "seconds": round(value, 3), "times_faster": round(seconds[reference] / value, 2), "n": repeats,
               **machine()}  # fmt: skip
