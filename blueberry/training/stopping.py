"""Signals that ask a run to end: a scheduler sends them before it takes the machine away."""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate launch and torchrun set
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class Stopped(Exception):
    """Training ended in order because of a signal, its last checkpoint being that of the last step."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")


def stop_with_launcher() -> None:
    """On Linux, SIGTERM for this process when the launcher that started it is gone.

    `accelerate launch` passes no signal on: the one that ends it would leave this process training by itself.
    """
    if sys.platform == "linux" and any(name in os.environ for name in _LAUNCHERS):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignals:
    """Inside its `with` block SIGTERM and SIGUSR1 are noted instead of killing the process.

    Attributes:
        agreed: the signal that came, once all processes know of it; they must end after the same step.
    """

    def __init__(self) -> None:
        self.agreed: int | None = None
        self._came = 0
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agree(self, device: torch.device) -> bool:
        """Whether a signal came to any process; all of them ask after every step."""
        came = self._came
        if dist.is_initialized() and dist.get_world_size() > 1:
            largest = torch.tensor(came, device=device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            came = int(largest.item())
        self.agreed = came or None
        return bool(came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number
