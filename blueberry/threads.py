"""How many threads torch computes with."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


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
