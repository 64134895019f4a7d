"""Manifold Muon: objective reached by its solvers, step time against the reference, share of a training step."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import nn

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.manifolds import Stiefel
from blueberry.optim import ComposedOptimizer, StiefelMuon, create_manifold_optimizer
from blueberry.optim.manifold import PRESETS
from blueberry.optim.phases import PhaseClock, now
from blueberry.stiefel import steepest_tangent_step

from .common import Record, device, interleaved_medians, machine
from .manifold_objective import BALANCED, Problem, benchmark_objective, share_of_optimum
from .manifold_reference import favourable, reference_direction, reference_step

PARTS = ("objective", "reference", "share")
SIZES = ((256, 256), (512, 256), (1024, 256), (1024, 512), (2048, 512))  # (out, in)
VARIANTS = {  # settings of create_manifold_optimizer
    **{preset: {"preset": preset} for preset in PRESETS},
    "balanced, projected": {"solver": "projected"},
    "balanced, attention only": {"families": ("attention",)},
}
BATCH = (24, 512, 4)  # sequences, tokens, accumulation steps: the documents' step of blueberry-moe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--training_steps", type=int, default=60, help="before the training gradients are recorded")
    parser.add_argument(
        "--batch", type=int, nargs=2, default=(4, 512), help="sequences, tokens of what is scaled up; default: 4 512"
    )


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    parts: dict[str, Callable[[], Iterator[Record]]] = {
        "objective": partial(benchmark_objective, arguments.training_steps),
        "reference": partial(benchmark_reference, arguments.repeats),
        "share": partial(benchmark_share, tuple(arguments.batch), arguments.repeats),
    }
    for part in arguments.part or PARTS:
        for record in parts[part]():
            yield record | machine()


def benchmark_reference(repeats: int) -> Iterator[Record]:
    """A whole step on one matrix, ours and the reference's in turn, on fresh Gaussian gradients with momentum."""
    for size in SIZES:
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(Stiefel().random_point(*size, generator=generator).to(device()))
        optimizer = StiefelMuon([weight])
        theirs = weight.detach().clone()

        def ours(weight=weight, optimizer=optimizer, generator=generator) -> None:
            weight.grad = torch.randn(weight.shape, generator=generator).to(device())
            optimizer.step()

        for _ in range(20):  # momentum and warm start
            ours()
        gradient = favourable(optimizer.state[weight]["momentum_buffer"])
        steps = {"blueberry": ours, "reference": lambda p=theirs, g=gradient: reference_step(p, g)}
        seconds = interleaved_medians(steps, repeats)
        errors = {"blueberry": error(weight), "reference": error(reference_step(theirs, gradient))}
        yield {"benchmark": "manifold reference", "size": list(size),
               "step_ms": {name: round(1000 * value, 1) for name, value in seconds.items()},
               "times_faster": round(seconds["reference"] / seconds["blueberry"], 1),
               "objective_over_reference": round(objective_ratio(Problem(theirs, gradient)), 4),
               "orthogonality_error": errors, "n": repeats}  # fmt: skip


def objective_ratio(problem: Problem) -> float:
    """What a cold-started step of ours reaches over what the reference does, both made feasible."""
    ours = steepest_tangent_step(problem.point[None], problem.gradient[None], **BALANCED).direction[0]
    theirs, _ = reference_direction(*problem)
    return share_of_optimum(problem, ours, 1.0) / share_of_optimum(problem, theirs, 1.0)


def error(weight: torch.Tensor) -> float:
    """norm_F(W^T W - I)."""
    return float(f"{Stiefel().orthogonality_error(weight.detach()).item():.2g}")


def benchmark_share(batch: tuple[int, int], repeats: int) -> Iterator[Record]:
    """The optimizer step of `blueberry-moe` on gradients of a batch, over a training step at the documents' batch.

    The forward and backward time is that of the small batch, in proportion to the tokens.
    """
    torch.manual_seed(0)
    model = BlueberryForCausalLM(BlueberryConfig.from_preset("blueberry-moe")).to(device())
    scale = BATCH[0] * BATCH[1] * BATCH[2] / (batch[0] * batch[1])
    for name, settings in VARIANTS.items():
        optimizer = create_manifold_optimizer(model, **settings)
        seconds = [time_step(model, optimizer, batch) for _ in range(repeats + 1)][1:]
        passes, step = (median(values) for values in zip(*[row[:2] for row in seconds], strict=True))
        phases = {phase: round(1000 * median(row[2][phase] for row in seconds), 1) for phase in seconds[0][2]}
        yield {"benchmark": "manifold share", "variant": name, "measured_batch": list(batch), "batch": list(BATCH),
               "forward_backward_s": round(passes, 3), "forward_backward_s_at_batch": round(scale * passes, 2),
               "optimizer_step_s": round(step, 3), "phases_ms": phases,
               "dual_iterations": [round(g["dual_iterations"], 2) for g in optimizer.param_groups[:2]],
               "share_at_batch": round(step / (step + scale * passes), 4), "n": repeats}  # fmt: skip


def time_step(
    model: nn.Module, optimizer: ComposedOptimizer, batch: tuple[int, int]
) -> tuple[float, float, dict[str, float]]:
    """Seconds of forward and backward (bf16 autocast) and of the optimizer's step, and of its phases."""
    ids = torch.randint(0, model.config.vocab_size, batch, device=device())
    clock = PhaseClock(optimizer)
    times = [now()]
    with torch.autocast(device().type, torch.bfloat16):
        model(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
    times.append(now())
    clock.start()
    optimizer.step()
    clock.stop()
    times.append(now())
    optimizer.zero_grad()
    return times[1] - times[0], times[2] - times[1], dict(clock.seconds)
