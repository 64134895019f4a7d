"""Training under DDP and FSDP2 ends as in one process, and goes on from checkpoints on another number of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from blueberry.errors import UsageError
from blueberry.optim import muon
from blueberry.training.checkpoints import flaw

STEPS, WINDOWS = 6, 8
SHARDS, WHOLE = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
SIZES = {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16,
         "num_experts": 3}  # fmt: skip
IDS = torch.randint(0, 40, (STEPS * WINDOWS, 24), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": ids, "labels": ids} for ids in IDS]


def trainer(folder: Path, ranks: int, sharded: str = "", **settings: Any) -> BlueberryTrainer:
    """Of a small mixture of experts with tied embeddings; steps of eight windows whatever the number of ranks.

    `sharded`: under FSDP2, with checkpoints of that kind.
    """
    torch.manual_seed(0)
    model = BlueberryForCausalLM(BlueberryConfig.from_preset("tiny", **SIZES))
    accumulation = settings.pop("gradient_accumulation_steps", 1)
    args = BlueberryTrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=WINDOWS // ranks // accumulation, save_steps=3,
        gradient_accumulation_steps=accumulation, report_to="none", use_cpu=True, disable_tqdm=True,
        eval_strategy="no", logging_steps=1, ddp_backend="gloo" if ranks > 1 else None, **settings)  # fmt: skip
    made = BlueberryTrainer(model, args, train_dataset=DATA)
    if sharded:
        use_fsdp2(made, sharded)
    return made


def use_fsdp2(trainer: BlueberryTrainer, kind: str) -> None:
    """What accelerate does for GPUs; on CPUs it leaves FSDP out."""
    state = trainer.accelerator.state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type=kind,
        cpu_ram_efficient_loading=False,
    )
    state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def trained(made: BlueberryTrainer, checkpoint: Path | None = None) -> dict[str, Any]:
    made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    made.save_model()
    state = {name: whole(p) for name, p in made.model.named_parameters()}
    momenta = [whole(s["momentum_buffer"]) for s in made.optimizer.state.values() if "momentum_buffer" in s]
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return {"weights": state, "momenta": momenta, "losses": losses,
            "sharded": isinstance(next(made.model.parameters()), DTensor)}  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def in_float32() -> None:
    """Newton-Schulz in half precision would make much of the rounding of sums."""
    muon.fastest_dtype = lambda device: torch.float32


def work(rank: int, folder: Path) -> dict[str, Any]:
    in_float32()
    results = {
        "ddp": trained(trainer(folder / "ddp", 2)),
        "ddp, accumulated": trained(trainer(folder / "accumulated", 2, gradient_accumulation_steps=2)),
        "ddp, redundant": trained(trainer(folder / "redundant", 2, share_optimizer_work=False)),
        "ddp, manifold": trained(trainer(folder / "ddp-manifold", 2, optimizer="manifold")),
        "ddp in bf16": trained(trainer(folder / "ddp-bf16", 2, bf16=True)),
        "fsdp2": trained(trainer(folder / "fsdp2", 2, sharded=SHARDS)),
        "fsdp2, whole checkpoints": trained(trainer(folder / "fsdp2-whole", 2, sharded=WHOLE)),
        "fsdp2, manifold": trained(trainer(folder / "fsdp2-manifold", 2, sharded=SHARDS, optimizer="manifold")),
    }
    for name in ("fsdp2", "fsdp2-manifold"):
        optimizer = "manifold" if "manifold" in name else "muon"
        again = trainer(folder / f"{name}-again", 2, sharded=SHARDS, optimizer=optimizer)
        results[f"{name}, resumed"] = trained(again, folder / name / "checkpoint-3")
    return results


def work_of_four(rank: int, folder: Path) -> dict[str, Any]:
    """What two ranks began, gone on with by four; and four that are two nodes."""
    in_float32()
    found = {"ddp": trained(trainer(folder / "ddp-four", 4), folder / "ddp" / "checkpoint-3")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        found["ddp, two nodes"] = trained(trainer(folder / "nodes", 4))
    for name, optimizer in (("fsdp2", "muon"), ("fsdp2-manifold", "manifold")):
        more = trainer(folder / f"{name}-four", 4, sharded=SHARDS, optimizer=optimizer)
        found[name] = trained(more, folder / name / "checkpoint-3")
    return found


def work_of_one(rank: int, folder: Path) -> dict[str, Any]:
    """What two ranks began, gone on with by one, under the same engine."""
    in_float32()
    kinds = {"ddp": "", "fsdp2": SHARDS, "fsdp2-whole": WHOLE}
    return {name: trained(trainer(folder / f"{name}-one", 1, sharded=kind), folder / name / "checkpoint-3")
            for name, kind in kinds.items()}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """What rank 0 of two has."""
    return run_ranks(work, 2, folder)[0]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """One process, of its own kind for each kind of run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "fastest_dtype", lambda device: torch.float32)
        return {
            "muon": trained(trainer(folder / "alone", 1)),
            "manifold": trained(trainer(folder / "alone-manifold", 1, optimizer="manifold")),
            "bf16": trained(trainer(folder / "alone-bf16", 1, bf16=True)),
        }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    for name, weight in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=0, atol=tolerance)


