"""The checkpoints of a run: written whole or not at all, recognised when damaged, deleted when there are too many."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..errors import UsageError
from .manifest import difference, sync_folder, write_manifest

STATE = "trainer_state.json"
PARTIAL = ".checkpoint-*"  # checkpoints that are being written or deleted, or were when the process was killed
# One pattern of each line must be there: weights, optimizer, schedule. Sharded engines use folders of other names.
_PARTS = (
    ("model*.safetensors", "adapter_model*", "pytorch_model*"),
    ("optimizer*",),
    ("scheduler.pt",),
    (STATE,),
)
# What torch.save says when a file cannot be written; it is a RuntimeError.
_TORCH_WRITING = ("inline_container", "PytorchStreamWriter", "iostream error")


def checkpoints_of(run: Path) -> list[Path]:
    """The `checkpoint-*` folders of a run, newest first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=_number, reverse=True)


def flaw(checkpoint: Path) -> str | None:
    """Why training cannot go on from `checkpoint`, in words, or None. Reads every byte of it."""
    for patterns in _PARTS:
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"has no {patterns[0]}"
    return difference(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return json.loads((checkpoint / STATE).read_text())["global_step"]


@contextmanager
def new_checkpoint(checkpoint: Path, is_first: bool) -> Iterator[Path]:
    """A folder for all processes to write `checkpoint` into; it gets its name when everything is there.

    Every process enters; `is_first` in exactly one. UsageError in all of them when one could not write: then no
    checkpoint was made and the earlier ones are as they were.
    """
    folder, reason = checkpoint.with_name(f".{checkpoint.name}"), None
    _go_on_together(checkpoint, _why_not(_prepare, folder) if is_first else None)
    try:
        yield folder
    except (OSError, SafetensorError, RuntimeError) as error:
        if not (reason := _reason(error)):
            raise
    try:
        _go_on_together(checkpoint, reason)
        _go_on_together(checkpoint, _why_not(_finish, folder, checkpoint) if is_first else None)
    finally:
        if is_first:
            _delete_partial(checkpoint.parent)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What a finished run leaves: where `folder` cannot hold it, a UsageError that says how to get it later."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not (reason := _reason(error)):
            raise
        raise UsageError(
            f"{folder}: the model could not be written: {reason}; make room and go on with --resume_from_checkpoint"
        ) from error


def delete_old_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints: `newest`, which was just written, the best one, and those of the last steps.

    Those of later steps than `newest` are left over from before the run was resumed further back, and go first.
    """
    if not limit:
        return
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    others = [path for path in checkpoints_of(newest.parent) if path.resolve() not in kept]
    others.sort(key=lambda path: (_number(path) < _number(newest), _number(path)))
    for path in others[: max(0, len(others) + len(kept) - limit)]:
        _delete(path)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def _prepare(folder: Path) -> None:
    _delete_partial(folder.parent)
    folder.mkdir(parents=True)


def _finish(folder: Path, checkpoint: Path) -> None:
    """Describe what was written, and give it its name."""
    write_manifest(folder)
    if checkpoint.is_dir():  # a damaged one, or the run was resumed further back
        _delete(checkpoint)
    folder.rename(checkpoint)
    sync_folder(checkpoint.parent)


def _delete(checkpoint: Path) -> None:
    """First take its name away: killed in between, no half of it is left under that."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _delete_partial(run: Path) -> None:
    for path in run.glob(PARTIAL):
        shutil.rmtree(path, ignore_errors=True)


def _why_not(write: Callable[..., None], *paths: Path) -> str | None:
    try:
        write(*paths)
    except OSError as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str | None:
    """Why a file could not be written, if that is what `error` is about: torch and safetensors raise their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    message = " ".join(str(error).split())
    is_of_a_file = isinstance(error, SafetensorError) or any(mark in message for mark in _TORCH_WRITING)
    return f"no space left, or a file too large ({message})" if is_of_a_file else None


def _go_on_together(checkpoint: Path, reason: str | None) -> None:
    """Wait for all processes; UsageError in each if one has a reason why it could not write."""
    first = next((one for one in gather_object([reason]) if one), None)
    if first is not None:
        raise UsageError(
            f"{checkpoint} could not be written: {first}; make room and go on with --resume_from_checkpoint, from the "
            "checkpoint before, which is as it was"
        )
