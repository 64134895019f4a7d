"""What a user can set about a training run, and the mapping of TrainingArguments onto the hybrid optimizer."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import torch
from huggingface_hub import get_token
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from ..errors import UsageError
from ..optim.build import OPTIMIZERS
from ..optim.manifold import PRESETS
from ..optim.muon import SCALE_MODES
from .hub_access import hub_is_reachable

# Names, what is accepted (None passes), and how to say it.
_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps",
     lambda value: value >= 1, "at least 1"),
    ("muon_lr adamw_lr hypersphere_lr learning_rate weight_decay max_grad_norm warmup_steps "
     "dataloader_num_workers eval_delay neftune_noise_alpha",
     lambda value: 0 <= value < inf, "a finite number of at least 0"),
    ("muon_momentum adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ("label_smoothing_factor", lambda value: value == 0,
     "0: Trainer would take the labels from the model, and with them its router losses; leave it out"),
    ("adam_epsilon num_train_epochs logging_steps eval_steps save_steps", lambda value: 0 < value < inf,
     "a finite number above 0"),
    ("seed data_seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    ("max_steps", lambda value: value == -1 or value >= 1, "at least 1 (or -1: not set)"),
)  # fmt: skip
_CHOICES = {
    "lr_scheduler_type": SchedulerType,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
}
# The optimizers that take a setting.
TAKEN_BY = dict.fromkeys(("muon_lr", "muon_momentum", "scale_mode"), ("muon", "manifold")) | dict.fromkeys(
    ("manifold_preset", "manifold_attention_only", "manifold_modular_lr", "hypersphere_lr"), ("manifold",)
)
_NO_ZERO = (
    "is not supported: Muon needs whole matrices, and ZeRO cuts them up; shard with FSDP2, `accelerate launch "
    "--config_file scripts/accelerate_configs/fsdp2.yaml`"
)
_ADAMW_NAMES = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


def default_output_dir(run_name: str | None, optimizer: str | None) -> str:
    """Where a run goes that was told no `output_dir`."""
    return os.path.join("results", run_name or f"blueberry-{optimizer or 'muon'}")


@dataclass
class BlueberryTrainingArguments(TrainingArguments):
    """TrainingArguments of the hybrid optimizer: two learning rates, a budget in tokens, defaults for pre-training.

    Arguments of TrainingArguments that the hybrid optimizer would ignore are mapped (`weight_decay`, `adam_*`,
    `max_grad_norm`; `learning_rate` with `optimizer="adamw"`) or refused with the remedy (`learning_rate` with Muon,
    `optim`, `max_steps` or `num_train_epochs` beside `train_tokens`).
    """

    optimizer: str = field(
        default="muon",
        metadata={
            "help": "muon (hybrid of Muon and AdamW), adamw (everything), or manifold (matrices stay orthonormal, "
            "embedding and router rows keep their norms)."
        },
    )
    muon_lr: float = field(default=0.02, metadata={"help": "Learning rate of hidden matrices and experts."})
    adamw_lr: float = field(default=0.008, metadata={"help": "Learning rate of what AdamW optimizes."})
    muon_momentum: float = field(default=0.95, metadata={"help": "Muon's momentum; 0 switches it off."})
    scale_mode: str = field(
        default="shape",
        metadata={"help": "Muon's update scale: shape, rms_match (AdamW's learning rates carry over) or none."},
    )
    manifold_preset: str = field(
        default="balanced",
        metadata={"help": "conservative, balanced or aggressive: dual steps of --optimizer manifold (not its lr)."},
    )
    manifold_attention_only: bool = field(
        default=False, metadata={"help": "Constrain the attention's matrices only; Muon and AdamW take the rest."}
    )
    manifold_modular_lr: bool = field(
        default=False, metadata={"help": "Scale the lr of orthonormal matrices by (layer+1)/layers * sqrt(out/in)."}
    )
    hypersphere_lr: float | None = field(
        default=None,
        metadata={
            "help": "Step of embedding and router rows over their norm, with manifold (default: 10 times --muon_lr)."
        },
    )
    share_optimizer_work: bool = field(
        default=True,
        metadata={
            "help": "Data-parallel processes (DDP) share Newton-Schulz and the Stiefel solver out among them; false: "
            "each does all of it, and they send one another nothing but gradients."
        },
    )
    train_tokens: int | None = field(
        default=None, metadata={"help": "Tokens to train on, over all processes; sets the number of steps."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that output_dir already holds by a new one."}
    )

    # Defaults of TrainingArguments that differ for pre-training.
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run; results/<run_name> unless given."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "With --optimizer adamw the same as --adamw_lr; refused with Muon."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the data (default 1); not together with --train_tokens."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's decay of the squared gradient."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "constant, cosine, linear, warmup_stable_decay or any of transformers'."}
    )
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Linear warm-up: steps, or a share of all steps if below 1."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Windows per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Windows per device in evaluation."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs, or a share of all steps."})
    eval_delay: float = field(default=0.0, metadata={"help": "Steps or epochs before the first evaluation."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    include_num_input_tokens_seen: str | bool = field(default=True, metadata={"help": "Count the tokens seen."})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch."})
    eval_steps: float | None = field(default=0.5, metadata={"help": "Steps between evaluations, or a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (HfArgumentParser reads the order)
        default="tensorboard", metadata={"help": "Where logs go: tensorboard, wandb, trackio, ..., none."}
    )

    def __post_init__(self) -> None:
        self._check_optimizer()
        self._check_numbers()
        self._check_choices()
        self._check_scheduler_settings()
        self._map_learning_rate()
        self._check_budget()
        if self.output_dir is None:
            self._check_run_name()
            self.output_dir = default_output_dir(self.run_name, self.optimizer)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # TrainingArguments would refuse bf16
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise UsageError("--fp16 true does nothing on a CPU: use --bf16 true")
        self._check_processes()
        self._check_engine()
        self._check_services()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"

    def _check_optimizer(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"--optimizer {self.optimizer} is unknown: use one of {', '.join(OPTIMIZERS)}")
        if self.scale_mode not in SCALE_MODES:
            raise UsageError(f"--scale_mode {self.scale_mode} is unknown: use one of {', '.join(SCALE_MODES)}")
        if self.optim not in _ADAMW_NAMES:
            raise UsageError(f"--optim {self.optim} has no effect here: use --optimizer muon, adamw or manifold")
        for name in ("optim_args", "optim_target_modules"):
            if getattr(self, name) is not None:
                raise UsageError(f"--{name} {getattr(self, name)} has no effect on the hybrid optimizer: remove it")
        if self.manifold_preset not in PRESETS:
            raise UsageError(f"--manifold_preset {self.manifold_preset} is unknown: use one of {', '.join(PRESETS)}")
        if self.deepspeed is not None:
            raise UsageError(f"--deepspeed {_NO_ZERO}")
        self._check_taken()

    def _check_taken(self) -> None:
        """Settings of another optimizer would silently do nothing."""
        for name, optimizers in TAKEN_BY.items():
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default and self.optimizer not in optimizers:
                raise UsageError(
                    f"--{name} {value} does nothing with --optimizer {self.optimizer}, only with "
                    f"{' or '.join(optimizers)}: leave one of them out"
                )
        if self.manifold_attention_only and self.hypersphere_lr is not None:
            raise UsageError(
                f"--hypersphere_lr {self.hypersphere_lr} does nothing with --manifold_attention_only true: leave one "
                "of them out"
            )

    def _check_numbers(self) -> None:
        """Values that would fail, or silently do nothing, only once data and model are there."""
        for names, is_good, rule in _NUMBERS:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not is_good(value):
                    raise UsageError(f"--{name} {value}: must be {rule}")

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in list(choices):
                raise UsageError(f"--{name} {getattr(self, name)} is unknown: use one of {', '.join(choices)}")

    def _check_scheduler_settings(self) -> None:
        text = self.lr_scheduler_kwargs
        if isinstance(text, str):
            try:
                values = json.loads(text)
            except ValueError as error:
                raise UsageError(
                    f'--lr_scheduler_kwargs {text} is no JSON ({error}): write {{"min_lr": 0.001}}'
                ) from error
            if not isinstance(values, dict):
                raise UsageError(f'--lr_scheduler_kwargs {text} names no setting: write {{"min_lr": 0.001}}')

    def _check_run_name(self) -> None:
        """The folder under results/ that it names must lie there."""
        if self.run_name and (self.run_name in (".", "..") or os.path.basename(self.run_name) != self.run_name):
            raise UsageError(f"--run_name {self.run_name} names no folder in results/: use --output_dir for a path")

    def _check_services(self) -> None:
        """Trackers that are not installed, and a Hub that would refuse the first push."""
        installed = get_available_reporting_integrations()
        for name in self.report_to:
            if name not in installed:
                has = "is not installed" if name in INTEGRATION_TO_CALLBACK else "is unknown"
                raise UsageError(f"--report_to {name} {has}: choose none or from {', '.join(installed)}")
        if self.push_to_hub and (self.hub_token or get_token()) is None:
            raise UsageError("--push_to_hub true needs a Hub token: run `hf auth login`, or set HF_TOKEN")
        if self.push_to_hub and not hub_is_reachable():
            raise UsageError("--push_to_hub true needs the Hub, which cannot be reached: leave it out, push later")

    def _map_learning_rate(self) -> None:
        if self.learning_rate is not None:
            if self.optimizer != "adamw":
                raise UsageError(
                    f"--learning_rate {self.learning_rate} is ambiguous for the hybrid optimizer: "
                    "use --muon_lr (matrices, experts) and --adamw_lr (the rest)"
                )
            if self.adamw_lr not in (self.learning_rate, self.__dataclass_fields__["adamw_lr"].default):
                raise UsageError(
                    f"--learning_rate {self.learning_rate} and --adamw_lr {self.adamw_lr} set the same: give one"
                )
            self.adamw_lr = self.learning_rate
        self.learning_rate = self.adamw_lr

    def _check_budget(self) -> None:
        if self.train_tokens is not None:
            if self.train_tokens < 1:
                raise UsageError(f"--train_tokens {self.train_tokens} trains nothing: give a positive number")
            if self.max_steps > 0:
                raise UsageError(f"--max_steps {self.max_steps} and --train_tokens {self.train_tokens} both set the "
                                 "length of training: give one")  # fmt: skip
            if self.num_train_epochs is not None:
                raise UsageError(f"--num_train_epochs {self.num_train_epochs} and --train_tokens {self.train_tokens} "
                                 "both set the length of training: give one")  # fmt: skip
        if self.num_train_epochs is None:
            self.num_train_epochs = 1.0

    def _check_engine(self) -> None:
        """Engines that cut matrices up, or were asked for, by variables of `accelerate launch`, and are not on."""
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise UsageError(f"accelerate's DeepSpeed {_NO_ZERO}")
        is_launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if not is_launched and not self.fsdp:
            return
        version = os.environ.get("FSDP_VERSION", "1") if is_launched else self.fsdp_plugin_args["fsdp_version"]
        if int(version) != 2:
            raise UsageError(f"fsdp_version {version}: FSDP1 flattens matrices, which Muon needs whole; set it to 2")
        if self.device.type == "cpu":
            raise UsageError(
                "FSDP was asked for and is not on: accelerate has it on GPUs only; use scripts/accelerate_configs/"
                "multi_cpu.yaml (DDP)"
            )

    def _check_processes(self) -> None:
        """Processes that did not find each other would train apart and write over one another."""
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise UsageError(
                f"{launched} processes were launched but {self.world_size} is running: on CPUs pass --use_cpu true"
            )
