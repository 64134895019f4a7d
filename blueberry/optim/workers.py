"""Work on batches of matrices, spread over the CPU's threads with one BLAS thread each.

A symmetric eigensolver hardly uses a second thread, and many small matrices do not either: two workers finish about
twice as many. What a batch computes does not depend on the number of workers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ..threads import one_blas_thread

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")


def run_on_workers(work: Callable[[_Batch], _Result], batches: Sequence[_Batch]) -> list[_Result]:
    """`[work(batch) for batch in batches]`, without gradients, on as many threads as torch has."""
    threads = torch.get_num_threads()
    with one_blas_thread():
        if threads == 1 or len(batches) < 2:
            return [torch.no_grad()(work)(batch) for batch in batches]
        with ThreadPoolExecutor(threads, initializer=_start_worker) as pool:
            return list(pool.map(torch.no_grad()(work), batches))


def _start_worker() -> None:
    torch.set_num_threads(1)
