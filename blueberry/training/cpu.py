"""Settings of the process that training on a CPU profits from."""

import ctypes
import os
import platform
import sys

import torch

# Numbers of glibc's mallopt, from <malloc.h>
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks; returns whether it could.

    By default glibc maps every block over 32 MiB anew and gives it back when freed. A training step on the CPU frees
    and allocates the same large tensors again and again, and faulting their pages in takes a fifth of the time of the
    `tiny` preset. The process keeps its peak memory. Elsewhere than on Linux with glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def use_idle_cores(processes: int) -> None:
    """Share the machine's cores among its `processes`, where `accelerate launch` left each with a single thread.

    Without `--cpu` or `--num_cpu_threads_per_process`, accelerate sets OMP_NUM_THREADS=1. More threads than one, and
    any number set without accelerate, stay as they are.
    """
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched_by_accelerate and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes))


def warn_about_slow_bf16() -> None:
    """One line where bf16 has no hardware: matrix products then take longer than in fp32, not half the time."""
    features = torch.cpu.get_capabilities()
    if not any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        print(
            "warning: --bf16 true on a CPU without bf16 instructions is slower than fp32; leave it out",
            file=sys.stderr,
        )
