"""How many threads torch computes with, and work spread over the threads of a CPU.

Where an operation hardly uses a second thread (an eigensolver), or many small ones end by waiting for the slower of
two, workers with one thread each finish more. The file ships to the Hub as remote code, so it imports torch and its
sibling only.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from threading import Barrier, main_thread
from typing import TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .products_blueberry import without_autocast

# Multiplications of a product that takes a tenth of a millisecond in bf16. With a quarter of them workers took longer
# than the calling thread, with four times as many less (two cores, `tiny` with 4 x 64 and 16 x 256 tokens).
ENOUGH = 15_000_000
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
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return True
    spins = os.environ.get("GOMP_SPINCOUNT", "").strip()
    return sys.platform == "linux" and spins.isdecimal() and int(spins) <= 30_000


def workers_pay(multiplications: int) -> bool:
    """Whether short work is faster on workers: OpenMP's idle threads leave the cores to them, and the products of
    each piece have so many multiplications that Python, which runs on one thread at a time, hardly counts."""
    return idle_threads_sleep() and multiplications >= ENOUGH


def run_on_workers(work: Callable[[_Piece], None], pieces: Sequence[_Piece], threads_each: int = 1) -> None:
    """Do the work on each piece, without gradients and autocast, on as many workers as torch's threads suffice for.

    Each has `threads_each` BLAS threads: with all of torch's, the calling thread does one piece after the other. So it
    does with all threads under what sees the calling thread alone: profilers and dispatch modes, such as torch's
    counter of operations. Raises the first error, after what was begun has ended; what was not is left out.
    """
    threads = torch.get_num_threads()
    watched = is_in_torch_dispatch_mode() or torch.autograd._profiler_enabled()
    ending = not main_thread().is_alive()  # when no worker may start any more
    if watched or ending or min(threads // threads_each, len(pieces)) < 2:
        with torch.no_grad(), without_autocast("cpu"), blas_threads(threads if watched else threads_each):
            for piece in pieces:
                work(piece)
    else:
        _run_all(_pool(os.getpid(), threads // threads_each, threads_each), _in_mode_of_caller(work), pieces)


def _run_all(pool: ThreadPoolExecutor, work: Callable[[_Piece], None], pieces: Sequence[_Piece]) -> None:
    jobs: list[Future] = []
    try:
        for piece in pieces:
            try:
                jobs.append(pool.submit(work, piece))
            except RuntimeError:  # the main thread has ended meanwhile
                work(piece)
        wait(jobs, return_when=FIRST_EXCEPTION)
    finally:  # also when interrupted: the caller must find nothing that still changes
        for job in jobs:
            job.cancel()
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
    pool, all_started = ThreadPoolExecutor(workers, "blueberry", _set_threads, (threads_each,)), Barrier(workers)
    try:
        with blas_threads(threads_each):  # and back: a worker's own number is the default of threads started later
            wait([pool.submit(all_started.wait) for _ in range(workers)])
    except BaseException:  # such as too many threads: leave none waiting for the others
        all_started.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool


def _set_threads(count: int) -> None:
    torch.get_num_threads()  # torch gives a thread the default when it is first asked, and would overwrite the count
    torch.set_num_threads(count)
