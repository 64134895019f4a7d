"""A process of a parallel run dies: the run ends, and its checkpoints stay whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from blueberry.training.checkpoints import checkpoints_of, flaw

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
          "scripts/accelerate_configs/multi_cpu.yaml", "--main_process_port", "0", "scripts/train_llm.py"]  # fmt: skip
SECONDS = 120.0  # to give up after; torchrun gives the surviving rank 30 s before it kills it


@pytest.fixture
def launched(arguments: list, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A run on two processes that would take minutes, and its folder."""
    longer = [*arguments, "--train_tokens", 8_192_000, "--per_device_train_batch_size", 4]
    command = [*LAUNCH, *map(str, longer), "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "stderr", "w") as errors:
        run = subprocess.Popen(
            command, cwd=ROOT, stdout=errors, stderr=errors, env=environment, start_new_session=True
        )
    yield run, tmp_path / "two"
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)


def process_of(rank: int, folder: Path) -> int:
    """The process that trains as `rank` into `folder`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:  # ended, or somebody else's
            continue
        if f"\0RANK={rank}\0".encode() in environment and str(folder).encode() in command:
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


def waited(done, what: str, errors: Path) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, f"{what} after {SECONDS:.0f} s: {errors.read_text()[-3000:]}"
        time.sleep(0.2)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_the_others_end_and_checkpoints_stay_whole(launched, rank):
    run, folder = launched
    errors = folder.with_name("stderr")
    checkpoint = folder / "checkpoint-16"
    waited(lambda: checkpoint.is_dir() or run.poll() is not None, "no checkpoint", errors)
    assert run.poll() is None, errors.read_text()[-3000:]
    os.kill(process_of(rank, folder), signal.SIGKILL)
    waited(lambda: run.poll() is not None, "still running", errors)
    assert run.returncode != 0
    assert f"rank      : {rank}" in errors.read_text() and "SIGKILL" in errors.read_text()
    intact = [found for found in checkpoints_of(folder) if flaw(found) is None]
    assert intact and all((found / "optimizer.pt").is_file() for found in intact)
