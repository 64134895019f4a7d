"""`CheckpointingTrainer`: a Trainer that loses nothing when it is killed, and ends in order when it is told to."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..errors import UsageError
from .checkpoints import STATE, delete_old_checkpoints, new_checkpoint
from .stopping import Stopped, StopSignals

_RUNNING_LOSS = "running_loss"  # in the state's `stateful_callbacks`


@contextmanager
def _explained(checkpoint: str | None) -> Iterator[None]:
    """A checkpoint of another model or optimizer in one line."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"checkpoint {checkpoint} does not fit this model and optimizer: {reason}") from error


class _SaveBeforeStopping(TrainerCallback):
    """Asks for a checkpoint once a signal came, before other callbacks look whether there will be one."""

    def __init__(self, signals: StopSignals):
        self._signals = signals

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._signals.agree(args.device):
            control.should_save = True


class CheckpointingTrainer(Trainer):
    """Trainer whose checkpoints are atomic and verified, see `checkpoints`, and hold the loss since the last log.

    SIGTERM and SIGUSR1 end training after the step under way: a checkpoint is written, then `Stopped` raised.
    """

    def __init__(self, *positional: Any, **named: Any):
        super().__init__(*positional, **named)
        self._signals = StopSignals()
        self.add_callback(_SaveBeforeStopping(self._signals))

    def train(self, *positional: Any, **named: Any) -> TrainOutput:
        with self._signals:
            return super().train(*positional, **named)

    def _maybe_log_save_evaluate(self, *positional: Any, **named: Any) -> None:
        super()._maybe_log_save_evaluate(*positional, **named)
        if self._signals.agreed is not None:
            raise Stopped(self._signals.agreed)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; under FSDP a checkpoint may be sharded, but a model that a user saves is whole."""
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir)
        plugin.set_state_dict_type(kind)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, except that the folder gets its name when it is complete (see `checkpoints`)."""
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        with new_checkpoint(checkpoint, is_first=self.args.should_save) as folder:
            self._write_checkpoint(str(folder), checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            delete_old_checkpoints(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, folder: str, checkpoint: Path) -> None:
        """Weights, optimizer, schedule, random numbers and, last, the state of the run, into `folder`."""
        self.save_model(folder, _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
        self._export(_RUNNING_LOSS, self._running_loss())
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == checkpoint or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            exported = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
            for one in [*exported, self.control]:
                self._export(type(one).__name__, one.state())
            self.state.save_to_json(os.path.join(folder, STATE))

    def _export(self, name: str, state: dict[str, Any]) -> None:
        """Put the state of a callback where Trainer looks for it: a list for those of which there are several."""
        if isinstance(self.state.stateful_callbacks.get(name), list):
            self.state.stateful_callbacks[name].append(state)
        else:
            self.state.stateful_callbacks[name] = state

    def _running_loss(self) -> dict[str, float]:
        """What the next log takes its mean of: the sum of losses since the last one, and the step of that."""
        total = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        return {"sum": total, "last_logged_step": self._globalstep_last_logged}

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        """Trainer's; a resumed run logs the mean over all steps since the last log, as an uninterrupted one does."""
        if (stored := self.state.stateful_callbacks.pop(_RUNNING_LOSS, None)) is not None:
            self._tr_loss += stored["sum"]
            self._total_loss_scalar -= stored["sum"]  # the loss of the whole training is that of this process' steps
            self._globalstep_last_logged = stored["last_logged_step"]
        super()._run_epoch(*positional, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *positional: Any) -> None:
        with _explained(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *positional)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _explained(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Every weight must come from the checkpoint; a tied one does under its other name."""
        differing = {*load_result.missing_keys, *load_result.unexpected_keys} - self.model.all_tied_weights_keys.keys()
        if differing:
            raise RuntimeError(f"{sorted(differing)[0]} is in one of them only")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trainer's; safetensors lets only the owner read its files: they get the mode of the others.

        Without the token, which would lie in clear in `training_args.bin`.
        """
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "training_args.bin", path)
