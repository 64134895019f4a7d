"""When to take a spectral log: a schedule of steps or tokens, and a budget that thins it."""

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any

# What a CPU second of a worker takes from training beside it, by sharing caches and memory too: measured 1.0 to 1.3.
CONTENTION = 1.3


def log_schedule(max_steps: int, logs: int) -> set[int]:
    """Steps to log at: 0, the powers of four below the spacing of `logs` equal intervals, and those intervals' ends.

    Spectra move fastest at the start. Depends on nothing but its arguments, so a resumed run logs the same steps.
    """
    spacing = max(1, math.ceil(max_steps / logs))
    early = {4**i for i in range(spacing.bit_length()) if 4**i < spacing}
    return {0, max_steps} | early | set(range(spacing, max_steps, spacing))


class Milestones:
    """Token counts to log at: each is reached once, by the first step that has seen as many tokens."""

    def __init__(self, milestones: Sequence[int]):
        self._left = deque(sorted(milestones))

    def reached(self, tokens: int) -> bool:
        """Whether a milestone was passed since the last call."""
        before = len(self._left)
        while self._left and self._left[0] <= tokens:
            self._left.popleft()
        return len(self._left) < before


class Budget:
    """What tracking may cost, as a share of the time in training steps: seconds of the training thread and CPU seconds
    of the workers.

    A quarter of the whole allowance may be spent ahead of time, because spectra move fastest at the start; the rest
    comes with the steps. `share` None: no limit.
    """

    AHEAD = 0.25

    def __init__(self, share: float | None, max_steps: int):
        self.share, self.max_steps = share, max_steps  # steps of this process, from where it began
        self.spent = 0.0
        self.spent_in_training = 0.0  # the part of it that the training thread waited for
        self._lock = threading.Lock()  # the worker charges too
        self.training_seconds = 0.0
        self.steps = 0
        self._recent: deque[float] = deque(maxlen=101)  # a compiling first step must not count for all

    def count_step(self, seconds: float) -> None:
        """Add one training step, without what tracking took of it."""
        self.training_seconds += seconds
        self.steps += 1
        self._recent.append(seconds)

    def affords(self, cost: float | None) -> bool:
        """Whether another log of `cost` seconds fits (None: not known yet), and the last of the run after it."""
        if self.share is None:
            return True
        if cost is None or not self._recent:
            return False
        steps = self.AHEAD * self.max_steps + (1 - self.AHEAD) * self.steps
        return self.spent + 2 * cost <= self.share * median(self._recent) * steps

    def charge(self, seconds: float) -> None:
        """Add what tracking took."""
        with self._lock:
            self.spent += seconds

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the wall time of the block, which runs in the training thread."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.spent_in_training += seconds
            self.charge(seconds)


class TimedExecutor(ThreadPoolExecutor):
    """Threads that give way to training, and count the CPU seconds of what they run."""

    def __init__(self, workers: int):
        super().__init__(workers, thread_name_prefix="spectral", initializer=_give_way)
        self.cpu_seconds = 0.0
        self._lock = threading.Lock()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        return super().submit(self._timed, work, *args, **kwargs)

    def _timed(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return work(*args, **kwargs)
        finally:
            with self._lock:
                self.cpu_seconds += time.thread_time() - start


def _give_way() -> None:
    """On Linux, niceness is a thread's own: busy cores go to training first."""
    if sys.platform == "linux":
        os.nice(10)
