"""The folder of a run: what it holds, when it may be written, how it is described."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UsageError
from .arguments import BlueberryTrainingArguments

CONFIG = "config.yaml"
EVAL_RESULTS = "eval_results.json"
AUDIT = "optimizer_audit.json"
# Secrets, what belongs to one start of a run, one place or one process, and what TrainingArguments derives by itself.
_LEFT_OUT = {
    "hub_token", "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "run_name", "local_rank",
    "learning_rate", "include_num_input_tokens_seen", "accelerator_config", "disable_tqdm", "optim", "do_train",
    "do_eval", "do_predict", "dataloader_pin_memory",
}  # fmt: skip
_REPLACED = ".replaced"  # where the run that is being replaced lies until the new one has taken a step
_EMPTY = (None, "", [], {}, dataclasses.MISSING)
# What a run writes; nothing else in the folder is ever deleted.
_CONTENTS = (
    CONFIG, EVAL_RESULTS, AUDIT, "optimizer_audit.md", "runs", "spectral_log", "checkpoint-*", "config.json",
    "generation_config.json",
    "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "chat_template*",
    "training_args.bin", "trainer_state.json", "*_results.json", "README.md", "*_blueberry.py",
)  # fmt: skip


def check_run_folder(args: BlueberryTrainingArguments, checkpoint: Path | None) -> None:
    """Refuse to write over an earlier run or into a folder that is something else.

    A run goes on in its own folder only: `checkpoint`, if there is one, must lie in it.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if checkpoint is not None and checkpoint.resolve().parent == folder.resolve():
        return
    if not (folder / CONFIG).is_file():
        raise UsageError(f"--output_dir {folder} holds files that are no run of Blueberry: name another folder")
    if not args.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {folder} already holds a run: name another folder, continue it with "
            "--resume_from_checkpoint, or replace it with --overwrite_output_dir"
        )


def clear_run_folder(folder: str | Path) -> None:
    """Delete the run in `folder`; files that no run writes stay."""
    for path in _contents(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _contents(folder: str | Path) -> list[Path]:
    """What a run wrote into `folder`."""
    return sorted({path for pattern in _CONTENTS for path in Path(folder).glob(pattern)})


def set_run_aside(folder: str | Path) -> None:
    """Move the run in `folder` out of the way of a new one.

    If another one lies there still, the run in `folder` was killed before its first step and is of no use.
    """
    aside = Path(folder) / _REPLACED
    if aside.is_dir():
        clear_run_folder(folder)
    else:
        aside.mkdir(parents=True)
        _move(folder, aside)


def put_run_back(folder: str | Path) -> None:
    """Undo `set_run_aside`."""
    aside = Path(folder) / _REPLACED
    if aside.is_dir():
        _move(aside, folder)
        aside.rmdir()


def _move(source: str | Path, target: str | Path) -> None:
    for path in _contents(source):
        path.rename(Path(target) / path.name)


class RunFolderCallback(TrainerCallback):
    """Makes the first write of a run, once everything that can fail on bad input has succeeded: its `config.yaml`.

    The first callback, so that others write into a folder of this run. A run that it replaces is deleted after the
    first step. When an exception ends a new run before that, `undo` leaves the folder as it was for the corrected
    command.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self._started_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the earlier run aside if told so, and describe this one."""
        self._started_at = state.global_step
        if state.is_world_process_zero:
            if args.overwrite_output_dir:
                set_run_aside(args.output_dir)
            (Path(args.output_dir) / EVAL_RESULTS).unlink(missing_ok=True)  # of a run that is now given more steps
            write_yaml(Path(args.output_dir) / CONFIG, self.settings)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give up the run that this one replaces."""
        if state.global_step == 1 and state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir) / _REPLACED, ignore_errors=True)

    def undo(self, args: TrainingArguments, state: TrainerState) -> None:
        """Delete what a new run wrote, if it did not take a step."""
        if self._started_at == 0 == state.global_step and state.is_world_process_zero:
            clear_run_folder(args.output_dir)
            put_run_back(args.output_dir)


def describe(training: BlueberryTrainingArguments, *groups: Any) -> dict[str, Any]:
    """The arguments of a run as a flat mapping that `--config` reads back: all of them, defaults too, so that another
    version with other defaults makes the same run.

    `groups` (model, data, tracking) first. What is empty by default is left out while empty, and so are secrets and
    what belongs to the machine. Take it before the Trainer derives anything from the arguments.
    """
    own = BlueberryTrainingArguments.__annotations__
    last = sorted(dataclasses.fields(training), key=lambda item: item.name not in own)  # Blueberry's own first
    items = [(group, item) for group in groups for item in dataclasses.fields(group)]
    left_out = _LEFT_OUT | _implied(training)
    settings = {}
    for group, item in items + [(training, item) for item in last]:
        value = getattr(group, item.name)
        if item.name not in left_out and not (value in _EMPTY and item.default in _EMPTY):
            settings[item.name] = _plain(value)
    return settings


def _implied(training: BlueberryTrainingArguments) -> set[str]:
    """The arguments that others, or the machine, make idle."""
    machine = set() if torch.accelerator.is_available() else {"use_cpu"}
    if training.train_tokens is not None:
        return machine | {"max_steps", "num_train_epochs"}
    return machine | ({"num_train_epochs"} if training.max_steps > 0 else {"max_steps"})


def _plain(value: Any) -> Any:
    """Something YAML can hold: enums as their values, numbers, strings, lists and mappings as they are."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of argument names to values. UsageError in one line when it is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must map argument names to values")
    return values


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` in its order, atomically."""
    _write(path, yaml.safe_dump(dict(content), sort_keys=False))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    _write(path, json.dumps(content, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
