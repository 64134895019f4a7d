"""Train a language model with Muon, watch its spectra, and leave a model that loads back.

    accelerate launch scripts/train_llm.py --preset tiny --train_tokens 1500000 --track_manifold true

`--help` lists every argument; `--config FILE` reads them from YAML, and the command line wins. A run is one folder
(`--output_dir`): config.yaml, runs/ (TensorBoard), spectral_log/, eval_results.json, checkpoint-*, model, tokenizer.
"""

import os
from dataclasses import dataclass, field
from functools import partial

from blueberry.errors import UsageError, run_script

STREAM_SHUFFLE_BUFFER = 1000  # windows


@dataclass
class TrackingArguments:
    """What to watch while training."""

    track_manifold: bool = field(
        default=False, metadata={"help": "Log the spectra of weights and updates (spectral_log/ and TensorBoard)."}
    )
    track_every_n_steps: int | None = field(
        default=None, metadata={"help": "Steps between spectral logs; by default a few dozen logs, dense at first."}
    )


def main() -> None:
    from blueberry.training.cpu import keep_freed_memory, use_idle_cores
    from blueberry.training.parser import BlueberryArgumentParser
    from blueberry.training.run_folder import check_run_folder, describe, find_checkpoint

    model_args, data_args, tracking_args, args = BlueberryArgumentParser(argument_groups()).parse()
    if args.device.type == "cpu":
        keep_freed_memory()
        use_idle_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    checkpoint = find_checkpoint(args)
    check_run_folder(args, checkpoint)
    settings = describe(args, model_args, data_args, tracking_args)
    trainer, data = set_up(model_args, data_args, tracking_args, args)
    start_run_folder(trainer, settings, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, data, settings)


def argument_groups() -> list[type]:
    from blueberry.training.arguments import BlueberryTrainingArguments
    from blueberry.training.data import DataArguments
    from blueberry.training.model import ModelArguments

    return [ModelArguments, DataArguments, TrackingArguments, BlueberryTrainingArguments]


def set_up(model_args, data_args, tracking_args, args):
    """Everything that can fail on bad input, before anything is written: model, data, trainer."""
    from transformers import set_seed

    from blueberry.training.data import prepare_data
    from blueberry.training.model import build_model, load_config

    if data_args.streaming and args.max_steps <= 0 and args.train_tokens is None:
        raise UsageError("--streaming has no known length: give --train_tokens or --max_steps")
    config = load_config(model_args)
    with args.main_process_first():
        data = prepare_data(data_args, vocab_size=config.vocab_size, max_positions=config.max_position_embeddings)
    if args.process_index == 0:
        print(data.description)
    if data_args.streaming:
        data.train = data.train.shuffle(seed=args.data_seed or args.seed, buffer_size=STREAM_SHUFFLE_BUFFER)
    if data.tokenizer is not None:
        config.bos_token_id = config.eos_token_id = data.tokenizer.eos_token_id
        config.pad_token_id = data.tokenizer.pad_token_id
    set_seed(args.seed)
    model = build_model(config)
    return make_trainer(model, data, tracking_args, args), data


def make_trainer(model, data, tracking_args, args):
    from blueberry import BlueberryTrainer
    from blueberry.training.evaluation import compute_metrics, preprocess_logits_for_metrics

    return BlueberryTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        compute_metrics=partial(compute_metrics, bytes_per_token=data.bytes_per_token),
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        callbacks=make_callbacks(model, tracking_args, args),
    )


def make_callbacks(model, tracking_args, args) -> list:
    from trainer_callbacks import (
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
    if tracking_args.track_manifold:
        callbacks.append(SpectralMetricsCallback(every_n_steps=tracking_args.track_every_n_steps, tensorboard=board))
        callbacks.append(StepTimeCallback(board))
        if getattr(model.config, "num_experts", 0):
            callbacks.append(RouterMetricsCallback(board))
    return callbacks


def start_run_folder(trainer, settings, checkpoint) -> None:
    """The first write of a run: its config and the audit of its optimizer."""
    from blueberry.training.run_folder import AUDIT, clear_run_folder, write_config, write_json

    if trainer.is_world_process_zero():
        clear_run_folder(trainer.args, checkpoint)
        write_config(trainer.args.output_dir, settings)
        write_json(trainer.args.output_dir, AUDIT, trainer.create_optimizer().audit())
    trainer.accelerator.wait_for_everyone()


def finish(trainer, data, settings) -> None:
    """Evaluate, save, and say where things are."""
    from blueberry.training.run_folder import EVAL_RESULTS, write_json
    from blueberry.training.summary import final_metrics, print_summary, sample
    from trainer_callbacks import TensorBoardCallback

    metrics = final_metrics(trainer) | {"eval_unigram_loss": data.unigram_loss}
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    write_json(trainer.args.output_dir, EVAL_RESULTS, metrics)
    trainer.state.save_to_json(f"{trainer.args.output_dir}/trainer_state.json")
    board = trainer.pop_callback(TensorBoardCallback)
    if board is not None:
        board.add_hparams(settings, metrics)
    print_summary(trainer, data, metrics)
    if data.tokenizer is not None:
        print(f"\nSample: {sample(trainer.model, data.tokenizer)}")


if __name__ == "__main__":
    run_script(main)
