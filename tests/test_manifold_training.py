"""200 steps of manifold Muon through BlueberryTrainer: the constraint at every step, through save, kill and resume."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL
from transformers import TrainerCallback

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments

STEPS = 200


def windows() -> list[dict[str, torch.Tensor]]:
    """Periodic sequences: learnable in 200 steps."""
    starts = torch.randint(0, 300, (64,), generator=torch.Generator().manual_seed(0))
    rows = (starts[:, None] + 7 * torch.arange(16)) % 300
    return [{"input_ids": row, "labels": row} for row in rows]


class Watch(TrainerCallback):
    """Checks every matrix after every step, from the weights alone; dies where it is told to."""

    def __init__(self, dies_after: int | None = None):
        self.dies_after, self.worst, self.steps = dies_after, {"orthogonality": 0.0, "radius": 0.0}, []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(state.global_step)
        for name, weight in model.named_parameters():
            w = weight.detach().double()
            if "_proj" in name:
                gram = w.mT @ w if w.shape[-2] >= w.shape[-1] else w @ w.mT
                error = (gram - torch.eye(gram.shape[-1])).flatten(-2).norm(dim=-1).max().item()
                self.worst["orthogonality"] = max(self.worst["orthogonality"], error)
            elif "embed" in name or "gate" in name:
                self.worst["radius"] = max(self.worst["radius"], (w.norm(dim=-1) - 1).abs().max().item())
        if state.global_step == self.dies_after:
            raise RuntimeError("killed")


def make_trainer(folder: Path, watch: Watch, **settings) -> BlueberryTrainer:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL_MODEL.items() if name != "model_type"}
    model = BlueberryForCausalLM(BlueberryConfig(**sizes))
    args = BlueberryTrainingArguments(
        str(folder), optimizer="manifold", max_steps=STEPS, per_device_train_batch_size=4, save_steps=75,
        eval_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return BlueberryTrainer(model, args, train_dataset=windows(), callbacks=[watch])


def test_the_constraint_holds_at_every_one_of_200_steps_through_save_kill_and_resume(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        make_trainer(tmp_path, first := Watch(dies_after=100)).train()
    resumed = make_trainer(tmp_path, second := Watch())
    resumed.train(resume_from_checkpoint=True)
    assert first.steps == list(range(1, 101)) and second.steps == list(range(76, STEPS + 1))
    for worst in (first.worst, second.worst):
        assert 0 < worst["orthogonality"] < 1e-4 and 0 < worst["radius"] < 1e-6
    losses = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_as_an_uninterrupted_one_bit_for_bit(tmp_path, dtype):
    """In bfloat16 the float32 copies keep the constraint, and the weights are their rounding."""

    def trained(resume: bool) -> BlueberryTrainer:
        trainer = make_trainer(tmp_path, Watch())
        trainer.model.to(dtype)
        trainer.args.max_steps, trainer.args.save_steps = 12, 6
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resume else None)
        return trainer

    straight, resumed = trained(resume=False), trained(resume=True)
    for trainer in (straight, resumed):
        assert trainer.optimizer.optimizer.check_constraints()["total_violations"] == 0
    for mine, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert mine.dtype == dtype and torch.equal(mine, other)
