"""What SpectralMetricsCallback tracks, when, at what cost, and where the numbers go."""

import errno
import re
import time
from itertools import pairwise

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from test_callbacks import Observer, StopAt, dense, mixture, read_log, trainer
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from blueberry.errors import UsageError
from blueberry.spectral import SpectralLog, spectral_metrics
from blueberry.spectral.tracked import tracked_matrices
from trainer_callbacks import SpectralMetricsCallback, TensorBoardCallback
from trainer_callbacks import spectral_metrics as module
from trainer_callbacks.cadence import Budget, Milestones, TimedExecutor


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=1,
                                      eos_token_id=1))  # fmt: skip


def matrices(model, modules=None) -> dict[str, torch.Tensor]:
    return {n: x for one in tracked_matrices(model, modules) for n, x in one.parts(one.read().detach()).items()}


def test_fused_and_transposed_projections_are_tracked_as_the_matrices_they_hold():
    model = gpt2()
    found, attention = matrices(model), model.transformer.h[1].attn
    query, key, value = attention.c_attn.weight.T.chunk(3)  # Conv1D stores (in, out)
    for label, expected in (("q", query), ("k", key), ("v", value)):
        torch.testing.assert_close(found[f"transformer.h.1.attn.c_attn.{label}"], expected)
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (64, 16)
    assert len(found) == 2 * 6


def test_experts_are_cut_into_gate_and_up():
    model = mixture()
    gate, up = model.model.layers[0].mlp.experts.gate_up_proj.chunk(2, dim=1)
    found = matrices(model)
    torch.testing.assert_close(found["model.layers.0.mlp.experts.gate_up_proj.gate"], gate)
    torch.testing.assert_close(found["model.layers.0.mlp.experts.gate_up_proj.up"], up)


def test_of_lora_adapters_the_product_is_tracked_and_frozen_weights_are_not():
    model = get_peft_model(dense(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = matrices(model)
    assert len(found) == 4
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    product = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r = 3
    torch.testing.assert_close(found["base_model.model.model.layers.1.self_attn.q_proj.lora"], product)


def test_lora_of_stacked_experts_is_one_product_for_each_expert():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    found = matrices(get_peft_model(mixture(), config))
    assert {tuple(x.shape) for x in found.values()} == {(3, 16, 12)}


def test_a_lora_run_logs_products_and_their_updates(tmp_path):
    model = get_peft_model(dense(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer(tmp_path, SpectralMetricsCallback(1), model=model, max_steps=2).train()
    log = read_log(tmp_path)
    assert set(log["projection"]) == {"q_proj.lora"}
    first = log[log["step"] == 0]
    assert (first["spectral_norm"] == 0).all()  # B starts at zero
    assert (log[log["step"] == 2]["update_spectral_norm"] > 0).all()
    assert log["gradient_norm_peak"].isna().all()


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([torch.nn.Embedding], {"embed_tokens"}),
        ([r"layers\.1\..*(q|k)_proj"], {"q_proj", "k_proj"}),
        ([torch.nn.Embedding, "lm_head"], {"embed_tokens", "lm_head"}),
    ],
)
def test_modules_are_chosen_by_name_and_by_type(tmp_path, modules, expected):
    trainer(tmp_path, SpectralMetricsCallback(modules=modules, metrics=["spectral_norm"]), max_steps=1).train()
    assert set(read_log(tmp_path)["projection"]) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": ["q_porj"]}, "modules: 'q_porj' matches no matrix of the model; a name looks like 'model."),
        ({"modules": [torch.nn.Conv1d]}, "modules: Conv1d matches no matrix"),
        ({"layers": [0], "modules": [r"layers\.1\."]}, "unknown layer 0"),
        ({"max_overhead": 0}, "max_overhead=0: must be above 0"),
        ({"token_milestones": [10]}, "token_milestones need include_num_input_tokens_seen=True"),
        ({"token_milestones": [0]}, "token_milestones=0: must be at least 1"),
        ({"token_milestones": [10], "every_n_steps": 2}, "exclude each other"),
    ],
)
def test_wrong_choices_are_one_line_before_the_first_step(tmp_path, settings, message):
    observer = Observer()
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, SpectralMetricsCallback(**settings), observer).train()
    assert not observer.weights


def test_token_milestones_are_logged_by_the_step_that_reaches_them(tmp_path):
    callback = SpectralMetricsCallback(token_milestones=[40, 16, 41, 90], metrics=["spectral_norm"])
    trainer(tmp_path, callback, include_num_input_tokens_seen=True).train()  # 2 x 8 tokens a step, 8 steps
    log = read_log(tmp_path)
    assert sorted(set(zip(log["step"], log["tokens"], strict=True))) == [(0, 0), (1, 16), (3, 48), (6, 96), (8, 128)]


def test_each_milestone_counts_once():
    milestones = Milestones([10, 12, 30])
    assert [milestones.reached(tokens) for tokens in (5, 15, 20, 30, 100)] == [False, True, False, True, False]


