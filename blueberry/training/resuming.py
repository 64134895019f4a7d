"""Going on with a run: from which checkpoint, with which arguments, and whether anything is left to do."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig

from ..errors import UsageError
from .arguments import BlueberryTrainingArguments, default_output_dir
from .checkpoints import STATE, checkpoints_of, flaw, step_of
from .data import DataArguments, PreparedData
from .model import ModelArguments
from .replacing import CONFIG, EVAL_RESULTS, IDENTITY
from .run_folder import read_yaml
from .trainer import BlueberryTrainer

NEWEST = "last"  # value of `--resume_from_checkpoint` alone
# What the checkpoint holds or was made with: another value would be ignored, or make another run of it.
_FIXED = (
    *(field.name for group in (ModelArguments, DataArguments) for field in dataclasses.fields(group)),
    "optimizer", "muon_lr", "adamw_lr", "muon_momentum", "scale_mode", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "seed", "data_seed",
    "manifold_preset", "manifold_attention_only", "manifold_modular_lr", "hypersphere_lr",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "dataloader_drop_last",
    "model", "lora_r", "lora_alpha", "lora_targets", "lora_experts",  # of scripts/finetune.py
)  # fmt: skip
# What arguments do not tell by themselves, in words.
_IDENTITY = {
    "windows_per_step": "--per_device_train_batch_size x --gradient_accumulation_steps x processes",
    "model": "the configuration of the model",
    "training_text": "the training text",
    "tokenizer": "the tokenizer",
    "base": "the weights of --model",  # of an adapter
}


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
    """The checkpoint to resume from: the one named, or the newest of the run that is intact; None for a new run.

    One process reads every byte of it, and all take the same.
    """
    wanted = _wanted(args.resume_from_checkpoint)
    if wanted is None:
        return None
    if args.overwrite_output_dir:
        raise UsageError("--overwrite_output_dir deletes what --resume_from_checkpoint continues: give one of them")
    found: list[Path | UsageError | None] = [None]
    if args.process_index == 0:
        try:
            found = [_newest(Path(args.output_dir)) if wanted == NEWEST else _named(Path(wanted))]
        except UsageError as error:
            found = [error]
    (checkpoint,) = broadcast_object_list(found)
    if isinstance(checkpoint, UsageError):
        raise checkpoint
    return checkpoint


def _named(checkpoint: Path) -> Path:
    reason = flaw(checkpoint) if checkpoint.is_dir() else "does not exist"
    if reason is None:
        return checkpoint
    others = [other for run in (checkpoint, checkpoint.parent) for other in checkpoints_of(run)]
    newest = next((other for other in others if other != checkpoint and flaw(other) is None), None)
    remedy = f"; the newest is {newest}" if newest else ""
    raise UsageError(f"--resume_from_checkpoint {checkpoint} is no checkpoint to go on from: it {reason}{remedy}")


def _newest(run: Path) -> Path:
    for checkpoint in checkpoints_of(run):
        reason = flaw(checkpoint)
        if reason is None:
            return checkpoint
        print(f"{checkpoint} {reason}: passed over")
    remedy = "start over with --overwrite_output_dir" if (run / CONFIG).is_file() else "train without it first"
    lacks = "holds no checkpoint that is whole" if run.is_dir() else "does not exist"
    raise UsageError(f"--resume_from_checkpoint: {run} {lacks}; {remedy}")


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


def identity(args: BlueberryTrainingArguments, config: PreTrainedConfig, data: PreparedData) -> dict[str, Any]:
    """What makes a run the one it is beside its arguments: files may change under their names, and a step may be
    shared out otherwise."""
    tokenizer = None if data.tokenizer is None else data.tokenizer.backend_tokenizer.to_str()
    model = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    return {
        "windows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "model": _digest(json.dumps(model, sort_keys=True, default=str)),
        "training_text": data.content,
        "tokenizer": tokenizer and _digest(tokenizer),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_identity(now: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Refuse to go on where weights would meet other tokens, or a step other windows, than those of the run."""
    if checkpoint is None or not (checkpoint.parent / IDENTITY).is_file():
        return
    started = json.loads((checkpoint.parent / IDENTITY).read_text())
    for name, words in _IDENTITY.items():
        if name in started and now[name] != started[name]:
            before, remedy = started[name], "undo that"
            if isinstance(before, int):
                words, remedy = f"{words} is {now[name]}, and was {before}", f"set them to make {before} again"
            else:
                words = f"{words} changed since the run was started"
            raise UsageError(
                f"--resume_from_checkpoint {checkpoint}: {words}; {remedy}, or start a new run in another --output_dir"
            )


def is_finished(trainer: BlueberryTrainer, checkpoint: Path | None) -> bool:
    """Whether the run of `checkpoint` has all the steps asked for, and its results: those of a shorter run stay in
    the folder until there are others, and the state beside them, which is written last, tells."""
    if checkpoint is None or checkpoint.resolve().parent != Path(trainer.args.output_dir).resolve():
        return False
    run, planned = checkpoint.parent, trainer.planned_steps()
    has_results = (run / EVAL_RESULTS).is_file() and (run / STATE).is_file()
    return has_results and min(step_of(checkpoint), step_of(run)) >= planned


def how_to_go_on(trainer: BlueberryTrainer) -> str:
    """For a run that was interrupted: where it stopped and the argument that continues it."""
    run, step = Path(trainer.args.output_dir), trainer.state.global_step
    newest = next((path for path in checkpoints_of(run) if flaw(path) is None), None)
    if newest is None:
        again = "; start over with --overwrite_output_dir" if (run / CONFIG).is_file() else ""
        return f"at step {step}, before the first checkpoint (--save_steps sets how often){again}"
    return f"at step {step}; go on from {newest} with --output_dir {run} --resume_from_checkpoint"
