"""Replacing a run by another in its folder: the old one is there until the new one has taken a step, kill or not."""

import shutil
from pathlib import Path

from blueberry.benchmarks import FILE as BENCHMARKS

from .checkpoints import PARTIAL, STATE

CONFIG = "config.yaml"
EVAL_RESULTS = "eval_results.json"
AUDIT = "optimizer_audit.json"
IDENTITY = "identity.json"
PROVENANCE = "provenance.json"
_REPLACED = ".replaced"  # where the run that is being replaced lies until the new one has taken a step
_DISCARDED = ".discarded"  # the same while it is being deleted
# What a run writes; nothing else in the folder is ever deleted.
_CONTENTS = (
    CONFIG, EVAL_RESULTS, AUDIT, "optimizer_audit.md", IDENTITY, PROVENANCE, BENCHMARKS, "runs",
    "spectral_log", "checkpoint-*", PARTIAL, "config.json", "generation_config.json", "model.safetensors",
    "model-*-of-*.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "additional_chat_templates", "training_args.bin", STATE, _DISCARDED,
)  # fmt: skip


def is_set_aside(folder: Path) -> bool:
    """Whether an earlier run lies aside in `folder`: one is being replaced, or a start that did so was killed."""
    return (folder / _REPLACED).is_dir()


def set_run_aside(folder: Path) -> None:
    """Move the run in `folder` out of the way of a new one; its config last: where that is, the whole run is."""
    (folder / _REPLACED).mkdir()
    for path in _contents(folder):
        path.rename(folder / _REPLACED / path.name)


def put_run_back(folder: Path) -> None:
    """Undo `set_run_aside`, wherever it stopped; the config first, since it says that the rest is there."""
    aside = folder / _REPLACED
    if not aside.is_dir():
        return
    if (aside / CONFIG).is_file():  # what lies outside belongs to the new run, which has taken no step
        clear_run_folder(folder)
    for path in reversed(_contents(aside)):
        path.rename(folder / path.name)
    aside.rmdir()


def delete_run_aside(folder: Path) -> None:
    """Give up the run that was set aside. First renamed: a part of it is nothing to put back."""
    if is_set_aside(folder):
        shutil.rmtree(folder / _DISCARDED, ignore_errors=True)
        (folder / _REPLACED).rename(folder / _DISCARDED)
        shutil.rmtree(folder / _DISCARDED, ignore_errors=True)


def clear_run_folder(folder: Path) -> None:
    """Delete the run in `folder`; files that no run writes stay."""
    for path in _contents(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _contents(folder: Path) -> list[Path]:
    """What a run wrote into `folder`, its config last."""
    found = {path for pattern in _CONTENTS for path in folder.glob(pattern)}
    return sorted(found, key=lambda path: (path.name == CONFIG, path.name))
