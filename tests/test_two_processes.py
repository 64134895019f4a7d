"""Router losses do not depend on how a global batch is split over data-parallel ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from blueberry import BlueberryConfig, BlueberryForCausalLM

RANKS = 2


def model() -> BlueberryForCausalLM:
    """A small mixture of experts with router losses large enough to be seen, and no router noise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16}
    return BlueberryForCausalLM(
        BlueberryConfig.from_preset("tiny", **sizes, router_aux_loss_coef=1.0, router_z_loss_coef=0.1)
    ).train()


def batch() -> tuple[Tensor, Tensor]:
    """Eight sequences, of which some count fewer labels than others."""
    ids = torch.randint(0, 40, (8, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row in range(8):
        labels[row, : 2 * row] = -100
    return ids, labels


def gradients_of_a_rank(rank: int, folder: str) -> None:
    """What Trainer does on one of two ranks: the loss of its half over the global count, times the ranks, then DDP."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    parallel = DistributedDataParallel(model())
    ids, labels = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    count = labels[:, 1:].ne(-100).sum()
    loss = parallel(input_ids=ids[mine], labels=labels[mine], num_items_in_batch=count).loss
    (loss * RANKS).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in parallel.module.named_parameters()}, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(gradients_of_a_rank, args=(str(tmp_path),), nprocs=RANKS)
    theirs = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = model()
    ids, labels = batch()
    alone(input_ids=ids, labels=labels).loss.backward()
    for name, parameter in alone.named_parameters():
        assert (parameter.grad - theirs[name]).norm() <= 1e-5 * parameter.grad.norm(), name
