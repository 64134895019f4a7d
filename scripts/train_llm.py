"""Train a language model with Muon, watch its spectra, and leave a model that loads back.

    accelerate launch scripts/train_llm.py --preset tiny --train_tokens 1500000 --track_manifold true

`--help` lists every argument; `--config FILE` reads them from YAML, and the command line wins. A run is one folder
(`--output_dir`): config.yaml, runs/ (TensorBoard), spectral_log/, eval_results.json, checkpoint-*, model, tokenizer.
"""

import os
import sys
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from blueberry.errors import UsageError, run_script

STREAM_SHUFFLE_BUFFER = 1000  # windows
METRICS = ("loss", "accuracy", "perplexity", "bits_per_byte")

# Values of arguments that are refused, and why.
REFUSED = {
    "prediction_loss_only": (True, "leaves accuracy, perplexity and bits per byte out"),
    "include_num_input_tokens_seen": ("no", "leaves the tokens and their speed at zero"),
    "eval_do_concat_batches": (False, "gives the metrics lists of batches, which they cannot read"),
    "batch_eval_metrics": (True, "asks for means of batches, but a perplexity is none"),
}


@dataclass
class TrackingArguments:
    """What to watch while training."""

    track_manifold: bool = field(
        default=False, metadata={"help": "Log the spectra of weights and updates (spectral_log/ and TensorBoard)."}
    )
    track_every_n_steps: int | None = field(
        default=None,
        metadata={"help": "Steps between spectral logs; by default as many as fit into --track_max_overhead."},
    )
    track_max_overhead: float | None = field(
        default=None,
        metadata={"help": "Share of the training time that tracking may cost; 0.02 unless --track_every_n_steps."},
    )
    on_violation: str = field(
        default="warn",
        metadata={"help": "When a weight of --optimizer manifold leaves its manifold: warn, project or stop."},
    )

    def __post_init__(self) -> None:
        from trainer_callbacks.manifold_constraints import ON_VIOLATION

        for name in ("track_every_n_steps", "track_max_overhead"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"--{name} {value}: must be above 0")
            if value is not None and not self.track_manifold:
                raise UsageError(f"--{name} {value} does nothing without --track_manifold true: add that")
        if self.on_violation not in ON_VIOLATION:
            raise UsageError(f"--on_violation {self.on_violation} is unknown: use one of {', '.join(ON_VIOLATION)}")


def main() -> None:
    from blueberry.training.parser import BlueberryArgumentParser
    from blueberry.training.resuming import check_same_run, find_checkpoint, is_finished
    from blueberry.training.run_folder import (
        RunFolderCallback,
        check_run_folder,
        describe,
        mend_run_folder,
        no_empty_folder_left,
    )
    from blueberry.training.stopping import stop_with_launcher

    stop_with_launcher()
    model_args, data_args, tracking_args, args = BlueberryArgumentParser(argument_groups()).parse()
    set_up_cpu(args)
    check_arguments(data_args, tracking_args, args)
    with args.main_process_first():
        mend_run_folder(args)
    checkpoint = find_checkpoint(args)
    check_run_folder(args, checkpoint)
    settings = describe(args, model_args, data_args, tracking_args)
    check_same_run(settings, checkpoint)
    folder = RunFolderCallback(settings, checkpoint)
    with no_empty_folder_left(Path(args.output_dir)), closing(folder):
        trainer, data = set_up(model_args, data_args, tracking_args, args, folder)
        if not is_finished(trainer, checkpoint):
            train(trainer, checkpoint, folder)
            finish(trainer, data, settings)
        elif trainer.is_world_process_zero():
            say_finished(trainer, checkpoint)


def say_finished(trainer, checkpoint: Path) -> None:
    """Of a run that was to be resumed."""
    from blueberry.training.checkpoints import step_of

    print(f"{trainer.args.output_dir} is finished: {step_of(checkpoint):,} steps taken, {trainer.planned_steps():,} "
          f"asked for; a larger --train_tokens goes on from {checkpoint.name}")  # fmt: skip


def set_up_cpu(args) -> None:
    """What training on a CPU profits from."""
    from blueberry.training.cpu import keep_freed_memory, use_idle_cores, warn_about_slow_bf16

    if args.device.type == "cpu":
        keep_freed_memory()
        use_idle_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if args.bf16:
            warn_about_slow_bf16()


