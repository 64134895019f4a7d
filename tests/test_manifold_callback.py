"""ManifoldConstraintCallback and the parts of a step's time, in the stock Trainer with Blueberry's optimizers."""

import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from transformers import Trainer, TrainerCallback, TrainingArguments

from blueberry import BlueberryConfig, BlueberryForCausalLM
from blueberry.errors import UsageError
from blueberry.optim import build_optimizer, create_manifold_optimizer
from trainer_callbacks import (
    ManifoldConstraintCallback,
    RouterMetricsCallback,
    SpectralMetricsCallback,
    StepTimeCallback,
    TensorBoardCallback,
)

DATA = [{"input_ids": row, "labels": row} for row in torch.randint(0, 300, (64, 8), generator=torch.manual_seed(1))]


class Vandal(TrainerCallback):
    """Stretches a weight after step 2."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)


def make_trainer(folder: Path, *callbacks: TrainerCallback, optimizer="manifold", **settings) -> Trainer:
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL_MODEL.items() if name != "model_type"}
    model = BlueberryForCausalLM(BlueberryConfig(**sizes))
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", max_grad_norm=0, **{"max_steps": 4, "logging_steps": 2} | settings,
    )  # fmt: skip
    composed = build_optimizer(model, optimizer=optimizer)
    return Trainer(model, args, train_dataset=DATA, callbacks=list(callbacks), optimizers=(composed, None))


def test_violations_singular_values_and_the_solver_are_logged(tmp_path):
    board, callback = TensorBoardCallback(), None
    callback = ManifoldConstraintCallback(board)
    make_trainer(tmp_path, board, callback).train()
    assert callback.latest["manifold/stiefel_muon/max_violation"] < 1e-4
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("max_violation", "mean_violation", "sigma_min", "sigma_max", "tangency_residual", "dual_iterations"):
        assert {f"manifold/stiefel_attention/{name}", f"manifold/stiefel_feed_forward/{name}"} <= tags
    assert [event.step for event in events.Scalars("manifold/constraint/violations")] == [2, 4]
    assert 0.9999 < events.Scalars("manifold/stiefel_attention/sigma_min")[-1].value <= 1.0001
    charts = charts_of(events)["manifold"]
    shown = {name: {tag for tag in tags if any(re.search(p, tag) for p in charts[name])} for name in charts}
    assert shown["largest violation"] == {f"manifold/{kind}_muon/max_violation" for kind in ("stiefel", "hypersphere")}
    assert shown["singular values"] > {"manifold/stiefel_attention/sigma_min", "manifold/stiefel_attention/sigma_max"}


def charts_of(events: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    """Category -> chart -> patterns of the custom scalars tab."""
    raw = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    layout = Layout.FromString(raw)
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def test_charts_of_several_callbacks_are_side_by_side(tmp_path):
    board = TensorBoardCallback()
    callbacks = [SpectralMetricsCallback(tensorboard=board), ManifoldConstraintCallback(board),
                 RouterMetricsCallback(board)]  # fmt: skip
    make_trainer(tmp_path, board, *callbacks, max_steps=2).train()
    charts = charts_of(EventAccumulator(str(tmp_path / "runs")).Reload())
    assert {"spectral_norm", "manifold", "router"} <= set(charts)
    assert charts["router"]["load_imbalance"] == ["^load_imbalance/layer_(00|01)$"]
    assert charts["spectral_norm"]["self_attn.q_proj"] == [
        f"^spectral_norm/self_attn.q_proj/layer_0{layer}$" for layer in (0, 1)
    ]


@pytest.mark.parametrize(("on_violation", "steps"), [("warn", 4), ("project", 4), ("stop", 2)])
def test_what_happens_to_a_broken_constraint_is_chosen(tmp_path, on_violation, steps):
    callback = ManifoldConstraintCallback(on_violation=on_violation, check_every_n_steps=1)
    trainer = make_trainer(tmp_path, Vandal(), callback, logging_steps=100)
    remedy = {"warn": "repairs it", "project": "projected", "stop": "training stops"}[on_violation]
    with pytest.warns(UserWarning, match=rf"1 matrices are off their manifold at step 2 \(largest errors.*{remedy}"):
        trainer.train()
    assert trainer.state.global_step == steps
    violations = trainer.optimizer.optimizer.check_constraints()["total_violations"]
    assert violations == (
        1 if on_violation == "stop" else 0
    )  # the next step's retraction repairs what was only warned of


def test_projection_repairs_at_once_and_touches_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    optimizer, model = trainer.optimizer.optimizer, trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = "model.layers.0.self_attn.o_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    optimizer.project_onto_manifolds()
    assert optimizer.check_constraints()["total_violations"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n != name)
    torch.testing.assert_close(model.get_parameter(name), before[name], rtol=0, atol=1e-5)


def test_bad_settings_and_optimizers_without_constraints_are_refused(tmp_path):
    with pytest.raises(UsageError, match="on_violation='ignore' is unknown: use one of warn, project, stop"):
        ManifoldConstraintCallback(on_violation="ignore")
    with pytest.raises(UsageError, match="check_every_n_steps=0 is below 1"):
        ManifoldConstraintCallback(check_every_n_steps=0)
    with pytest.raises(UsageError, match="keeps no constraint to watch: train with --optimizer manifold"):
        make_trainer(tmp_path, ManifoldConstraintCallback(), optimizer="muon").train()


@pytest.mark.parametrize(
    ("optimizer", "phases"),
    [("manifold", {"dual_ms", "retraction_ms"}), ("muon", {"newton_schulz_ms"}), ("adamw", set())],
)
def test_the_parts_of_a_step_add_up_to_it(tmp_path, optimizer, phases):
    callback = StepTimeCallback()
    trainer = make_trainer(tmp_path, callback, optimizer=optimizer, gradient_accumulation_steps=2, max_steps=6)
    trainer.train()
    numbers = callback.summary()
    assert {name for name in numbers if name in ("dual_ms", "retraction_ms", "newton_schulz_ms")} == phases
    for step in callback._steps:
        parts = step["forward"] + step["backward"] + step["optimizer_step"]
        assert 0.5 * step["step"] < parts <= step["step"]  # the rest is moving the batch and Trainer's own
        assert sum(step[name.removesuffix("_ms")] for name in phases) <= step["optimizer_step"]
        assert min(step["forward"], step["backward"]) > 0
    assert "solve" not in vars(next(iter(trainer.optimizer.optimizer.optimizers.values())))  # no shadows stay


def test_evaluation_is_not_part_of_a_step_and_hooks_come_off(tmp_path):
    callback = StepTimeCallback()
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    steps = [dict(step) for step in callback._steps]
    trainer.evaluate(DATA[:4])
    assert callback._steps == steps and not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


def test_a_manifold_optimizer_of_the_users_own_is_watched_too(tmp_path):
    trainer = make_trainer(tmp_path)
    optimizer = create_manifold_optimizer(trainer.model, families=("attention",))
    callback = ManifoldConstraintCallback()
    Trainer(
        trainer.model, trainer.args, train_dataset=DATA, callbacks=[callback], optimizers=(optimizer, None)
    ).train()
    assert "manifold/stiefel_attention/max_violation" in callback.latest
