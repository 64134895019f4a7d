"""Several ranks step as one process does, from the same gradients, however they hold the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from blueberry.optim import HypersphereMuon, Muon, StiefelMuon
from blueberry.optim.splits import Layout

RANKS, STEPS = 2, 3
# Rows that two ranks cannot halve, fewer rows than ranks, experts that they cannot halve.
SHAPES = [(16, 8), (7, 12), (8, 8), (1, 6), (12, 5), (3, 6, 4), (4, 8, 8)]
FUSED = [(12, 4), (2, 12, 6)]
# Shard(0) is what FSDP2 does; the others fall back or stay on the rank.
HOLDINGS = {
    "replicas": None,
    "rows": ((2,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "replicated and sharded": ((2, 1), (Replicate(), Shard(0))),
    "sharded twice": ((1, 2), (Shard(0), Shard(1))),
}
FP32 = {"ns_dtype": torch.float32}
OF_FOUR = {  # meshes of which no dimension is 1
    "HSDP": ((2, 2), (Replicate(), Shard(0))),
    "FSDP2 and rows of a tensor-parallel plan": ((2, 2), (Shard(0), Shard(1))),
}
OPTIMIZERS = {
    "muon": (Muon, FP32 | {"weight_decay": 0.1}),
    "muon in small buckets": (Muon, FP32 | {"bucket_bytes": 600}),
    "normuon": (Muon, FP32 | {"neuron_beta": 0.9}),
    "momentum alone": (Muon, {"orthogonalize": False}),
    "stiefel": (StiefelMuon, {}),
    "hypersphere": (HypersphereMuon, {}),
    "hypersphere columns": (HypersphereMuon, {"mode": "per_column", "radius": 1.0}),
}


def groups(kind: type, spread: Any, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Plain weights, and for optimizers of matrices fused ones, of Gaussian numbers."""
    generator = torch.Generator().manual_seed(0)
    fused = Layout(shape=(3, -1)), Layout(transposed=True, shape=(2, -1))
    shapes = [(SHAPES, None)] + (
        [([FUSED[0]], fused[0]), ([FUSED[1]], fused[1])] if kind is not HypersphereMuon else []
    )
    made = []
    for some, layout in shapes:
        weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in some]
        group = {"params": [nn.Parameter(spread(weight)) for weight in weights]}
        made.append(
            group if kind is HypersphereMuon else group | {"layout": None if layout is None else tuple(layout)}
        )
    return made


def stepped(
    kind: type, settings: dict[str, Any], spread: Any, replicas: Any = None, dtype=torch.float32
) -> torch.optim.Optimizer:
    """An optimizer after some steps, each with gradients of its own."""
    optimizer = kind(groups(kind, spread, dtype), lr=0.1, **{k: v for k, v in settings.items() if k != "bucket_bytes"})
    optimizer.bucket_bytes = settings.get("bucket_bytes", optimizer.bucket_bytes)
    optimizer.replicas = replicas
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step + 1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = spread(gradient.to(dtype))
        optimizer.step()
    return optimizer


def contents(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Each weight with its state, whole."""
    return [
        {name: whole(tensor) for name, tensor in {"weight": parameter, **optimizer.state[parameter]}.items()}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def work(rank: int, folder: Path) -> dict[Any, Any]:
    return steps_of(HOLDINGS)


def work_of_four(rank: int, folder: Path) -> dict[Any, Any]:
    return steps_of(OF_FOUR) | {"columns": columns_of_both()}


def steps_of(holdings: dict[str, Any]) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for name, held in holdings.items():
        spread, replicas = (lambda tensor: tensor.clone()), dist.group.WORLD
        if held is not None:
            mesh, placements = init_device_mesh("cpu", held[0]), held[1]
            spread, replicas = (lambda t, mesh=mesh, p=placements: distribute_tensor(t, mesh, p)), None
        for optimizer, (kind, settings) in OPTIMIZERS.items():
            done = stepped(kind, settings, spread, replicas)
            solver = [group.get("tangency_residual") for group in done.param_groups]
            results[name, optimizer] = contents(done), solver
    return results


def columns_of_both() -> list[Tensor]:
    """A matrix whose rows both FSDP2 and a tensor-parallel plan cut, so that a rank holds some from here and there."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    module = torch.nn.Sequential(linear())
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(module, mesh=mesh["data"])
    placements = module[0].weight.placements
    assert isinstance(placements[0], _StridedShard), placements
    return two_steps(module[0].weight)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 18, bias=False)


def two_steps(weight: nn.Parameter) -> list[Tensor]:
    """The weight and its momentum after two steps of Muon, whole."""
    optimizer = Muon([weight], lr=0.1, **FP32)
    for step in range(2):
        gradient = torch.randn(18, 12, generator=torch.Generator().manual_seed(step))
        if isinstance(weight, DTensor):
            gradient = distribute_tensor(gradient, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.grad = gradient
        optimizer.step()
    return [whole(weight), whole(optimizer.state[weight]["momentum_buffer"])]


@pytest.fixture(scope="module")
def results_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(work_of_four, 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(work, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("held", HOLDINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_step_as_one_process(results, held, name):
    assert_as_one_process(results, held, name)


@pytest.mark.parametrize("held", OF_FOUR)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_ranks_on_a_mesh_of_two_dimensions_step_as_one_process(results_of_four, held, name):
    assert_as_one_process(results_of_four, held, name)


def test_rows_that_two_engines_cut_in_turn_are_put_together_in_order(results_of_four):
    for of_rank in results_of_four:
        for ours, theirs in zip(two_steps(linear().weight), of_rank["columns"], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def assert_as_one_process(results: list[dict], held: str, name: str) -> None:
    """Weights of norm about 1 within 1e-6 of the largest entry, and so state."""
    kind, settings = OPTIMIZERS[name]
    alone = stepped(kind, settings, lambda tensor: tensor.clone())
    for of_rank in results:
        theirs, solver = of_rank[held, name]
        for ours, other in zip(contents(alone), theirs, strict=True):
            assert ours.keys() == other.keys()
            for key in ours:
                scale = max(1.0, ours[key].abs().max().item())
                torch.testing.assert_close(other[key] / scale, ours[key] / scale, rtol=0, atol=1e-6)
        residuals = [group.get("tangency_residual") for group in alone.param_groups]
        assert solver == pytest.approx(residuals, abs=1e-4)
