"""Pushing while training: the strategies of `TrainingArguments.hub_strategy`, each push one commit."""

import logging
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from huggingface_hub import HfApi
from torch.distributed.fsdp import StateDictType
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from blueberry.errors import UsageError
from blueberry.training.checkpoints import STATE
from blueberry.training.manifest import MANIFEST, write_manifest
from blueberry.training.reading import local_arguments
from blueberry.training.run_folder import read_yaml

from .bundle import Bundle, check_clean, is_of_a_model, model_files, scrubbed
from .events import scrubbed_events
from .publish import publish
from .push import Destination, insist, push, reserve
from .run import CONFIG
from .scrub import Scrubber
from .sharding import sharded

logger = logging.getLogger(__name__)

_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


def destination_of(args: TrainingArguments) -> Destination:
    """Where `args` push to: the account of the token and the name of the folder, unless `hub_model_id` says more."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    if "/" not in name:
        whoami = HfApi(token=args.hub_token).whoami
        name = f"{insist(whoami, f'--hub_model_id {name}', args.hub_token)['name']}/{name}"
    return Destination(
        name, revision=args.hub_revision, private=bool(args.hub_private_repo), token=args.hub_token,
        argument="--hub_model_id",
    )  # fmt: skip


class PushToHubCallback(TrainerCallback):
    """Pushes the model of every checkpoint, and with `checkpoint` or `all_checkpoints` what to resume it from too.

    Training waits for a push; one that fails is a warning, and the next one brings everything. With `end` it pushes
    nothing until `finish` is called, which pushes the folder of a finished run with its card. It takes the place of
    Trainer's own pushing, which would upload pickled arguments and names of hosts and folders: leave `push_to_hub` of
    the arguments unset beside it.
    """

    def __init__(self, destination: Destination, strategy: HubStrategy | str = HubStrategy.EVERY_SAVE):
        self.destination, self.strategy = destination, HubStrategy(strategy)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out now whether the Hub will take it. UsageError if not, or if there will be nothing to push."""
        if self.strategy != HubStrategy.END and checkpoints_are_sharded():
            raise UsageError(
                f"--hub_strategy {self.strategy.value}: sharded checkpoints (SHARDED_STATE_DICT) hold no model that "
                "could be pushed; set --hub_strategy end, or FULL_STATE_DICT"
            )
        if state.is_world_process_zero:
            reserve(self.destination)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the checkpoint that was just written."""
        if self.strategy == HubStrategy.END or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        try:
            bundle = self._bundle(Path(args.output_dir), checkpoint)
            message = f"Training in progress, step {state.global_step}"
            push(self.destination, bundle.files, message, replaces=is_of_a_model)
        except (OSError, ValueError) as error:  # files that cannot be read, and UsageError
            logger.warning("step %d was not pushed: %s", state.global_step, error)

    def finish(self, run: Path) -> str:
        """Push the finished run; the address of the commit."""
        return publish([run], self.destination).commit_url

    def _bundle(self, run: Path, checkpoint: Path) -> Bundle:
        settings = read_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
        paths = [settings[name] for name in local_arguments(settings)]
        scrub = Scrubber(run, public=self.destination.account, tokens=(self.destination.token,), paths=paths)
        bundle = Bundle()
        bundle.files |= model_files(checkpoint, scrub) | sharded(checkpoint, Path(bundle.scratch.name), "5GB")
        bundle.files |= {f"runs/{name}": text for name, text in scrubbed_events(run / "runs", scrub).items()}
        if self.strategy in _CHECKPOINTS:
            name = "last-checkpoint" if self.strategy == HubStrategy.CHECKPOINT else checkpoint.name
            bundle.files |= {f"{name}/{path}": file for path, file in _resumable(checkpoint, bundle, scrub).items()}
        check_clean(bundle.files, scrub)
        return bundle


def checkpoints_are_sharded() -> bool:
    """Whether FSDP writes what each process has by itself."""
    state = AcceleratorState()
    if state.distributed_type != DistributedType.FSDP:
        return False
    return state.fsdp_plugin.state_dict_type != StateDictType.FULL_STATE_DICT


def _resumable(checkpoint: Path, bundle: Bundle, scrub: Scrubber) -> dict[str, Path]:
    """A checkpoint without pickled arguments and local paths, and with the manifest of what is left."""
    folder = Path(bundle.scratch.name) / checkpoint.name
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name == STATE:
            (folder / path.name).write_bytes(scrubbed(path, scrub))
        elif path.name not in (MANIFEST, "training_args.bin"):
            (folder / path.name).symlink_to(path.resolve())
    write_manifest(folder)
    return {path.name: path for path in folder.iterdir()}
