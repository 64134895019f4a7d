"""Fine-tune any causal model with LoRA by Muon, StiefelMuon or AdamW, and watch the spectra of BA.

python scripts/finetune.py --model results/NAME --dataset my.jsonl --train_tokens 1000000 --track_manifold true
python scripts/finetune.py --model HUB_ID --dataset my.jsonl --optimizer manifold --lora_experts true

`--optimizer manifold` keeps the columns of every B orthonormal (StiefelMuon) and gives A to Muon. The run folder holds
the adapter; `PeftModel.from_pretrained(base, FOLDER)` loads it, `--merge true` writes the merged model into
FOLDER/merged, `--push_to_hub true --hub_model_id USER/NAME` shares the adapter, as push_to_hub.py does. All other
arguments are those of train_llm.py.
"""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from blueberry.errors import UsageError, run_script

EXPERTS = ".experts."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class AdapterArguments:
    """What to fine-tune, and what the adapter reaches."""

    model: str = field(default="", metadata={"help": "Folder of a run or model, or Hub id; ID@REVISION."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the modeling code of the model's author."})
    lora_r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: float = field(default=16.0, metadata={"help": "BA is scaled by alpha / r."})
    lora_targets: list[str] = field(
        default_factory=lambda: list(ATTENTION), metadata={"help": "Names of linear layers; or all-linear."}
    )
    lora_experts: bool = field(default=False, metadata={"help": "Reach the experts too (stacks of matrices)."})
    merge: bool = field(default=False, metadata={"help": "Also write the model with the adapter merged into it."})

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("--model is missing: name the folder or Hub id of a model")
        if self.lora_r < 1:
            raise UsageError(f"--lora_r {self.lora_r}: must be at least 1")


def main() -> None:
    import train_llm

    from blueberry.training.arguments import BlueberryTrainingArguments
    from blueberry.training.data import DataArguments
    from blueberry.training.parser import BlueberryArgumentParser
    from blueberry.training.resuming import check_same_run, find_checkpoint, is_finished
    from blueberry.training.run_folder import RunFolderCallback, check_run_folder, describe, mend_run_folder

    groups = [AdapterArguments, DataArguments, train_llm.TrackingArguments, BlueberryTrainingArguments]
    adapter_args, data_args, tracking_args, args = BlueberryArgumentParser(groups).parse()
    train_llm.set_up_cpu(args)
    train_llm.check_arguments(data_args, tracking_args, args)
    mend_run_folder(args)
    checkpoint = find_checkpoint(args)
    check_run_folder(args, checkpoint)
    settings = describe(args, adapter_args, data_args, tracking_args)
    check_same_run(settings, checkpoint)
    folder = RunFolderCallback(settings, checkpoint)
    with closing(folder):
        trainer, data = set_up(adapter_args, data_args, tracking_args, args, folder)
        if not is_finished(trainer, checkpoint):
            train_llm.train(trainer, checkpoint, folder)
            train_llm.finish(trainer, data, settings)
        elif trainer.is_world_process_zero():
            train_llm.say_finished(trainer, checkpoint)
            load_trained(trainer)
        if adapter_args.merge and trainer.is_world_process_zero():
            save_merged(trainer, Path(args.output_dir) / "merged")


def set_up(adapter_args, data_args, tracking_args, args, folder):
    """Model, data, adapter, trainer: everything that can fail on bad input."""
    import train_llm
    from peft import get_peft_model
    from transformers import set_seed

    from blueberry.optim.stiefel_lora import start_orthonormal
    from blueberry.training.data import prepare_data
    from blueberry.training.loading import load_model
    from blueberry.training.model import positions
    from blueberry.training.reading import id_and_revision
    from blueberry.training.resuming import check_same_identity, identity

    model = load_model(adapter_args.model, trust_remote_code=adapter_args.trust_remote_code, dtype="float32")
    data_args.tokenizer = data_args.tokenizer or adapter_args.model
    config = model.config
    data = prepare_data(data_args, vocab_size=config.get_text_config().vocab_size, max_positions=positions(config))
    print(data.description)
    folder.identity = identity(args, config, data) | {"base": base_identity(adapter_args.model)}
    check_same_identity(folder.identity, folder.checkpoint)
    pushing = train_llm.pushes(args)
    set_seed(args.seed)
    revision = id_and_revision(adapter_args.model)[1]
    wrapped = get_peft_model(
        model, lora_config(model, adapter_args), revision=None if revision == "main" else revision
    )
    if args.optimizer == "manifold":
        start_orthonormal(wrapped)
    callbacks = [folder, *train_llm.make_callbacks(wrapped, tracking_args, args), *pushing]
    return train_llm.make_trainer(wrapped, data, args, callbacks, trainer_class()), data


def base_identity(source: str) -> str | None:
    """Hash of the files in a folder, or the commit on the Hub: other weights may come under the same name."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    from blueberry.benchmarks import digest
    from blueberry.training.reading import id_and_revision

    if files := sorted(Path(source).glob("*.safetensors")):
        return digest(files)
    name, revision = id_and_revision(source)
    config = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return extract_commit_hash(config, None)


def lora_config(model, arguments: AdapterArguments):
    """Attention by default, and the experts by the names of their parameters."""
    from peft import LoraConfig

    targets = arguments.lora_targets
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        check_targets(model, targets)
    experts = sorted({name.split(".layers.")[-1].partition(".")[2] for name, parameter in model.named_parameters()
                      if EXPERTS in name and parameter.ndim == 3})  # fmt: skip
    if arguments.lora_experts and not experts:
        raise UsageError("--lora_experts true: the model has no experts; leave it out")
    return LoraConfig(
        r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=targets, task_type="CAUSAL_LM",
        target_parameters=experts if arguments.lora_experts else None,
    )  # fmt: skip


def check_targets(model, targets: list[str]) -> None:
    """Raises UsageError, with the names of the model's matrices, where one of `targets` is no module of it."""
    import torch

    modules = {name.split(".")[-1]: module for name, module in model.named_modules()}
    matrices = [name for name, module in modules.items() if not isinstance(module, torch.nn.Embedding)
                and any(parameter.ndim == 2 for parameter in module.parameters(recurse=False))]  # fmt: skip
    if missing := [target for target in targets if target not in modules]:
        raise UsageError(f"--lora_targets {missing[0]}: the model has no module of this name; choose from "
                         f"{', '.join(matrices)}, or write all-linear")  # fmt: skip


def trainer_class():
    """BlueberryTrainer, with StiefelMuon for the factors B where the optimizer is `manifold`."""
    from blueberry import BlueberryTrainer
    from blueberry.optim.stiefel_lora import create_stiefel_lora_optimizer

    class LoraTrainer(BlueberryTrainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None and self.args.optimizer == "manifold":
                args = self.args
                self.optimizer = create_stiefel_lora_optimizer(
                    self.model if model is None else model, muon_lr=args.muon_lr, momentum=args.muon_momentum,
                    adamw_lr=args.adamw_lr, adam_beta1=args.adam_beta1, adam_beta2=args.adam_beta2,
                    adam_epsilon=args.adam_epsilon, max_grad_norm=args.max_grad_norm, weight_decay=args.weight_decay,
                )  # fmt: skip
            return super().create_optimizer(model)

    return LoraTrainer


def load_trained(trainer) -> None:
    """The adapter of a finished run, in place of the fresh one."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(trainer.model, load_peft_weights(trainer.args.output_dir))


def save_merged(trainer, folder: Path) -> None:
    """A model that needs no PEFT."""
    merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    merged.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    print(f"merged model {folder}")


if __name__ == "__main__":
    run_script(main)
