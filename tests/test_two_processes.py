"""Two processes compute what one does: data parallelism, tensor parallelism and expert parallelism."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.configuration_utils import DistributedConfig

from blueberry import BlueberryConfig, BlueberryForCausalLM

RANKS = 2
VARIANTS = {"dense": {"num_experts": 0}, "experts": {}, "gated_experts": {"gated_experts": True}}
PLANS = [(variant, "tensor") for variant in VARIANTS] + [
    (variant, "expert") for variant in VARIANTS if "exp" in variant
]


def model(variant: str = "experts") -> BlueberryForCausalLM:
    """A small model with router losses large enough to be seen, and no router noise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16}
    sizes |= {"intermediate_size": 48, "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1}
    return BlueberryForCausalLM(BlueberryConfig.from_preset("tiny", **sizes | VARIANTS[variant])).train()


def batch() -> tuple[Tensor, Tensor]:
    """Eight sequences, of which some count fewer labels than others."""
    ids = torch.randint(0, 40, (8, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row in range(8):
        labels[row, : 2 * row] = -100
    return ids, labels


def data_parallel_gradients(rank: int) -> dict[str, Tensor]:
    """What Trainer does on one of two ranks: the loss of its half over the global count, times the ranks, then DDP."""
    parallel = DistributedDataParallel(model())
    ids, labels = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    count = labels[:, 1:].ne(-100).sum()
    loss = parallel(input_ids=ids[mine], labels=labels[mine], num_items_in_batch=count).loss
    (loss * RANKS).backward()
    return {name: parameter.grad for name, parameter in parallel.module.named_parameters()}


def sharded_results(folder: str, parallelism: str) -> dict[str, object]:
    """Loss, gradient norms, gradients, text and logits of a model that is spread over the ranks, and its share."""
    sizes = {"tp_size": RANKS} | ({"ep_size": RANKS} if parallelism == "expert" else {})
    sharded = BlueberryForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).train()
    ids, labels = batch()
    losses = []
    for skip_logits in (True, False):
        sharded.zero_grad()
        loss = sharded(input_ids=ids, labels=labels, skip_logits=skip_logits).loss
        loss.backward()
        losses.append(loss.item())
    sharded.eval()
    with torch.no_grad():
        text, logits = sharded.generate(ids[:, :5], max_new_tokens=4, do_sample=False), sharded(ids).logits
    return {
        "losses": losses,
        "grads": {name: whole(parameter.grad) for name, parameter in sharded.named_parameters()},
        "text": text,
        "logits": logits,
        "parameters": sum(local(parameter).numel() for parameter in sharded.parameters()),
    }


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which every rank holds a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {"data": data_parallel_gradients(rank)}
    for variant, parallelism in PLANS:
        results[variant, parallelism] = sharded_results(f"{folder}/{variant}", parallelism)
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What rank 0 of two processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    for variant in VARIANTS:
        model(variant).save_pretrained(folder / variant)
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return torch.load(Path(folder) / "results.pt", weights_only=True)


def test_two_data_parallel_processes_give_the_gradients_of_one(results: dict):
    alone = model()
    ids, labels = batch()
    alone(input_ids=ids, labels=labels).loss.backward()
    for name, parameter in alone.named_parameters():
        assert (parameter.grad - results["data"][name]).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize(("variant", "parallelism"), PLANS)
def test_a_model_spread_over_two_processes_computes_what_one_does(results: dict, variant: str, parallelism: str):
    alone, theirs = model(variant), results[variant, parallelism]
    ids, labels = batch()
    loss = alone(input_ids=ids, labels=labels).loss
    loss.backward()
    assert theirs["losses"] == [pytest.approx(loss.item(), rel=1e-5)] * 2
    grads = dict(alone.named_parameters())
    for name, grad in theirs["grads"].items():
        assert (grads[name].grad - grad).norm() <= 1e-4 * grads[name].grad.norm(), name
    alone.eval()
    torch.testing.assert_close(theirs["logits"], alone(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs["text"], alone.generate(ids[:, :5], max_new_tokens=4, do_sample=False))
    # half of all matrices but the routers, and half of the experts, which are most of the model
    assert theirs["parameters"] < 0.6 * alone.num_parameters()
