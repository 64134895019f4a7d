"""The planner's bytes and operations are those that are measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.optim import Muon
from blueberry.optim.param_groups import assign_parameters
from blueberry.training.scale import ENGINES, matrices

SIZES = {"vocab_size": 41, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "moe_intermediate_size": 20, "num_experts": 3}  # fmt: skip


def of_muon() -> list[Any]:
    torch.manual_seed(0)
    model = BlueberryForCausalLM(BlueberryConfig.from_preset("tiny", **SIZES))
    return [a for a in assign_parameters(model) if a.optimizer == "muon"]


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
    all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_into_tensor

    def counted_all_to_all(out: Tensor, given: Tensor, out_sizes: list, sizes: list, group: Any = None) -> None:
        nonlocal sent
        sent += given.itemsize * (sum(sizes) - sizes[rank])
        all_to_all(out, given, out_sizes, sizes, group=group)

    def counted_all_gather(out: Tensor, given: Tensor, group: Any = None) -> None:
        nonlocal sent
        sent += given.nbytes * (group.size() - 1)
        all_gather(out, given, group=group)

    dist.all_to_all_single, dist.all_gather_into_tensor = counted_all_to_all, counted_all_gather
    ranks, found = dist.get_world_size(), {}
    mesh = init_device_mesh("cpu", (ranks,))
    stepped(lambda tensor: tensor, dist.group.WORLD)
    found["ddp"], sent = sent, 0
    stepped(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]), None)
    found["fsdp2"] = sent
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_bytes_are_those_that_ranks_send(ranks, tmp_path):
    measured = run_ranks(work, ranks, tmp_path)
    for engine in ENGINES:
        _, sent, _ = matrices(of_muon(), engine, ranks, torch.float32)
        assert sent == max(of_rank[engine] for of_rank in measured) > 0, engine


def test_the_operations_are_those_that_torch_counts():
    with FlopCounterMode(display=False) as counter:
        stepped(lambda tensor: tensor, None)
    for engine in ENGINES:
        assert matrices(of_muon(), engine, 1, torch.float32)[0] == counter.get_total_flops()


def test_the_script_plans_for_thousands_of_ranks(script, capsys):
    script("plan_scale.py", "--preset", "tiny", "--world_size", 1, 8, 4096)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| ddp", "| fsdp2"))]
    assert len(rows) == 6 and "| 4,096 |" in rows[-1]
    with pytest.raises(SystemExit):
        script("plan_scale.py", "--bandwidth", 0)
    assert "error: --bandwidth 0.0: must be above 0" in capsys.readouterr().err
