"""How many threads torch computes with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread for the calling thread; others, such as a training loop's, keep theirs.

    A symmetric eigensolver hardly uses a second thread, and on busy cores the barriers between two can cost many
    times the work (0.3 s of it took 9 to 21 s). torch keeps the setting per thread; threads started meanwhile
    inherit it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
