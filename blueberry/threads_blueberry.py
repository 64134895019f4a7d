"""How many threads torch computes with, and work spread over the threads of a CPU.

Where an operation hardly uses a second thread (an eigensolver), or many small ones end by waiting for the slower of
two, workers with one thread each finish more. The file ships to the Hub as remote code, so it imports torch only.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ENOUGH = 15_000_000  # multiplications, a tenth of a millisecond in bf16; a quarter of it was measured to be slower
_Piece = TypeVar("_Piece")


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """So many BLAS threads for the calling thread; others, such as a training loop's, keep theirs.

    torch keeps the setting per thread; threads started meanwhile inherit it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_blas_thread() -> AbstractContextManager[None]:
    """A symmetric eigensolver hardly uses a second thread, and on busy cores the barriers between two can cost many
    times the work (0.3 s of it took 9 to 21 s)."""
    return blas_threads(1)


@cache
def idle_threads_sleep() -> bool:
    """Whether OpenMP's threads sleep within a millisecond of an operation's end, and leave their cores to workers.

    By default GNU's spin for about ten: too long for workers that have less than a hundred to do. `import blueberry`
    asks for less if it comes before torch.
    """
    spins = os.environ.get("GOMP_SPINCOUNT", "")
    return spins.isdigit() and int(spins) <= 30_000


def workers_pay(multiplications: int) -> bool:
    """Whether short work is faster on workers: OpenMP's idle threads leave the cores to them, and the products of
    each piece have so many multiplications that Python, which runs on one thread at a time, hardly counts."""
    return idle_threads_sleep() and multiplications >= ENOUGH


def run_on_workers(work: Callable[[_Piece], None], pieces: Sequence[_Piece], threads_each: int = 1) -> None:
    """Do the work on each piece, without gradients, on as many workers as torch's threads suffice for, each with
    `threads_each`; on the calling thread if that is one worker.

    Raises what a worker raised, after all have ended. Profilers and dispatch modes (such as torch's counter of
    operations) see the calling thread alone, so under one it does all, with all threads.
    """
    threads = torch.get_num_threads()
    workers = min(threads // threads_each, len(pieces))
    watched = is_in_torch_dispatch_mode() or torch.autograd._profiler_enabled()
    if workers < 2 or watched:
        with torch.no_grad(), blas_threads(threads if watched else threads_each):
            for piece in pieces:
                work(piece)
        return
    work = _in_mode_of_caller(work)
    jobs = [_pool(os.getpid(), workers, threads_each).submit(work, piece) for piece in pieces]
    wait(jobs)
    for job in jobs:
        job.result()


def _in_mode_of_caller(work: Callable[[_Piece], None]) -> Callable[[_Piece], None]:
    """Without gradients, and in inference mode if the caller is: torch keeps both per thread."""
    inference = torch.is_inference_mode_enabled()

    def work_in_mode(piece: _Piece) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(piece)

    return work_in_mode


@cache
def _pool(process: int, workers: int, threads_each: int) -> ThreadPoolExecutor:
    """Workers that stay, for a process: one that is forked has none of its parent's threads."""
    pool, ready = ThreadPoolExecutor(workers, "blueberry", torch.get_num_threads), Barrier(workers)
    with blas_threads(threads_each):
        wait([pool.submit(ready.wait) for _ in range(workers)])
    return pool