def argument_groups() -> list[type]:
    from blueberry.training.arguments import BlueberryTrainingArguments
    from blueberry.training.data import DataArguments
    from blueberry.training.model import ModelArguments

    return [ModelArguments, DataArguments, TrackingArguments, BlueberryTrainingArguments]


def set_up(model_args, data_args, tracking_args, args, folder):
    """Everything that can fail on bad input, before anything is written: model, data, trainer."""
    from transformers import set_seed

    from blueberry.training.data import prepare_data
    from blueberry.training.model import build_model, check_model, load_config, positions
    from blueberry.training.resuming import check_same_identity, identity
    from trainer_callbacks import SpectralMetricsCallback

    config = load_config(model_args)
    check_model(config)
    with args.main_process_first():
        vocab_size = config.get_text_config().vocab_size
        data = prepare_data(data_args, vocab_size=vocab_size, max_positions=positions(config))
    if args.process_index == 0:
        print(data.description)
    if data_args.streaming:
        # Endless: a run of several passes is one epoch to Trainer, which finds its place in one when it resumes.
        seed = args.seed if args.data_seed is None else args.data_seed
        data.train = data.train.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_BUFFER).repeat(None)
    if data.tokenizer is not None:
        config.bos_token_id = config.eos_token_id = data.tokenizer.eos_token_id
        config.pad_token_id = data.tokenizer.pad_token_id
    folder.identity = identity(args, config, data)
    check_same_identity(folder.identity, folder.checkpoint)
    pushing = pushes(args)
    set_seed(args.seed)
    model = build_model(config)
    trainer = make_trainer(model, data, args, [folder, *make_callbacks(model, tracking_args, args), *pushing])
    if tracking_args.track_manifold and args.report_to:  # what is left beside TensorBoard: wandb, trackio, ...
        trainer.add_callback(trainer.pop_callback(SpectralMetricsCallback).log_through(trainer))
    return trainer, data


def check_arguments(data_args, tracking_args, args) -> None:
    """Refuse what would do nothing, or spoil the results, in a run of this script."""
    if data_args.streaming and args.max_steps <= 0 and args.train_tokens is None:
        raise UsageError("--streaming has no known length: give --train_tokens or --max_steps")
    if tracking_args.on_violation != "warn" and args.optimizer != "manifold":
        raise UsageError(
            f"--on_violation {tracking_args.on_violation} does nothing with --optimizer {args.optimizer}: leave it "
            "out, or use --optimizer manifold"
        )
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in METRICS:
        raise UsageError(f"--metric_for_best_model {wanted} is not evaluated: choose from {', '.join(METRICS)}")
    if args.label_names not in (None, ["labels"]):
        raise UsageError(f"--label_names {' '.join(args.label_names)}: windows have labels only; leave it out")
    for name, (value, why) in REFUSED.items():
        if getattr(args, name) == value:
            raise UsageError(f"--{name} {str(value).lower()} {why}: leave it out")


def check_evaluation(data, args) -> None:
    """Refuse what would evaluate nothing, or fail only then."""
    from datasets import config

    from blueberry.training.cache import writable

    writable(Path(config.HF_MODULES_CACHE), "HF_HOME")  # where `evaluate` copies its modules before it runs them
    batch, windows = args.eval_batch_size * args.world_size, len(data.validation)
    if args.dataloader_drop_last and windows < batch:
        raise UsageError(
            f"--dataloader_drop_last true: {windows} validation windows are less than a batch of {batch}, so none is "
            "left; lower --per_device_eval_batch_size or leave it out"
        )


def make_trainer(model, data, args, callbacks, trainer_class=None):
    """`trainer_class`: BlueberryTrainer unless given."""
    from huggingface_hub.errors import HfHubHTTPError

    from blueberry import BlueberryTrainer
    from blueberry.training.evaluation import compute_metrics, preprocess_logits_for_metrics

    check_evaluation(data, args)
    try:
        return (trainer_class or BlueberryTrainer)(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.tokenizer,
            compute_metrics=partial(compute_metrics, bytes_per_token=data.bytes_per_token),
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=callbacks,
        )
    except UsageError:
        raise
    except (ValueError, ImportError, HfHubHTTPError) as error:  # Trainer's own checks, and the Hub's with push_to_hub
        raise UsageError(" ".join(str(error).split())) from error


def pushes(args) -> list:
    """What takes the place of Trainer's own pushing."""
    if not args.push_to_hub:
        return []
    from hub.callback import PushToHubCallback, destination_of

    args.push_to_hub = False
    return [PushToHubCallback(destination_of(args), args.hub_strategy)]


