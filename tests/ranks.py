"""Processes that work together through gloo, for tests. They report in files: those with DTensors sometimes abort as
they exit, so exit codes tell nothing of their results."""

import faulthandler
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

PATIENCE = 480  # seconds; what takes 20 alone took 80 beside three others on two cores

Work = Callable[[int, Path], Any]


def run_ranks(work: Work, ranks: int, folder: Path) -> list[Any]:
    """`[work(rank, folder) for rank in range(ranks)]`, each in a process of one gloo group.

    Where a signal ended one of them before it had a result (torch's gloo aborts now and then), all try once more in
    the folder as it was, with a warning that shows where they were.
    """
    before = set(folder.iterdir())
    reports, codes = _try(work, ranks, folder)
    if any(code is not None and code < 0 for code in codes) and _missing(ranks, reports):
        warnings.warn(f"tried again: {_account(codes, reports)}", stacklevel=2)
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        reports, codes = _try(work, ranks, folder)
    if _missing(ranks, reports):
        raise RuntimeError(_account(codes, reports))
    return [torch.load(_result(reports, rank), weights_only=False) for rank in range(ranks)]


def _try(work: Work, ranks: int, folder: Path) -> tuple[Path, list[int | None]]:
    """Where the ranks reported, and their exit codes: None for those that had to be killed for taking too long."""
    reports = Path(tempfile.mkdtemp(prefix="reports-", dir=folder))
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(work, rank, ranks, folder, reports)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return reports, codes


def _run(work: Work, rank: int, ranks: int, folder: Path, reports: Path) -> None:
    faults = open(reports / f"fault-{rank}.txt", "w")  # noqa: SIM115 - as long as the process lives
    faulthandler.enable(faults)
    faulthandler.dump_traceback_later(PATIENCE - 20, file=faults)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    try:
        dist.init_process_group("gloo", init_method=f"file://{reports}/store", rank=rank, world_size=ranks,
                                timeout=timedelta(seconds=PATIENCE))  # fmt: skip
        result = work(rank, folder)
    except BaseException:
        (reports / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(result, reports / f".result-{rank}.pt")
    (reports / f".result-{rank}.pt").rename(_result(reports, rank))
    dist.barrier()
    dist.destroy_process_group()


def _result(reports: Path, rank: int) -> Path:
    return reports / f"result-{rank}.pt"


def _missing(ranks: int, reports: Path) -> list[int]:
    return [rank for rank in range(ranks) if not _result(reports, rank).is_file()]


def _account(codes: list[int | None], reports: Path) -> str:
    """What is known of ranks that gave no results."""
    texts = {path.name: path.read_text() for kind in ("error", "fault") for path in sorted(reports.glob(f"{kind}-*"))}
    told = [f"{name}:\n{text}" for name, text in texts.items() if text]
    missing = _missing(len(codes), reports)
    return "\n".join([f"no result of ranks {missing}; exit codes {codes}, None: killed after {PATIENCE} s", *told])
