"""Going on with a run: from which checkpoint, with which arguments, and whether anything is left to do."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .arguments import BlueberryTrainingArguments, default_output_dir
from .checkpoints import checkpoints_of, flaw, step_of
from .data import DataArguments
from .model import ModelArguments
from .run_folder import CONFIG, EVAL_RESULTS, read_yaml
from .trainer import BlueberryTrainer

NEWEST = "last"  # value of `--resume_from_checkpoint` alone
# What the checkpoint holds or was made with: another value would be ignored, or make another run of it.
_FIXED = (
    *(field.name for group in (ModelArguments, DataArguments) for field in dataclasses.fields(group)),
    "optimizer", "muon_lr", "adamw_lr", "muon_momentum", "scale_mode", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "seed", "data_seed",
    "manifold_preset", "manifold_attention_only", "manifold_modular_lr", "hypersphere_lr",
)  # fmt: skip


def run_to_continue(settings: Mapping[str, Any]) -> Path | None:
    """The folder of the run that `settings` (arguments as given, before any default) continue; None: a new run."""
    wanted = _wanted(settings.get("resume_from_checkpoint"))
    if wanted is None:
        return None
    if wanted != NEWEST:
        return Path(wanted).parent
    return Path(settings.get("output_dir") or default_output_dir(settings.get("run_name"), settings.get("optimizer")))


def _wanted(value: Any) -> str | None:
    """A checkpoint folder, NEWEST, or None for a new run."""
    text = str(value)
    if text.lower() in ("none", "false"):
        return None
    return NEWEST if text.lower() in ("true", NEWEST) else text


def find_checkpoint(args: BlueberryTrainingArguments) -> Path | None:
    """The checkpoint to resume from: the one named, or the newest of the run that is whole; None for a new run."""
    wanted = _wanted(args.resume_from_checkpoint)
    if wanted is None:
        return None
    if args.overwrite_output_dir:
        raise UsageError("--overwrite_output_dir deletes what --resume_from_checkpoint continues: give one of them")
    if wanted == NEWEST:
        return _newest(Path(args.output_dir), quiet=args.process_index > 0)
    reason = flaw(Path(wanted))
    if reason is not None:
        raise UsageError(f"--resume_from_checkpoint {wanted} is no checkpoint folder: it {reason}")
    return Path(wanted)


def _newest(run: Path, quiet: bool) -> Path:
    for checkpoint in checkpoints_of(run):
        reason = flaw(checkpoint)
        if reason is None:
            return checkpoint
        if not quiet:
            print(f"{checkpoint} {reason}: passed over")
    raise UsageError(f"--resume_from_checkpoint: {run} holds no checkpoint that is whole; train without it first")


def check_same_run(settings: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Refuse to go on with another model, other data or another optimizer than the run was started with."""
    if checkpoint is None or not (checkpoint.parent / CONFIG).is_file():
        return
    started = read_yaml(checkpoint.parent / CONFIG)
    for name in _FIXED:
        if settings.get(name) != started.get(name):
            raise UsageError(
                f"--{name} {settings.get(name)}: the run of {checkpoint} has {started.get(name)}, and resuming cannot "
                f"change that; leave --{name} out, or start a new run in another --output_dir"
            )


def is_finished(trainer: BlueberryTrainer, checkpoint: Path | None) -> bool:
    """Whether the run of `checkpoint` has all the steps asked for, and its results."""
    if checkpoint is None or checkpoint.resolve().parent != Path(trainer.args.output_dir).resolve():
        return False
    return step_of(checkpoint) >= trainer.planned_steps() and (checkpoint.parent / EVAL_RESULTS).is_file()


def how_to_go_on(trainer: BlueberryTrainer) -> str:
    """For a run that was interrupted: where it stopped and the argument that continues it."""
    run, step = Path(trainer.args.output_dir), trainer.state.global_step
    newest = next((path for path in checkpoints_of(run) if flaw(path) is None), None)
    if newest is None:
        return f"at step {step}, before the first checkpoint (--save_steps sets how often)"
    return f"at step {step}; go on from {newest} with --output_dir {run} --resume_from_checkpoint"
