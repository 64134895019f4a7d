"""What tracking costs: the same training without it and with its default settings, in turns.

The callback's own count of its seconds is reported beside the difference: it decides how many logs fit into the
default budget, and so it must not fall short.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from trainer_callbacks import SpectralMetricsCallback

from .common import Record, machine

SIDES = ("without", "default")


class Run(NamedTuple):
    """Seconds in training, CPU seconds of the process in them, what the callback counts as its own, and its logs."""

    seconds: float
    cpu_seconds: float
    counted: float = 0.0
    logs: int = 0


def benchmark_overhead(steps: int, repeats: int) -> Iterator[Record]:
    """The `tiny` preset at the sizes of `make demo`, on random tokens; a warm-up, then rounds in changing order."""
    train(8, "default")
    rounds = []
    for number in range(repeats):
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        rounds.append({side: train(steps, side) for side in order})
    yield _record(steps, rounds) | machine()


def train(steps: int, side: str) -> Run:
    """Train `steps` steps; what the Trainer prints is dropped, stdout is for the records."""
    torch.manual_seed(0)
    config = BlueberryConfig.from_preset("tiny")
    rows = torch.randint(0, config.vocab_size, (16 * 8, 256))
    data = [{"input_ids": row, "labels": row} for row in rows]
    tracking = SpectralMetricsCallback()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = BlueberryTrainingArguments(
            str(Path(folder) / "run"), max_steps=steps, report_to="none", save_strategy="no", eval_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        callbacks = [] if side == "without" else [tracking]
        trainer = BlueberryTrainer(BlueberryForCausalLM(config), args, train_dataset=data, callbacks=callbacks)
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Run(seconds, cpu_seconds, *((tracking.seconds_spent, tracking.logs) if callbacks else ()))


def _record(steps: int, rounds: list[dict[str, Run]]) -> Record:
    """Medians over the rounds, as shares of the same round without tracking.

    On a machine with other work, CPU seconds (with --threads 1, where no thread spins) are the steadier measure.
    """
    with_, without = [one["default"] for one in rounds], [one["without"] for one in rounds]
    wall = [a.seconds / b.seconds - 1 for a, b in zip(with_, without, strict=True)]
    cpu = [a.cpu_seconds / b.cpu_seconds - 1 for a, b in zip(with_, without, strict=True)]
    counted = [a.counted / b.seconds for a, b in zip(with_, without, strict=True)]
    per_log = [(a.cpu_seconds - b.cpu_seconds) / a.logs for a, b in zip(with_, without, strict=True)]
    shares = {"overhead": wall, "cpu_overhead": cpu, "counted": counted}
    medians = {name: round(statistics.median(values), 4) for name, values in shares.items()}
    all_values = {f"{name}s": [round(value, 4) for value in values] for name, values in shares.items()}
    return {"benchmark": "spectral overhead", "preset": "tiny", "steps": steps,
            "logs": with_[0].logs, "seconds_without": round(statistics.median(b.seconds for b in without), 2),
            "cpu_seconds_without": round(statistics.median(b.cpu_seconds for b in without), 2),
            "cpu_seconds_a_log": round(statistics.median(per_log), 3),
            "counted_seconds_a_log": round(statistics.median(a.counted / a.logs for a in with_), 3),
            **medians, **all_values, "n": len(rounds)}  # fmt: skip
