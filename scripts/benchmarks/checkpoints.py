"""What it costs a save that a checkpoint is written whole or not at all, and can be verified."""

import argparse
import hashlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from transformers import Trainer

from blueberry import BlueberryConfig, BlueberryForCausalLM, BlueberryTrainer, BlueberryTrainingArguments
from blueberry.configuration_blueberry import PRESETS

from .common import Record, interleaved_medians, machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(PRESETS), default="blueberry-88m")


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    """Trainer's own save, ours, and one SHA-256 of the same bytes, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ready_trainer(arguments.preset, folder)
        checkpoint = Path(folder) / "checkpoint-1"
        seconds = interleaved_medians(
            {
                "trainer": lambda: saved(Trainer._save_checkpoint, trainer, checkpoint),
                "blueberry": lambda: saved(BlueberryTrainer._save_checkpoint, trainer, checkpoint),
                "hash": lambda: hashed(checkpoint),
            },
            arguments.repeats,
        )
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
    beyond = seconds["blueberry"] - seconds["trainer"] - seconds["hash"]
    yield {"benchmark": "checkpoints", "preset": arguments.preset, "megabytes": round(size / 1e6),
           **{f"{name}_ms": round(1000 * value, 1) for name, value in seconds.items()},
           "cost_beyond_one_hash": round(beyond / seconds["trainer"], 3), "n": arguments.repeats,
           **machine()}  # fmt: skip


def ready_trainer(preset: str, folder: str) -> BlueberryTrainer:
    """After a step of training, so that there is state to save."""
    model = BlueberryForCausalLM(BlueberryConfig.from_preset(preset))
    args = BlueberryTrainingArguments(
        folder, report_to="none", max_steps=1, per_device_train_batch_size=1, save_strategy="no", eval_strategy="no",
        save_total_limit=None, disable_tqdm=True,
    )  # fmt: skip
    window = torch.arange(8)
    trainer = BlueberryTrainer(model, args, train_dataset=[{"input_ids": window, "labels": window}])
    with redirect_stdout(io.StringIO()):  # the audit
        trainer.train()
    return trainer


def saved(save: Callable, trainer: BlueberryTrainer, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True)
    save(trainer, trainer.model, None)


def hashed(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
