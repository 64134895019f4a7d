"""What tracking costs: the same training without it, with the default settings and with a log at every step, in turns.

A log at every step makes the cost large against the noise of a machine, and so shows whether the callback counts all
of it: its own count decides how many logs fit into the default budget.
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

SIDES = ("without", "default", "every step")


class Run(NamedTuple):
    """Seconds in training, those that the callback counts as its own, and its logs."""

    seconds: float
    counted: float = 0.0
    logs: int = 0


def benchmark_overhead(steps: int, repeats: int) -> Iterator[Record]:
    """The `tiny` preset at the sizes of `make demo`, on random tokens; a warm-up, then rounds in changing order."""
    train(8, "every step")
    rounds = []
    for number in range(repeats):
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        rounds.append({side: train(steps, side) for side in order})
    for side in SIDES[1:]:
        yield _record(side, steps, rounds) | machine()


def train(steps: int, side: str) -> Run:
    """Train `steps` steps; what the Trainer prints is dropped, stdout is for the records."""
    torch.manual_seed(0)
    config = BlueberryConfig.from_preset("tiny")
    rows = torch.randint(0, config.vocab_size, (16 * 8, 256))
    data = [{"input_ids": row, "labels": row} for row in rows]
    tracking = SpectralMetricsCallback(every_n_steps=1 if side == "every step" else None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = BlueberryTrainingArguments(
            str(Path(folder) / "run"), max_steps=steps, report_to="none", save_strategy="no", eval_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        callbacks = [] if side == "without" else [tracking]
        trainer = BlueberryTrainer(BlueberryForCausalLM(config), args, train_dataset=data, callbacks=callbacks)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return Run(seconds, tracking.seconds_spent, tracking.logs) if callbacks else Run(seconds)


def _record(side: str, steps: int, rounds: list[dict[str, Run]]) -> Record:
    extra = [one[side].seconds - one["without"].seconds for one in rounds]
    shares = [more / one["without"].seconds for more, one in zip(extra, rounds, strict=True)]
    median = lambda values, digits=3: round(statistics.median(values), digits)
    return {
        "benchmark": "spectral overhead",
        "preset": "tiny",
        "steps": steps,
        "tracking": side,
        "logs": rounds[0][side].logs,
        "seconds_without": median(one["without"].seconds for one in rounds),
        "overhead": median(shares, 4),
        "overheads": [round(share, 4) for share in shares],
        "counted": median((one[side].counted / one["without"].seconds for one in rounds), 4),
        "seconds_a_log": median(more / one[side].logs for more, one in zip(extra, rounds, strict=True)),
        "seconds_a_log_counted": median(one[side].counted / one[side].logs for one in rounds),
        "n": len(rounds),
    }
