"""What the benchmarks share: the device, the clock, and what a figure must be quoted with."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from blueberry.machine import machine as machine  # for the benchmarks

Record = dict[str, Any]  # one JSON line


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved_medians(
    steps: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each, taken in turns after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(repeats + 1):
        for name, step in steps.items():
            synchronize()
            start = clock()
            step()
            synchronize()
            if round_number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_fresh_process(function: Callable, *arguments: str) -> int:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_peak() -> int:
    """The largest resident memory of this process so far, in bytes.

    On Linux from /proc: `ru_maxrss` of a new process starts at the peak of its parent.
    """
    if sys.platform == "linux":
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_resident_peak() -> None:
    """Let `resident_peak` start over at what is resident now; on Linux only."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
