"""The planner's bytes and operations are those that are measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.optim import Muon
from blueberry.optim.param_groups import assign_parameters
from blueberry.threads_blueberry import blas_threads
from blueberry.training.scale import ENGINES, matrices, model_flops, plan

SIZES = {"vocab_size": 41, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "moe_intermediate_size": 20, "num_experts": 3}  # fmt: skip


IDS = torch.arange(2 * 16).reshape(2, 16) % 41


def small(**changes: Any) -> BlueberryForCausalLM:
    torch.manual_seed(0)
    return BlueberryForCausalLM(BlueberryConfig.from_preset("tiny", **SIZES | changes)).train()


def of_muon() -> list[Any]:
    return [a for a in assign_parameters(small()) if a.optimizer == "muon"]


def stepped(spread: Any, replicas: Any) -> None:
    parameters = [nn.Parameter(spread(a.parameter.detach())) for a in of_muon()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    muon = Muon(parameters, ns_dtype=torch.float32)
    muon.replicas = replicas
    muon.step()


def work(rank: int, folder: Path) -> dict[str, int]:
    """Bytes that this rank sends to others, seen at the collectives."""
    sent = 0
    all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_single

    def counted_all_to_all(out: Tensor, given: Tensor, out_sizes: list, sizes: list, group: Any = None) -> None:
        nonlocal sent
        sent += given.itemsize * (sum(sizes) - sizes[rank])
        all_to_all(out, given, out_sizes, sizes, group=group)

    def counted_all_gather(out: Tensor, given: Tensor, group: Any = None) -> None:
        nonlocal sent
        sent += given.nbytes * (group.size() - 1)
        all_gather(out, given, group=group)

    dist.all_to_all_single, dist.all_gather_single = counted_all_to_all, counted_all_gather
    ranks, found = dist.get_world_size(), {}
    mesh = init_device_mesh("cpu", (ranks,))
    stepped(lambda tensor: tensor, dist.group.WORLD)
    found["ddp"], sent = sent, 0
    stepped(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]), None)
    found["fsdp2"] = sent
    dist.all_to_all_single, dist.all_gather_single = all_to_all, all_gather
    return found | {f"{engine}, model": sent for engine, sent in model_bytes(mesh).items()}


def model_bytes(mesh: DeviceMesh) -> dict[str, float]:
    """Bytes that a rank sends in a forward and backward pass, seen at the collectives of each engine."""
    sent, ranks = {"ddp": 0.0, "fsdp2": 0.0}, mesh.size()

    def reduced(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent["ddp"] += 2 * bucket.buffer().nbytes * (ranks - 1) / ranks  # a ring scatters the sums, then gathers them
        return allreduce_hook(dist.group.WORLD, bucket)

    def counted(collective: Any, share: float) -> Any:
        def call(*tensors: Tensor, **named: Any) -> Any:
            sent["fsdp2"] += share * (named["input"] if "input" in named else tensors[1]).nbytes
            return collective(*tensors, **named)

        return call

    parallel = DistributedDataParallel(small())
    parallel.register_comm_hook(None, reduced)
    parallel(input_ids=IDS, labels=IDS).loss.backward()
    sharded = small()
    for layer in (*sharded.model.layers, sharded):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", counted(dist.all_gather_single, ranks - 1))
        patch.setattr(dist, "reduce_scatter_single", counted(dist.reduce_scatter_single, (ranks - 1) / ranks))
        sharded(input_ids=IDS, labels=IDS).loss.backward()
    return sent


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_are_those_that_ranks_send(ranks, tmp_path):
    measured = run_ranks(work, ranks, tmp_path)
    for engine in ENGINES:
        _, sent, _ = matrices(of_muon(), engine, ranks, torch.float32)
        assert sent == max(of_rank[engine] for of_rank in measured) > 0, engine
        planned = plan(small(), engine, ranks, wire=torch.float32)
        assert [planned.model_bytes] * ranks == [of_rank[f"{engine}, model"] for of_rank in measured], engine


def test_the_operations_are_those_that_torch_counts():
    with blas_threads(2), FlopCounterMode(display=False) as counter:
        stepped(lambda tensor: tensor, None)
    for engine in ENGINES:
        assert matrices(of_muon(), engine, 1, torch.float32)[0] == counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"num_experts": 0, "intermediate_size": 48}, {"tie_word_embeddings": False},
                                     {"gated_experts": True}], ids=str)  # fmt: skip
def test_the_models_operations_are_those_that_torch_counts(changes):
    """Tied and untied, dense and experts; the embedding of tokens is no product.

    Where nothing is fused: torch does not count what a custom backward asks autograd for.
    """
    model = small(**changes, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert model_flops(model, IDS.numel(), IDS.shape[1]) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_memory_is_that_of_the_rank_with_most_and_counts_what_fsdp_gathers():
    """By hand: embeddings are 41 rows of 36, of which the first of 4 ranks has 11."""
    model = small()
    one, four = (plan(model, "fsdp2", ranks, wire=torch.float32).memory for ranks in (1, 4))
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert four > one / 4 + 4 * (41 * 36 + 2 * layer)
    assert plan(model, "ddp", 4, wire=torch.float32).memory >= one


def test_the_script_plans_for_thousands_of_ranks(script, capsys):
    script("plan_scale.py", "--preset", "tiny", "--world_size", 1, 8, 4096)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| ddp", "| fsdp2"))]
    assert len(rows) == 6 and "| 4,096 |" in rows[-1]
    with pytest.raises(SystemExit):
        script("plan_scale.py", "--bandwidth", 0)
    assert "error: --bandwidth 0.0: must be above 0" in capsys.readouterr().err
