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
from .batching import HasWeight

_Piece = TypeVar("_Piece", bound=HasWeight)


def run_on_workers(
    step: Callable[[list[_Piece]], None], batches: Sequence[list[_Piece]], threads_each: int = 1
) -> None:
    """Step each batch, without gradients: on a CPU on workers with so many BLAS threads each, as many as torch's
    threads suffice for, elsewhere one batch after the other."""
    workers = torch.get_num_threads() // threads_each
    on_cpu = all(batch[0].weight.device.type == "cpu" for batch in batches)
    step = torch.no_grad()(step)
    with blas_threads(threads_each if on_cpu else torch.get_num_threads()):
        if not on_cpu or workers < 2 or len(batches) < 2:
            for batch in batches:
                step(batch)
            return
        with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, threads_each)) as pool:
            list(pool.map(step, batches))  # raises what a worker raised
