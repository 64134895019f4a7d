"""Where the time of an optimizer step goes: Newton-Schulz, the dual problem, the retraction."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .composed import ComposedOptimizer
from .muon import Muon
from .stiefel_muon import StiefelMuon

# Methods that are timed, and the name of what they do.
_METHODS: dict[type[Optimizer], dict[str, str]] = {
    Muon: {"orthogonalize": "newton_schulz"},
    StiefelMuon: {"solve": "dual", "retract": "retraction"},
}


class PhaseClock:
    """Times the phases of one optimizer's steps between `start` and `stop`; `seconds` maps a phase to its time.

    Work that several workers do at once counts with the mean over them, so that phases add up to no more than the
    step. On CUDA the device is synchronised around each phase.
    """

    def __init__(self, optimizer: ComposedOptimizer):
        self.seconds: dict[str, float] = {}
        self._timed = [
            (part, method, phase)
            for part in optimizer.optimizers.values()
            for kind, methods in _METHODS.items()
            if isinstance(part, kind)
            for method, phase in methods.items()
        ]
        self._lock = threading.Lock()
        self._main = threading.get_ident()

    def start(self) -> None:
        """Shadow the methods, on these objects only; a second start begins anew."""
        self.stop()
        self.seconds = defaultdict(float)
        for part, method, phase in self._timed:
            setattr(part, method, self._clocked(getattr(part, method), phase))

    def stop(self) -> None:
        """Take the shadows off."""
        for part, method, _ in self._timed:
            vars(part).pop(method, None)

    def _clocked(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        threads = torch.get_num_threads()

        def clocked(*arguments: Any) -> Any:
            begin = now()
            result = call(*arguments)
            share = 1 if threading.get_ident() == self._main else threads // torch.get_num_threads()
            with self._lock:
                self.seconds[phase] += (now() - begin) / share
            return result

        return clocked


def now() -> float:
    """Seconds, after the CUDA device, if there is one, has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
