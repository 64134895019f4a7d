"""The folder of a run: what it holds, when it may be written, how it is described."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UsageError
from .arguments import BlueberryTrainingArguments
from .checkpoints import checkpoints_of
from .replacing import (
    CONFIG,
    IDENTITY,
    clear_run_folder,
    delete_run_aside,
    is_set_aside,
    put_run_back,
    set_run_aside,
)

# Secrets, what belongs to one start of a run, one place or one process, and what TrainingArguments derives by itself.
_LEFT_OUT = {
    "hub_token", "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "run_name", "local_rank",
    "learning_rate", "include_num_input_tokens_seen", "accelerator_config", "disable_tqdm", "optim", "do_train",
    "do_eval", "do_predict", "dataloader_pin_memory",
}  # fmt: skip
_LOCK = ".lock"
_CARD = {"README.md", "figures"}  # of an earlier run, without which a folder holds none
_EMPTY = (None, "", [], {}, dataclasses.MISSING)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run. The lock goes with the process, however that ends; what is left of it is a file."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(
            f"--output_dir {folder}: another run is writing into it; wait for its end, or name another folder"
        ) from error
    try:
        yield
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def no_empty_folder_left(folder: Path) -> Iterator[None]:
    """Trainer makes the folder of a run before it has checked all arguments: where the block fails, it goes again."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # not made yet, or not empty
                folder.rmdir()
        raise


def check_run_folder(args: BlueberryTrainingArguments, checkpoint: Path | None) -> None:
    """Refuse to write over an earlier run or into a folder that is something else.

    A run goes on in its own folder only: `checkpoint`, if there is one, must lie in it.
    """
    folder = Path(args.output_dir)
    if args.process_index == 0 and (reason := _why_not_writable(folder)):
        raise UsageError(f"--output_dir {folder}: {reason}; name a folder that can be written")
    if (
        not folder.is_dir()
        or all(path.name in {_LOCK, *_CARD} for path in folder.iterdir())
        or _goes_on(folder, checkpoint)
    ):
        return
    if not (folder / CONFIG).is_file():
        raise UsageError(f"--output_dir {folder} holds files that are no run of Blueberry: name another folder")
    _check_holds_no_run(args, checkpoint)


def _why_not_writable(folder: Path) -> str | None:
    """Of a folder that does not exist: whether one can be made in the nearest that does."""
    here = folder.absolute()
    try:
        nearest = next(path for path in (here, *here.parents) if path.exists())
        if not nearest.is_dir():
            return f"{nearest} is a file"
        if nearest == here:
            return None if os.access(here, os.W_OK) else "no permission to write"
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        return error.strerror
    return None


def _goes_on(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def _check_holds_no_run(args: BlueberryTrainingArguments, checkpoint: Path | None) -> None:
    folder = Path(args.output_dir)
    if args.overwrite_output_dir or _goes_on(folder, checkpoint) or not (folder / CONFIG).is_file():
        return
    if not checkpoints_of(folder):
        raise UsageError(
            f"--output_dir {folder} already holds a run, without a checkpoint to continue from: replace it with "
            "--overwrite_output_dir, or name another folder"
        )
    raise UsageError(
        f"--output_dir {folder} already holds a run: name another folder, continue it with "
        "--resume_from_checkpoint, or replace it with --overwrite_output_dir"
    )


def mend_run_folder(args: BlueberryTrainingArguments) -> None:
    """Put back the run that a start had set aside before it was killed. UsageError unless it is to be replaced again:
    whoever gave the command saw another folder."""
    folder = Path(args.output_dir)
    if not is_set_aside(folder) or args.process_index > 0:
        return
    with held(folder):
        put_run_back(folder)
    if not args.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {folder}: a start was killed while it replaced the run there, which is back now; continue "
            "it with --resume_from_checkpoint, replace it with --overwrite_output_dir, or name another folder"
        )


class RunFolderCallback(TrainerCallback):
    """Makes the first write of a run, once everything that can fail on bad input has succeeded: its `config.yaml`.

    The first callback, so that others write into a folder of this run. From then on until `close` no other run gets
    the folder. A run that it replaces is deleted after the first step. When an exception ends a new run before that,
    `undo` leaves the folder as it was for the corrected command.

    Attributes:
        settings: see `describe`.
        checkpoint: the one that the run goes on from.
        identity: see `resuming.identity`; set before training.
    """

    def __init__(self, settings: Mapping[str, Any], checkpoint: Path | None = None):
        self.settings, self.checkpoint = settings, checkpoint
        self.identity: dict[str, Any] = {}
        self._started_at: int | None = None
        self._held = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the earlier run aside if told so, and describe this one."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            self._held.enter_context(held(folder))
            _check_holds_no_run(args, self.checkpoint)  # one may have come and gone since it was looked at first
            self._started_at = state.global_step
            if args.overwrite_output_dir and (folder / CONFIG).is_file():
                set_run_aside(folder)
            write_json(folder / IDENTITY, self.identity)
            write_yaml(folder / CONFIG, self.settings)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give up the run that this one replaces."""
        if state.global_step == 1 and state.is_world_process_zero:
            delete_run_aside(Path(args.output_dir))

    def undo(self, args: TrainingArguments, state: TrainerState) -> None:
        """Delete what a new run wrote, if it did not take a step."""
        if self._started_at == 0 == state.global_step:
            clear_run_folder(Path(args.output_dir))
            put_run_back(Path(args.output_dir))

    def close(self) -> None:
        """Let other runs have the folder."""
        self._held.close()


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


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write `content` as JSON, atomically; without `indent` as short as it can be.

    NaN and infinities, for which JSON has no word, become null.
    """
    text = json.dumps(_finite(content), indent=indent, separators=None if indent else (",", ":"), allow_nan=False)
    _write(path, text + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
