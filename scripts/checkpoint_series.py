"""Spectra of finished models, one after another, into one spectral log: what `track_manifold.py --model` does."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm.auto import tqdm

from blueberry.errors import UsageError
from blueberry.spectral.log import SpectralLog
from blueberry.spectral.names import POWER_LAW
from blueberry.spectral.stored import analyze_stored, stored_matrices
from blueberry.training.checkpoints import STATE, checkpoints_of, step_of
from blueberry.training.hub_access import hub_or_cache

FILES = ["model*.safetensors*", "*config.json"]  # of a model on the Hub: never its code
SHOWN = ("spectral_norm", "spectral_gap", "stable_rank", "spectral_entropy", "effective_rank", POWER_LAW)


class Checkpoint(NamedTuple):
    """A folder with weights, and the step that it is shown at."""

    step: int
    folder: Path


def analyze_series(models: Sequence[str], log: SpectralLog, **settings: bool | int) -> None:
    """Log every matrix of every checkpoint, with a progress bar, and print a table and what went wrong.

    An earlier log in the same place is replaced. Settings are those of `analyze_stored`.
    """
    checkpoints = series(models)
    matrices = [(checkpoint.step, stored_matrices(checkpoint.folder)) for checkpoint in checkpoints]
    log.clear()
    with tqdm(total=sum(len(stored) for _, stored in matrices), unit="matrix", desc="Decomposing") as bar:
        for step, stored in matrices:
            rows = []
            for some in analyze_stored(stored, **settings):
                rows += [row | {"step": step} for row in some]
                bar.update()
            log.append(rows)
    log.compact()
    print(table(log.read()))


def series(models: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints of a run; or several models, by the steps in their names, without those in the given order."""
    folders = [(model, _folder(model)) for model in models]
    if len(folders) == 1:
        ((model, folder),) = folders
        return _of_run(folder) or [Checkpoint(_step(model, folder) or 0, folder)]
    steps = [_step(model, folder) for model, folder in folders]
    if None in steps or len(set(steps)) < len(steps):
        steps = list(range(len(steps)))
    return sorted(Checkpoint(step, folder) for step, (_, folder) in zip(steps, folders, strict=True))


def _of_run(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run folder, and its final model where that is a later one; [] for a plain model."""
    found = [Checkpoint(int(path.name[11:]), path) for path in reversed(checkpoints_of(folder))]
    if found and (folder / STATE).is_file() and step_of(folder) > found[-1].step:
        found.append(Checkpoint(step_of(folder), folder))
    return found


def _step(model: str, folder: Path) -> int | None:
    """From the state of the Trainer, or a name such as checkpoint-500 or ID@step3000."""
    if (folder / STATE).is_file():
        return step_of(folder)
    digits = re.search(r"(?:checkpoint-|step_?-?)(\d+)$", model.rstrip("/"))
    return int(digits[1]) if digits else None


def _folder(model: str) -> Path:
    """The folder of a local model, or of the snapshot of a Hub id (ID@REVISION), without its code."""
    if Path(model).exists():
        return Path(model)
    name, _, revision = model.partition("@")
    hub_or_cache()
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UsageError(f"--model {model} is no folder, and not to be had from the Hub: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def table(log: pd.DataFrame) -> str:
    """Means over the layers of each projection at the last step, and how many rows have nulls for which reason."""
    last = log[log["step"] == log["step"].max()]
    groups = last.groupby(["module", "projection"], sort=False)
    shown = [name for name in SHOWN if last[name].notna().any()]
    means = groups[shown].mean().assign(matrices=groups.size())
    heading = f"step {last['step'].iloc[0]}, means over the matrices of each projection:"
    reasons = log["reason"].dropna().str.split("; ").explode().value_counts()
    troubles = [f"{count} rows have null {reason}" for reason, count in reasons.items()]
    return "\n".join([heading, means.to_string(float_format="{:.4g}".format), *troubles])
