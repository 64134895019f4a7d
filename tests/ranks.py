"""Processes that work together through gloo, for tests. They report in files: those with DTensors sometimes abort as
they exit, so exit codes tell nothing."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PATIENCE = 240  # seconds


def run_ranks(work: Callable[[int, Path], Any], ranks: int, folder: Path) -> list[Any]:
    """`[work(rank, folder) for rank in range(ranks)]`, each in a process of one gloo group."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(work, rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    return [_result(folder, rank) for rank in range(ranks)]


def _run(work: Callable[[int, Path], Any], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    store = f"file://{folder}/store-{ranks}"
    try:
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE)
        )
        result = work(rank, folder)
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(result, folder / f".result-{rank}.pt")
    (folder / f".result-{rank}.pt").rename(folder / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result-{rank}.pt"
    if not path.is_file():
        errors = "\n".join(one.read_text() for one in sorted(folder.glob("error-*.txt")))
        raise RuntimeError(f"rank {rank} gave no result\n{errors}")
    return torch.load(path, weights_only=False)