def test_a_budget_spends_a_quarter_ahead_and_never_more_than_its_share():
    budget, logged = Budget(0.1, max_steps=1000), []
    for step in range(1, 1001):
        budget.count_step(1.0)
        if budget.affords(2.0):
            budget.spent += 2.0
            logged.append(step)
    assert budget.spent <= 0.1 * 1000 and len(logged) >= 0.9 * 0.1 * 1000 / 2  # the last log is kept in reserve
    assert logged[:11] == list(range(1, 12))  # 25 s ahead of time: 12 logs, less the reserve
    gaps = [b - a for a, b in pairwise(logged[12:])]
    assert max(gaps) - min(gaps) <= 1  # evenly from then on


def test_a_budget_knows_nothing_before_the_first_cost_and_has_no_limit_without_a_share():
    budget = Budget(0.5, 10)
    budget.count_step(1.0)
    assert not budget.affords(None)
    assert Budget(None, 10).affords(None)


def test_a_step_is_shortened_by_what_its_own_thread_did_for_tracking_alone():
    budget = Budget(0.1, 10)
    with budget.charged():
        time.sleep(0.01)
    budget.charge(5.0)  # a worker, meanwhile
    assert 0.01 <= budget.spent_in_training < 1 and budget.spent == 5 + budget.spent_in_training


def test_one_slow_first_step_does_not_raise_the_budget():
    budget = Budget(0.02, 1000)
    for seconds in (60.0, 0.1, 0.1):
        budget.count_step(seconds)
    assert not budget.affords(1.0)


def test_worker_threads_count_their_cpu_seconds_and_not_their_sleep():
    def work(_):
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        time.sleep(0.2)

    with TimedExecutor(2) as pool:
        list(pool.map(work, range(4)))
    assert 0.2 <= pool.cpu_seconds < 0.4


def test_logs_that_do_not_fit_the_budget_are_left_out_and_the_summary_says_so(tmp_path):
    callback = SpectralMetricsCallback(every_n_steps=1, max_overhead=1e-6)
    trainer(tmp_path, callback).train()
    assert sorted(set(read_log(tmp_path)["step"])) == [0, 1, 8]  # initial weights, first and last step
    assert "6 logs were left out to keep to max_overhead=1e-06" in callback.summary()


def test_without_a_budget_a_cadence_is_kept_whatever_it_costs(tmp_path):
    trainer(tmp_path, SpectralMetricsCallback(every_n_steps=1)).train()
    assert sorted(set(read_log(tmp_path)["step"])) == list(range(9))


def test_peaks_are_the_largest_norms_since_the_last_log(tmp_path):
    class Norms(TrainerCallback):
        """Norms of one matrix before each step, by the plain definition."""

        def __init__(self):
            self.weight, self.gradient = [], []

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            matrix = model.model.layers[1].mlp.experts.gate_up_proj
            self.weight.append(matrix[2, :12].norm().item())
            self.gradient.append(matrix.grad[2, :12].norm().item())

    norms = Norms()
    trainer(tmp_path, norms, SpectralMetricsCallback(4), model=mixture()).train()
    log = read_log(tmp_path)
    rows = log[(log["projection"] == "gate_up_proj.gate") & (log["layer"] == 1) & (log["expert"] == 2)]
    rows = rows.set_index("step")
    for step in (4, 8):
        since = slice(step - 4, step)
        row = rows.loc[step]
        assert row["gradient_norm_peak"] == pytest.approx(max(norms.gradient[since]), rel=1e-6)
        assert row["weight_norm_peak"] == pytest.approx(max(*norms.weight[since], row["frobenius_norm"]), rel=1e-6)
    assert pd.isna(rows.loc[0]["gradient_norm_peak"])


def test_scalars_reach_report_to_through_trainer_log_under_their_own_step(tmp_path):
    callback = SpectralMetricsCallback(3)
    run = trainer(tmp_path, callback)
    callback.log_through(run)
    run.train()
    logged = [row for row in run.state.log_history if "spectral_norm/self_attn.q_proj/layer_00" in row]
    assert [row["step"] for row in logged] == [0, 3, 6, 8]
    log = read_log(tmp_path)
    rows = log[(log["projection"] == "q_proj") & (log["layer"] == 0)].set_index("step")["spectral_norm"]
    for row in logged:
        assert row["spectral_norm/self_attn.q_proj/layer_00"] == pytest.approx(rows[row["step"]])
    assert run.state.global_step == 8


def test_metrics_left_out_are_in_no_reason(tmp_path):
    trainer(tmp_path, SpectralMetricsCallback(metrics=["spectral_norm"], k=5), model=mixture(), max_steps=1).train()
    assert read_log(tmp_path)["reason"].isna().all()  # the routers, 3 x 16, have no top-5 subspace


def test_weights_alone_are_not_copied_twice(tmp_path, monkeypatch):
    updates = []
    real = module.analyze
    monkeypatch.setattr(module, "analyze", lambda w, u, **k: (updates.append(u), real(w, u, **k))[1])
    trainer(tmp_path, SpectralMetricsCallback(1, metrics=["stable_rank"]), max_steps=2).train()
    assert updates == [None, None, None]