KINDS = {
    "ddp": 2e-6, "ddp, accumulated": 2e-6, "ddp, redundant": 2e-6, "fsdp2": 2e-6, "fsdp2, whole checkpoints": 2e-6,
    # the Stiefel solver divides by small singular values, which makes more of the rounding of sums
    "ddp, manifold": 2e-5, "fsdp2, manifold": 2e-5,
    # products of half precision round at 4e-3, and so do gradients; six steps of 0.02 move weights by up to 0.12
    "ddp in bf16": 1e-2,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_train_as_one_process(results, alone, kind):
    """Sums over ranks round otherwise than sums over a batch; tied embeddings, experts that ranks cannot halve."""
    reference = next((name for name in ("manifold", "bf16") if name in kind), "muon")
    assert results[kind]["sharded"] == kind.startswith("fsdp2")
    assert_same(results[kind], alone[reference], KINDS[kind])


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-manifold"])
def test_a_sharded_checkpoint_resumes_bit_for_bit_on_as_many_ranks(results, name):
    whole, resumed = results[name.replace("-", ", ")], results[f"{name}, resumed"]
    assert resumed["losses"] == whole["losses"]
    assert all(torch.equal(resumed["weights"][key], weight) for key, weight in whole["weights"].items())
    assert all(map(torch.equal, resumed["momenta"], whole["momenta"]))


@pytest.fixture(scope="module")
def of_four(results, folder) -> dict[str, Any]:
    return run_ranks(work_of_four, 4, folder)[0]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-manifold"])
def test_a_checkpoint_resumes_on_twice_the_ranks(results, of_four, name):
    assert_same(of_four[name], results[name.replace("-", ", ")], 2e-5)


def test_a_checkpoint_resumes_on_half_the_ranks(results, folder):
    found = run_ranks(work_of_one, 1, folder)[0]
    assert found.keys() == {"ddp", "fsdp2", "fsdp2-whole"}
    for name, ours in found.items():
        assert_same(ours, results[name.replace("-whole", ", whole checkpoints")], 2e-5)


def test_a_checkpoint_of_fsdp_is_refused_without_it_in_one_line(results, folder, tmp_path):
    with pytest.raises(UsageError, match=r"checkpoint-3 does not fit .* only supported when using PyTorch FSDP"):
        trained(trainer(tmp_path, 1), folder / "fsdp2" / "checkpoint-3")


def test_each_node_shares_the_optimizers_work_among_its_own_ranks(of_four, alone):
    assert_same(of_four["ddp, two nodes"], alone["muon"], 2e-6)


def test_sharded_checkpoints_are_verified_to_the_last_shard(results, folder):
    checkpoint = folder / "fsdp2" / "checkpoint-3"
    assert flaw(checkpoint) is None
    shards = sorted(checkpoint.rglob("*.distcp"))
    assert len(shards) == 4  # weights and optimizer of two ranks
    for shard in shards:
        written = shard.read_bytes()
        shard.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
        assert f"damaged {shard.name}" in flaw(checkpoint)
        shard.write_bytes(written)


def test_the_model_that_a_sharded_run_leaves_is_whole(results, folder):
    """A tied head may be there under its own name."""
    saved = load_file(folder / "fsdp2" / "model.safetensors")
    saved.setdefault("model.embed_tokens.weight", saved.pop("lm_head.weight", None))
    weights = results["fsdp2"]["weights"]
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    loaded = BlueberryForCausalLM.from_pretrained(folder / "fsdp2").state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
