"""The folder of a run: what it holds, when it may be written, how it is described."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from ..errors import UsageError
from .arguments import BlueberryTrainingArguments

CONFIG = "config.yaml"
EVAL_RESULTS = "eval_results.json"
AUDIT = "optimizer_audit.json"
# Secrets, what belongs to one start of a run or one process only, and what TrainingArguments derives by itself.
_LEFT_OUT = {
    "hub_token", "resume_from_checkpoint", "overwrite_output_dir", "local_rank", "learning_rate", "run_name",
    "include_num_input_tokens_seen", "accelerator_config", "disable_tqdm", "optim", "do_eval",
    "dataloader_pin_memory",
}  # fmt: skip
# What a run writes; nothing else in the folder is ever deleted.
_CONTENTS = (
    CONFIG, EVAL_RESULTS, AUDIT, "optimizer_audit.md", "runs", "spectral_log", "checkpoint-*", "config.json",
    "generation_config.json",
    "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
    "training_args.bin", "trainer_state.json", "*_results.json", "README.md", "*_blueberry.py",
)  # fmt: skip


# What resuming needs besides the weights; a folder without them would restart optimizer and schedule silently.
_CHECKPOINT = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def check_run_folder(args: BlueberryTrainingArguments, checkpoint: str | None) -> None:
    """Refuse to write over an earlier run or into a folder that is something else.

    A run goes on in its own folder only: `checkpoint`, if there is one, must lie in it.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    if not (folder / CONFIG).is_file():
        raise UsageError(f"--output_dir {folder} holds files that are no run of Blueberry: name another folder")
    if not args.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {folder} already holds a run: name another folder, continue it with "
            "--resume_from_checkpoint, or replace it with --overwrite_output_dir"
        )


def clear_run_folder(args: BlueberryTrainingArguments, checkpoint: str | None) -> None:
    """Delete the earlier run that `overwrite_output_dir` gives up; files that no run writes stay."""
    folder = Path(args.output_dir)
    if checkpoint is not None or not args.overwrite_output_dir:
        return
    for pattern in _CONTENTS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_checkpoint(args: BlueberryTrainingArguments) -> str | None:
    """The checkpoint to resume from: a folder, or the newest of the run for `--resume_from_checkpoint` alone."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() in ("true", "last"):
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if checkpoint is None:
            raise UsageError(
                f"--resume_from_checkpoint: {args.output_dir} holds no checkpoint; train without it first"
            )
        return checkpoint
    missing = [name for name in _CHECKPOINT if not (Path(wanted) / name).is_file()]
    if missing:
        raise UsageError(f"--resume_from_checkpoint {wanted} is no checkpoint folder (it has no {missing[0]})")
    return str(wanted)


def describe(training: BlueberryTrainingArguments, *groups: Any) -> dict[str, Any]:
    """The arguments of a run as a flat mapping that `--config` reads back.

    `groups` (data, model) in full; of the training arguments Blueberry's own and those that differ from the defaults.
    Take it before the Trainer derives anything from them.
    """
    settings = {item.name: getattr(group, item.name) for group in groups for item in dataclasses.fields(group)}
    own = BlueberryTrainingArguments.__annotations__
    for item in dataclasses.fields(training):
        value = getattr(training, item.name)
        changed = value != item.default and value not in ([], {}, "", None)
        if item.name not in _LEFT_OUT and (item.name in own or changed):
            settings[item.name] = value
    if training.train_tokens is not None:
        settings.pop("num_train_epochs", None)
    return {name: _plain(value) for name, value in settings.items() if value is not None}


def _plain(value: Any) -> Any:
    """Something YAML can hold: enums as their values, numbers, strings, lists and mappings as they are."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_config(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """`config.yaml`: everything needed to run it again."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / CONFIG).write_text(yaml.safe_dump(dict(settings), sort_keys=False))


def write_json(folder: str | Path, name: str, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = Path(folder) / f".{name}"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(Path(folder) / name)