def make_callbacks(model, tracking_args, args) -> list:
    from trainer_callbacks import (
        ManifoldConstraintCallback,
        RouterMetricsCallback,
        SpectralMetricsCallback,
        StepTimeCallback,
        TensorBoardCallback,
    )

    callbacks, board = [], None
    if "tensorboard" in args.report_to:
        args.report_to.remove("tensorboard")  # ours takes its place: one log in one fixed folder
        board = TensorBoardCallback()
        callbacks.append(board)
    if args.optimizer == "manifold":
        callbacks.append(ManifoldConstraintCallback(board, on_violation=tracking_args.on_violation))
    if tracking_args.track_manifold:
        callbacks.append(
            SpectralMetricsCallback(
                every_n_steps=tracking_args.track_every_n_steps,
                max_overhead=tracking_args.track_max_overhead,
                tensorboard=board,
            )
        )
        callbacks.append(StepTimeCallback(board))
        if getattr(model.config, "num_experts", 0):
            callbacks.append(RouterMetricsCallback(board))
    return callbacks


def train(trainer, checkpoint, folder) -> None:
    """Train; a start that fails leaves nothing behind, Ctrl-C and a signal that stops the run say how to go on."""
    from blueberry.training.resuming import how_to_go_on
    from blueberry.training.stopping import Stopped

    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Stopped as stop:
        stop_writing(trainer)
        if trainer.is_world_process_zero():
            print(f"\n{stop} {how_to_go_on(trainer)}", flush=True)
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        stop_writing(trainer)
        folder.undo(trainer.args, trainer.state)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(how_to_go_on(trainer)) from error
        if isinstance(error, ImportError):  # what an argument asks for and is not installed
            raise UsageError(" ".join(str(error).split())) from error
        raise


def stop_writing(trainer) -> None:
    """Wait for the threads that write into the run folder, and close what they write."""
    from trainer_callbacks import SpectralMetricsCallback, TensorBoardCallback

    for kind in (SpectralMetricsCallback, TensorBoardCallback):
        callback = trainer.pop_callback(kind)
        if callback is not None:
            callback.close()


def finish(trainer, data, settings) -> None:
    """Evaluate, save, and say where things are."""
    from transformers.integrations.integration_utils import rewrite_logs

    from blueberry.training.checkpoints import writing
    from blueberry.training.provenance import provenance
    from blueberry.training.replacing import EVAL_RESULTS, PROVENANCE
    from blueberry.training.run_folder import write_json
    from blueberry.training.summary import final_metrics, print_summary, sample
    from trainer_callbacks import SpectralMetricsCallback, TensorBoardCallback

    metrics = final_metrics(trainer) | {"eval_unigram_loss": data.unigram_loss}
    with writing(Path(trainer.args.output_dir)):
        trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    write_json(folder / EVAL_RESULTS, metrics)
    write_json(folder / PROVENANCE, provenance(trainer, data, settings))
    board = trainer.pop_callback(TensorBoardCallback)
    if board is not None:
        writer = board.writer(trainer.args, trainer.state)
        writer.add_scalar("eval/unigram_loss", data.unigram_loss, trainer.state.global_step)
        board.add_hparams(settings, rewrite_logs(metrics))
    write_state(trainer.state, folder)
    print_summary(trainer, data, metrics, None if board is None else board.logging_dir)
    if tracking := trainer.pop_callback(SpectralMetricsCallback):
        print(tracking.summary())
    if data.tokenizer is not None and not trainer.is_fsdp_enabled:  # of a sharded model all processes would have to
        print(f"\nSample: {sample(trainer.model, data.tokenizer)}")
    if settings["push_to_hub"]:
        push_finished(trainer, folder)


def write_state(state, folder: Path) -> None:
    """All at once, and after everything else: from then on the run is finished."""
    from blueberry.training.checkpoints import STATE

    unfinished = folder / f".{STATE}"
    state.save_to_json(str(unfinished))
    unfinished.replace(folder / STATE)


def push_finished(trainer, folder: Path) -> None:
    """The run with its card."""
    from hub.callback import PushToHubCallback

    pushing = trainer.pop_callback(PushToHubCallback)
    if pushing is not None:
        print(f"\npushed to {pushing.finish(folder)}")


if __name__ == "__main__":
    run_script(main)
