"""SpectralMetricsCallback and TensorBoardCallback in the stock Trainer, on models that are not ours."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from blueberry.errors import UsageError
from blueberry.spectral import SpectralLog, spectral_metrics, update_metrics
from blueberry.spectral.tracked import tracked_matrices
from trainer_callbacks import RouterMetricsCallback, SpectralMetricsCallback, StepTimeCallback, TensorBoardCallback
from trainer_callbacks import spectral_metrics as module
from trainer_callbacks.cadence import log_schedule
from trainer_callbacks.heatmap import heatmap

SIZES = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=24, max_position_embeddings=16, head_dim=8)  # fmt: skip
DATA = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (64, 8), generator=torch.manual_seed(1))]


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12))


def trainer(path: Path, *callbacks: TrainerCallback, model=None, **settings) -> Trainer:
    settings = {"max_steps": 8, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 2} | settings
    args = TrainingArguments(
        str(path), per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    return Trainer(model or dense(), args, train_dataset=DATA, callbacks=list(callbacks))


def read_log(path: Path) -> pd.DataFrame:
    return SpectralLog(path / "spectral_log").read()


class Observer(TrainerCallback):
    """Copies of all weights before the first step and after each."""

    def __init__(self):
        self.weights = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name in [name for name in weights if name.endswith("gate_up_proj")]:
            weights[f"{name}.gate"], weights[f"{name}.up"] = weights.pop(name).chunk(2, dim=1)
        self.weights[state.global_step] = weights


class Crash(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the power went")


class StopAt(Crash):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def moe_run(tmp_path_factory):
    """A finished run of a mixture of experts with gradient accumulation, and the weights after each of its steps."""
    path, observer, board = tmp_path_factory.mktemp("moe"), Observer(), TensorBoardCallback()
    callback = SpectralMetricsCallback(every_n_steps=3, tensorboard=board, k=2)
    run = trainer(
        path,
        board,
        callback,
        observer,
        model=mixture(),
        gradient_accumulation_steps=2,
        include_num_input_tokens_seen=True,
    )
    run.train()
    return path, observer, run, board


def test_rows_describe_the_weights_after_their_step_and_the_change_of_that_step_alone(moe_run):
    path, observer, *_ = moe_run
    log = read_log(path)
    assert sorted(log["step"].unique()) == [0, 3, 6, 8]
    for row in log.to_dict("records"):
        step, pick = row["step"], slice(None) if pd.isna(row["expert"]) else row["expert"]
        weight = observer.weights[step][row["parameter"]][pick]
        assert row["spectral_norm"] == pytest.approx(spectral_metrics(weight)["spectral_norm"])
        if step == 0:
            assert pd.isna(row["update_spectral_norm"])
            continue
        before = observer.weights[step - 1][row["parameter"]][pick]
        expected = update_metrics(before, weight - before, k=2)
        for name in ("update_spectral_norm", "update_alignment", "update_energy_in_top_k"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, nan_ok=True) or expected[name] is None, name


def test_every_matrix_of_every_layer_is_tracked_and_experts_one_by_one(moe_run):
    log = read_log(moe_run[0])
    places = log[log["step"] == 8].groupby("projection", sort=False).size().to_dict()
    assert places == {
        "q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_up_proj.gate": 6, "gate_up_proj.up": 6,
        "down_proj": 6, "gate": 2,
    }  # fmt: skip
    assert not log["parameter"].str.contains("embed|lm_head|norm").any()
    assert sorted(log.drop_duplicates("step")["tokens"]) == [0, 96, 192, 256]  # 2 x 2 x 8 per step


def test_a_dense_model_needs_no_other_settings(tmp_path):
    trainer(tmp_path, SpectralMetricsCallback(), max_steps=2).train()
    log = read_log(tmp_path)
    assert sorted(log["step"].unique()) == [0, 1, 2]
    assert len(log) == 3 * 2 * 7
    assert len(list((tmp_path / "spectral_log").iterdir())) == 1  # compacted


def interrupted(path: Path) -> pd.DataFrame:
    """A run that saves at step 4, logs at 3, 6 and 8, dies after step 7 and is resumed."""
    settings = dict(save_strategy="steps", save_steps=4)
    with pytest.raises(RuntimeError, match="the power went"):
        board = TensorBoardCallback()
        trainer(path, board, SpectralMetricsCallback(3, tensorboard=board), Crash(7), **settings).train()
    board = TensorBoardCallback()
    run = trainer(path, board, SpectralMetricsCallback(3, tensorboard=board), **settings)
    run.train(resume_from_checkpoint=True)
    return read_log(path)


def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(tmp_path):
    resumed = interrupted(tmp_path / "resumed")
    whole = trainer(tmp_path / "whole", SpectralMetricsCallback(3), save_strategy="steps", save_steps=4)
    whole.train()
    pd.testing.assert_frame_equal(resumed, read_log(tmp_path / "whole"), rtol=1e-12)
    events = events_of(tmp_path / "resumed")
    assert [event.step for event in events.Scalars("spectral_norm/self_attn.q_proj/layer_00")] == [0, 3, 6, 8]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]


def test_a_run_resumed_in_the_same_process_waits_for_the_rows_that_a_broken_one_left_behind(tmp_path, monkeypatch):
    real = module.analyze
    monkeypatch.setattr(module, "analyze", lambda *a, **k: (time.sleep(0.5), real(*a, **k))[1])
    settings = dict(max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="the power went"):
        trainer(tmp_path, Crash(2), SpectralMetricsCallback(2), **settings).train()
    trainer(tmp_path, SpectralMetricsCallback(2), **settings).train(resume_from_checkpoint=True)
    assert len(read_log(tmp_path)) == 3 * 14  # steps 0, 2, 3


def test_a_run_that_starts_over_starts_its_log_over(tmp_path):
    for _ in range(2):
        trainer(tmp_path, SpectralMetricsCallback(5), max_steps=2).train()
    assert len(read_log(tmp_path)) == 2 * 14
    events = events_of(tmp_path)
    assert [event.step for event in events.Scalars("spectral_norm/self_attn.q_proj/layer_00")] == [0, 2]


def test_no_checkpoint_is_written_before_the_rows_of_its_steps(tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.3)
        return real(*args, **kwargs)

    real, seen = module.analyze, {}
    monkeypatch.setattr(module, "analyze", slow)
    run = trainer(tmp_path, SpectralMetricsCallback(1), max_steps=2, save_strategy="steps", save_steps=1)
    save = run._save_checkpoint
    run._save_checkpoint = lambda *a, **k: (
        seen.update({run.state.global_step: max(read_log(tmp_path)["step"])}),
        save(*a, **k),
    )
    run.train()
    assert seen == {1: 1, 2: 2}


def test_an_exception_in_training_loses_no_log_that_was_taken(tmp_path, monkeypatch):
    real = module.analyze
    monkeypatch.setattr(module, "analyze", lambda *a, **k: (time.sleep(0.3), real(*a, **k))[1])
    callback = SpectralMetricsCallback(3)
    with pytest.raises(RuntimeError, match="the power went"):
        trainer(tmp_path, callback, Crash(3)).train()
    callback._join()  # as the interpreter does at exit
    assert sorted(read_log(tmp_path)["step"].unique()) == [0, 3]


def test_a_run_stopped_early_logs_its_last_weights(tmp_path):
    trainer(tmp_path, SpectralMetricsCallback(3), StopAt(4)).train()
    log = read_log(tmp_path)
    assert sorted(log["step"].unique()) == [0, 3, 4]
    assert log[log["step"] == 4]["update_spectral_norm"].isna().all()


def test_weights_are_copied_only_while_a_log_is_taken(tmp_path):
    held = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held[state.global_step] = bool(callback._before)

        def on_optimizer_step(self, args, state, control, **kwargs):
            held[f"in {state.global_step + 1}"] = bool(callback._before)

    callback = SpectralMetricsCallback(3)
    trainer(tmp_path, Watch(), callback, max_steps=4).train()
    assert held == {
        "in 1": False,
        1: False,
        "in 2": False,
        2: False,
        "in 3": True,
        3: False,
        "in 4": True,
        4: False,
    }


def test_nan_weights_are_null_with_a_reason_and_training_goes_on(tmp_path):
    model = dense()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    trainer(tmp_path, SpectralMetricsCallback(), model=model, max_steps=1).train()
    log = read_log(tmp_path)
    bad = log[(log["step"] == 0) & (log["layer"] == 1) & (log["projection"] == "up_proj")].iloc[0]
    assert pd.isna(bad["spectral_norm"]) and bad["singular_values"] is None
    assert "NaN or infinite" in bad["reason"]
    assert log[log["step"] == 0]["spectral_norm"].notna().sum() == 13


def test_an_error_in_the_worker_is_not_swallowed(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "analyze", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        trainer(tmp_path, SpectralMetricsCallback(), max_steps=2).train()


def test_only_chosen_metrics_layers_and_projections_are_logged(tmp_path):
    callback = SpectralMetricsCallback(metrics=["spectral_norm"], layers=[1], projections=["q_proj", "up_proj"])
    trainer(tmp_path, callback, max_steps=1).train()
    log = read_log(tmp_path)
    assert set(log["layer"]) == {1} and set(log["projection"]) == {"q_proj", "up_proj"}
    assert log["spectral_norm"].notna().all()
    assert log["stable_rank"].isna().all() and log["update_alignment"].isna().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["spectral_nrom"]}, "unknown metric 'spectral_nrom'; there are condition_number, "),
        ({"layers": [7]}, "unknown layer 7; there are 0, 1"),
        ({"projections": ["qkv"]}, "unknown projection 'qkv'; there are down_proj, "),
        ({"every_n_steps": 0}, "every_n_steps=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(tmp_path, settings, message):
    observer = Observer()
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, SpectralMetricsCallback(**settings), observer).train()
    assert not observer.weights and not (tmp_path / "spectral_log").exists()


def test_a_model_without_matrices_is_refused(tmp_path):
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

    with pytest.raises(UsageError, match="no matrices to track"):
        trainer(tmp_path, SpectralMetricsCallback(), model=Scale()).train()


def test_embeddings_and_convolutions_are_no_matrices():
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(5, 4), "conv": torch.nn.Conv1d(2, 3, 2), "linear": torch.nn.Linear(4, 3)}
    )
    assert [one.name for one in tracked_matrices(model)] == ["linear.weight"]


def test_stacked_biases_of_experts_are_no_matrices():
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3))
    assert model.model.layers[0].mlp.experts.gate_up_proj_bias.ndim == 2
    assert not any("bias" in one.name for one in tracked_matrices(model))


def test_default_schedule_is_dense_at_first_and_even_later():
    assert sorted(log_schedule(400, 10)) == [0, 1, 4, 16, *range(40, 401, 40)]
    assert sorted(log_schedule(3, 10)) == [0, 1, 2, 3]


def events_of(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path / "runs"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def test_tensorboard_holds_scalars_histograms_heatmaps_and_chart_layout_in_one_file(moe_run):
    path = moe_run[0]
    assert len(list((path / "runs").rglob("events.out.tfevents.*"))) == 1
    events, log = events_of(path), read_log(path)
    norms = [event.value for event in events.Scalars("spectral_norm/mlp.down_proj/layer_01")]
    down = log[(log["projection"] == "down_proj") & (log["layer"] == 1)]
    assert norms == pytest.approx(down.groupby("step")["spectral_norm"].mean().tolist())  # experts averaged
    assert [event.step for event in events.Histograms("singular_values/self_attn.q_proj/layer_01")] == [0, 3, 6, 8]
    assert [event.step for event in events.Images("heatmap/spectral_norm")] == [3, 6, 8]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_evaluations_and_hparams_after_training_land_in_the_same_file(moe_run):
    path, _, run, board = moe_run
    run.log({"eval_loss": 3.25})
    board.add_hparams({"optimizer": "muon", "lr": 0.02}, ["eval/loss"])
    assert len(list((path / "runs").rglob("events.out.tfevents.*"))) == 1
    events = events_of(path)
    assert events.Scalars("eval/loss")[-1].value == 3.25
    assert not any("eval_loss" in tag for tag in events.Tags()["scalars"])  # the same twice, under another name
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_router_metrics_count_what_the_routers_chose(tmp_path):
    class Chosen(TrainerCallback):
        """Counts by itself, from the indices that the routers return."""

        def __init__(self):
            self.counts = torch.zeros(2, 3)

        def on_train_begin(self, args, state, control, model, **kwargs):
            for i, layer in enumerate(model.model.layers):
                layer.mlp.gate.register_forward_hook(lambda m, x, out, i=i: self.count(i, out[2]))

        def count(self, layer, experts):
            self.counts[layer] += torch.bincount(experts.flatten(), minlength=3)

    board, oracle = TensorBoardCallback(), Chosen()
    callback = RouterMetricsCallback(board)
    trainer(tmp_path, board, callback, oracle, model=mixture(), max_steps=4, logging_steps=4).train()
    for layer, counts in enumerate(oracle.counts):
        numbers = callback.latest[layer]
        assert numbers["tokens_per_expert"] == pytest.approx((counts / counts.sum()).tolist())
        assert numbers["load_imbalance"] == pytest.approx((counts.max() / counts.mean()).item())
        assert numbers["dead_experts"] == 0 and 0.9 < numbers["router_entropy"] <= 1  # nearly untrained
    events = events_of(tmp_path)
    assert events.Scalars("load_imbalance/layer_01")[0].value == pytest.approx(callback.latest[1]["load_imbalance"])
    assert [event.step for event in events.Images("router/load")] == [4]


def test_undecided_routers_have_entropy_one_and_leave_one_expert_dead(tmp_path):
    model = mixture()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # every logit is equal; top-k takes the same two of three
    callback = RouterMetricsCallback()
    trainer(tmp_path, callback, model=model, max_steps=1, logging_steps=1).train()
    for numbers in callback.latest.values():
        assert (numbers["router_entropy"], numbers["load_imbalance"]) == pytest.approx((1, 1.5))
        assert numbers["dead_experts"] == 1


def test_a_model_without_routers_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no routers to watch"):
        trainer(tmp_path, RouterMetricsCallback()).train()


def test_step_times_cover_the_optimizer_and_tokens_per_second_count_all_tokens(tmp_path):
    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            time.sleep(0.02)
            return super().step(closure)

    model, board = dense(), TensorBoardCallback()
    callback = StepTimeCallback(board)
    run = trainer(
        tmp_path, board, callback, model=model, max_steps=3, logging_steps=3, include_num_input_tokens_seen=True
    )
    run.optimizer = Slow(model.parameters(), lr=1e-3)
    run.train()
    numbers = callback.summary()
    assert 20 <= numbers["optimizer_step_ms"] <= numbers["step_ms"]
    assert numbers["tokens_per_second"] == pytest.approx(3 * 2 * 8 / sum(step["step"] for step in callback._steps))
    assert events_of(tmp_path).Scalars("time/optimizer_step_ms")[0].value == pytest.approx(
        numbers["optimizer_step_ms"]
    )


def test_heatmap_paints_low_dark_high_bright_and_missing_grey():
    image = heatmap("title", {"a": np.array([[0.0, 1.0]]), "b": np.array([[np.nan, 0.0]])}, [0, 7])
    row_a, row_b = 64 + 12, 64 + 24 + 4 + 12  # middles of the two blocks below the title
    left, right = 200 + 110, 200 + 330  # middles of the two columns
    assert image[row_a, left].tolist() == image[row_b, right].tolist() == [68, 1, 84]
    assert image[row_a, right].tolist() == [253, 231, 37]
    assert image[row_b, left].tolist() == [220, 220, 220]


def test_other_ranks_keep_no_copies_and_write_nothing(tmp_path):
    """Rank 1 of a data-parallel run: the callback is called as on rank 0, by a state that says so."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    callback, model, state = (
        SpectralMetricsCallback(1),
        dense(),
        TrainerState(is_world_process_zero=False, max_steps=2),
    )
    control = TrainerControl(should_save=True)
    callback.on_train_begin(args, state, control, model=model)
    for state.global_step in range(2):
        callback.on_step_begin(args, state, control)
        callback.on_pre_optimizer_step(args, state, control)
        assert not callback._before
        callback.on_optimizer_step(args, state, control)
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)
    assert list(tmp_path.iterdir()) == []
