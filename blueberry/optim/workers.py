"""Work on batches of matrices, spread over the CPU's threads.

A symmetric eigensolver hardly uses a second thread, and many small matrices do not either: two workers with one BLAS
thread each finish about twice as many. What a batch computes does not depend on the number of workers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from ..threads import blas_threads

_Batch = TypeVar("_Batch")
_Result = TypeVar("_Result")


def run_on_workers(
    work: Callable[[_Batch], _Result], batches: Sequence[_Batch], threads_each: int = 1
) -> list[_Result]:
    """`[work(batch) for batch in batches]`, without gradients, on workers with so many BLAS threads each: as many
    workers as torch's threads suffice for."""
    workers = torch.get_num_threads() // threads_each
    with blas_threads(threads_each):
        if workers < 2 or len(batches) < 2:
            return [torch.no_grad()(work)(batch) for batch in batches]
        with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, threads_each)) as pool:
            return list(pool.map(torch.no_grad()(work), batches))