def test_a_tail_exponent_is_logged_where_it_is_asked_for(tmp_path):
    trainer(tmp_path, SpectralMetricsCallback(metrics=["power_law_exponent"]), max_steps=1).train()
    log = read_log(tmp_path)
    assert log["power_law_exponent"].notna().any() and log["spectral_norm"].isna().all()


def test_exact_mode_gives_the_same_rows(tmp_path):
    for name, exact in (("fast", False), ("exact", True)):
        trainer(tmp_path / name, SpectralMetricsCallback(2, exact=exact), max_steps=2).train()
    pd.testing.assert_frame_equal(read_log(tmp_path / "fast"), read_log(tmp_path / "exact"), rtol=1e-3)


def test_a_full_disk_costs_tensorboard_and_the_log_and_not_the_training(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(EventFileWriter, "add_event", full)
                monkeypatch.setattr(pq, "write_table", full)

    board = TensorBoardCallback()
    callback = SpectralMetricsCallback(1, tensorboard=board)
    run = trainer(tmp_path, board, callback, Fill(), logging_steps=1)
    run.train()
    board.close()
    assert run.state.global_step == 8
    assert sorted(set(read_log(tmp_path)["step"])) in ([0, 1], [0, 1, 2])  # the worker was ahead of the disk or not
    summary = callback.summary()
    assert "TensorBoard stopped: could not write: [Errno 28]" in summary
    assert re.search(r"could not write step [23], step [34], step [45] and [45] more: \[Errno 28\]", summary)
    assert caplog.text.count("TensorBoard stopped") == 2  # when it happened, and at the end
    assert not list((tmp_path / "spectral_log").glob(".part*"))  # nothing half written keeps the disk full


def test_nulls_that_are_true_by_definition_are_in_the_log_and_no_warning(tmp_path, caplog):
    """Routers of 3 x 16 have no top-5 subspace; in the first step of a warm-up the weights stand still."""
    callback = SpectralMetricsCallback(1, k=5)
    trainer(tmp_path, callback, model=mixture(), max_steps=3, warmup_steps=2).train()
    log = read_log(tmp_path)
    first = log[log["step"] == 1]
    assert first["reason"].str.contains("of the update, all entries are zero").all()
    assert log[log["step"] == 3]["reason"].str.contains("k is not below the rank").any()
    assert "null" not in callback.summary() and "spectral log" not in caplog.text


def test_weights_that_an_optimizer_leaves_alone_are_a_warning(tmp_path, caplog):
    model = dense()
    run = trainer(tmp_path, SpectralMetricsCallback(1), model=model, max_steps=1)
    run.optimizer = torch.optim.SGD([model.model.layers[0].mlp.up_proj.weight], lr=0.1)
    run.train()
    assert "13 rows have null update_alignment" in caplog.text


def test_the_summary_counts_nulls_by_reason(tmp_path):
    model = dense()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    callback = SpectralMetricsCallback(metrics=["spectral_norm"])
    trainer(tmp_path, callback, model=model, max_steps=1, max_grad_norm=0).train()
    assert "rows have null spectral_norm: entries are NaN or infinite" in callback.summary()


def test_stopping_early_logs_the_last_weights_once(tmp_path):
    trainer(tmp_path, SpectralMetricsCallback(), StopAt(4)).train()
    assert read_log(tmp_path)["step"].value_counts()[4] == 14


def test_a_log_of_version_1_is_read_with_nulls_and_rewritten_when_truncated(tmp_path):
    log = SpectralLog(tmp_path)
    log.append([{"step": step, "parameter": "w", "spectral_norm": 2.0} for step in (0, 5)])
    (part,) = log.parts()
    table = pq.ParquetFile(part).read().drop_columns(["weight_norm_peak", "gradient_norm_peak", "power_law_exponent"])
    pq.write_table(table.replace_schema_metadata({"spectral_log_version": "1"}), part)
    frame = log.read()
    assert list(frame["spectral_norm"]) == [2, 2] and frame["weight_norm_peak"].isna().all()
    log.truncate(after_step=9)
    log.append([{"step": 9, "parameter": "w", "weight_norm_peak": 1.0}])
    assert pd.read_parquet(tmp_path)["weight_norm_peak"].notna().sum() == 1  # parts of one schema


def test_spectra_of_a_stack_are_those_of_its_experts(tmp_path):
    model = mixture()
    expected = spectral_metrics(model.model.layers[0].mlp.experts.down_proj[1])
    trainer(tmp_path, SpectralMetricsCallback(), model=model, max_steps=1).train()
    log = read_log(tmp_path)
    row = log[(log["step"] == 0) & (log["projection"] == "down_proj") & (log["expert"] == 1) & (log["layer"] == 0)]
    assert row["stable_rank"].item() == pytest.approx(expected["stable_rank"])
