"""A process of a parallel run, or the launcher, dies: the run ends, and its checkpoints stay whole."""

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

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
SECONDS = 120.0  # to give up after; torchrun gives the surviving rank 30 s before it kills it


@pytest.fixture(params=["multi_cpu"])
def launched(
    request: pytest.FixtureRequest, arguments: list, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The launcher of a run that would take minutes, and the run's folder."""
    longer = [*arguments, "--train_tokens", 8_192_000, "--per_device_train_batch_size", 4]
    launch = [*LAUNCH, f"scripts/accelerate_configs/{request.param}.yaml", "scripts/train_llm.py"]
    command = [*launch, *map(str, longer), "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "stderr", "w") as errors:
        run = subprocess.Popen(
            command, cwd=ROOT, stdout=errors, stderr=errors, env=environment, start_new_session=True
        )
    yield run, tmp_path / "run"
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)


def processes_of(folder: Path) -> dict[int, bytes]:
    """Process -> environment of those that have `folder` in their command: launcher and ranks."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:  # ended, or somebody else's
            continue
        if str(folder).encode() in command:
            found[int(process.name)] = environment
    return found


def process_of(rank: int, folder: Path) -> int:
    """The process that trains as `rank` into `folder`."""
    mark = f"\0RANK={rank}\0".encode()
    return next(process for process, environment in processes_of(folder).items() if mark in environment)


def waited(done, what: str, errors: Path) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, f"{what} after {SECONDS:.0f} s: {errors.read_text()[-3000:]}"
        time.sleep(0.2)


in_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@in_proc
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


@in_proc
@pytest.mark.parametrize(
    ("launched", "number"),
    [("single", signal.SIGUSR1), ("multi_cpu", signal.SIGTERM)],
    indirect=["launched"],
)
def test_a_signal_to_the_launcher_saves_and_leaves_no_process_behind(launched, number):
    run, folder = launched
    errors = folder.with_name("stderr")
    waited(lambda: (folder / "checkpoint-16").is_dir() or run.poll() is not None, "no checkpoint", errors)
    os.kill(run.pid, number)
    waited(lambda: run.poll() is not None and not processes_of(folder), "still running", errors)
    newest = checkpoints_of(folder)[0]
    assert "stopped by SIGTERM at step" in errors.read_text() and flaw(newest) is None
    assert str(newest) in errors.read_text()
