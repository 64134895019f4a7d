"""Newton-Schulz time per rank when two data-parallel processes, of one thread each, share it."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from blueberry.optim import Muon

from .common import Record, machine
from .optimizer import SETS, make_parameters

RANKS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", choices=sorted(SETS), default="dense")


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    """One rank and two in turns, in one run; while one works alone the other waits."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, args=(folder, arguments.set, arguments.repeats), nprocs=RANKS)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]
    alone = statistics.median(ranks[0]["alone"])
    shared = max(statistics.median(one["shared"]) for one in ranks)
    yield {"benchmark": "distributed", "set": arguments.set, "one_rank_ms": round(1000 * alone, 1),
           "two_ranks_ms": round(1000 * shared, 1), "ratio": round(alone / shared, 2), "n": arguments.repeats,
           **machine()}  # fmt: skip


class _TimedMuon(Muon):
    """CPU `seconds` in Newton-Schulz: of one thread, so that other programs do not count."""

    seconds = 0.0

    def orthogonalize(self, directions: torch.Tensor, group: dict, *scratch: Any) -> torch.Tensor:
        start = time.thread_time()
        result = super().orthogonalize(directions, group, *scratch)
        self.seconds += time.thread_time() - start
        return result


def _work(rank: int, folder: str, name: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    muon = _TimedMuon(make_parameters(SETS[name], stacks=True))
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    for number in range(repeats + 1):
        for kind, ranks in (("alone", None), ("shared", dist.group.WORLD)):
            muon.replicas, muon.seconds = ranks, 0.0
            dist.barrier()
            if ranks is not None or rank == 0:
                muon.step()
            dist.barrier()
            if number:
                seconds[kind].append(muon.seconds)
    torch.save(seconds, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
