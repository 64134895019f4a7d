"""What a run prints at its end."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import PreparedData
from .model import positions
from .trainer import BlueberryTrainer


def final_metrics(trainer: BlueberryTrainer) -> dict[str, float]:
    """Validation metrics of the final model; not computed again if the last step was evaluated."""
    last = next((row for row in reversed(trainer.state.log_history) if "eval_loss" in row), {})
    if last.get("step") != trainer.state.global_step or trainer.args.load_best_model_at_end:
        last = trainer.evaluate()
    return {name: value for name, value in last.items() if name.startswith("eval_")}


def print_summary(
    trainer: BlueberryTrainer, data: PreparedData, metrics: dict[str, float], logging_dir: str | None
) -> None:
    """One short table: tokens, time, speed, losses, where things are.

    logging_dir: of TensorBoard; None without it.
    """
    final = next((row for row in reversed(trainer.state.log_history) if "train_runtime" in row), {})
    seconds = final.get("train_runtime", 0.0)
    tokens = trainer.state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    folder = Path(trainer.args.output_dir)
    shown = lambda name, digits=4: f"{metrics[f'eval_{name}']:.{digits}f}" if f"eval_{name}" in metrics else "unknown"
    rows = {
        "tokens": f"{trainer.state.num_input_tokens_seen:,} in {trainer.state.global_step:,} steps",
        "time": f"{seconds:.0f} s",
        "tokens/s": f"{tokens / max(seconds, 1e-9):,.0f}",
        "validation loss": f"{shown('loss')} (unigram model of the same text {data.unigram_loss:.4f})",
        "perplexity": shown("perplexity", 2),
        "next-token accuracy": shown("accuracy"),
        "bits per byte": shown("bits_per_byte"),
        "model": str(folder),
    }
    if logging_dir is not None:
        rows["TensorBoard"] = f"tensorboard --logdir {logging_dir}"
    if (folder / "spectral_log").is_dir():
        rows["spectra"] = f"python scripts/track_manifold.py --plot_only --run {folder}"
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


@torch.inference_mode()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str = "The", length: int = 40) -> str:
    """The prompt and `length` new tokens at most, as far as the model has positions, drawn with the KV cache."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    limit = positions(model.config)
    room = length if limit is None else min(length, limit - inputs["input_ids"].shape[1])
    ids = model.generate(**inputs, max_new_tokens=room, do_sample=True, top_k=50)
    return tokenizer.decode(ids[0], skip_special_tokens=True)
