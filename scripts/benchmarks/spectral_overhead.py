"""What tracking with the default settings costs: the same training with and without it, in turns."""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from trainer_callbacks import SpectralMetricsCallback

from .common import Record, machine


def benchmark_overhead(steps: int, repeats: int) -> Iterator[Record]:
    """Seconds in training of the `tiny` preset at the sizes of `make demo`, on random tokens.

    One round to warm up, then pairs in alternating order.
    """
    train(8, tracked=True)
    pairs = []
    for number in range(repeats):
        order = (False, True) if number % 2 == 0 else (True, False)
        pairs.append({tracked: train(steps, tracked) for tracked in order})
    ratios = [pair[True][0] / pair[False][0] for pair in pairs]
    yield {"benchmark": "spectral overhead", "preset": "tiny", "steps": steps,
           "seconds_without": round(statistics.median(pair[False][0] for pair in pairs), 2),
           "seconds_with": round(statistics.median(pair[True][0] for pair in pairs), 2),
           "overhead": round(statistics.median(ratios) - 1, 4), "ratios": [round(ratio, 4) for ratio in ratios],
           "tracking": pairs[-1][True][1], "n": repeats, **machine()}  # fmt: skip


def train(steps: int, tracked: bool) -> tuple[float, str]:
    """Seconds of `steps` steps and what the callback says about its cost."""
    torch.manual_seed(0)
    config = BlueberryConfig.from_preset("tiny")
    rows = torch.randint(0, config.vocab_size, (16 * 8, 256))
    data = [{"input_ids": row, "labels": row} for row in rows]
    callbacks = [SpectralMetricsCallback()] if tracked else []
    with tempfile.TemporaryDirectory() as folder:
        args = BlueberryTrainingArguments(
            str(Path(folder) / "run"), max_steps=steps, report_to="none", save_strategy="no", eval_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = BlueberryTrainer(BlueberryForCausalLM(config), args, train_dataset=data, callbacks=callbacks)
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the records
            trainer.train()
        seconds = time.perf_counter() - start
    return seconds, callbacks[0].summary() if tracked else ""
