"""Spectral logs of two processes: data parallel and sharded. Every rank takes part where it must, rank 0 writes."""

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from test_callbacks import DATA, mixture, read_log
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from blueberry.threads_blueberry import one_blas_thread
from trainer_callbacks import SpectralMetricsCallback

RANKS, STEPS = 2, 6


def arguments(path: Path, ranks: int) -> TrainingArguments:
    return TrainingArguments(str(path), max_steps=STEPS, per_device_train_batch_size=4 // ranks, learning_rate=1e-2,
                             report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
                             logging_strategy="no", ddp_backend="gloo" if ranks > 1 else None)  # fmt: skip


def by_trainer(path: Path, ranks: int) -> None:
    """transformers' Trainer, which wraps the model into DDP where there are several ranks; batches of four in all."""
    args = arguments(path, ranks)
    assert args.world_size == ranks
    Trainer(mixture(), args, train_dataset=DATA, callbacks=[SpectralMetricsCallback(2)]).train()


def by_hand(path: Path, rank: int, callback: SpectralMetricsCallback, sharded: bool) -> None:
    """The same steps with or without `fully_shard`: both ranks see the same batches."""
    model = mixture()
    if sharded:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainerState(is_world_process_zero=rank == 0, max_steps=STEPS)
    args, control = TrainingArguments(str(path), report_to="none", use_cpu=True), TrainerControl()
    callback.on_train_begin(args, state, control, model=model)
    for step in range(STEPS):
        callback.on_step_begin(args, state, control)
        ids = torch.stack([DATA[2 * step + i]["input_ids"] for i in range(2)])
        model(input_ids=ids, labels=ids).loss.backward()
        callback.on_pre_optimizer_step(args, state, control, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(args, state, control, optimizer=optimizer)
        optimizer.zero_grad()
        state.global_step += 1
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)


def work(rank: int, folder: str) -> None:
    """One of the two processes: every kind of run, each into folders of its own rank."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
                   "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    store, patience = f"file://{folder}/store", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=patience)
    by_trainer(Path(folder) / "ddp" / str(rank), RANKS)
    by_hand(Path(folder) / "sharded" / str(rank), rank, SpectralMetricsCallback(2), sharded=True)
    # a budget that only rank 0 knows to be spent: the others must follow its decision, or wait for it for ever
    tight = SpectralMetricsCallback(1, max_overhead=1e-9)
    by_hand(Path(folder) / "budget" / str(rank), rank, tight, sharded=True)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "sharded", "budget"])
def test_rank_0_alone_writes(runs, kind):
    assert (runs / kind / "0" / "spectral_log").is_dir() and (runs / kind / "0" / "runs").is_dir()
    assert not any((runs / kind / "1").rglob("part-*")) and not any((runs / kind / "1").rglob("events.*"))


def test_a_sharded_model_logs_what_an_unsharded_one_does(runs, tmp_path):
    with one_blas_thread():  # as the ranks: the sums of two threads differ in the last bit, alignments by more
        by_hand(tmp_path, 0, SpectralMetricsCallback(2), sharded=False)
    peaks = ["weight_norm_peak", "gradient_norm_peak"]  # of sharded parameters there are none
    sharded = read_log(runs / "sharded" / "0")
    assert sorted(sharded["step"].unique()) == [0, 2, 4, 6] and sharded[peaks].isna().all(axis=None)
    pd.testing.assert_frame_equal(
        sharded.drop(columns=peaks), read_log(tmp_path).drop(columns=peaks), rtol=1e-3, atol=1e-5
    )


def test_data_parallel_processes_log_what_one_does_with_the_batches_of_both(runs, tmp_path):
    by_trainer(tmp_path, 1)
    one, two = read_log(tmp_path), read_log(runs / "ddp" / "0")
    assert sorted(two["step"].unique()) == [0, 2, 4, 6]
    for metric in ("spectral_norm", "stable_rank", "update_spectral_norm", "gradient_norm_peak"):
        # AdamW divides by the size of gradients, whose rounding differs between a sum of two means and one mean
        np.testing.assert_allclose(two[metric].astype(float), one[metric].astype(float), rtol=1e-2, err_msg=metric)


def test_ranks_follow_the_budget_of_rank_0(runs):
    assert sorted(read_log(runs / "budget" / "0")["step"].unique()) == [0, 1, STEPS]
