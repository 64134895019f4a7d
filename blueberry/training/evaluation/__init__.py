"""Evaluation of a language model inside `Trainer`: accuracy, perplexity, bits per byte.

The metrics are `evaluate` modules in this folder; they load by path, without network. For a Trainer::

    Trainer(..., preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=partial(compute_metrics, bytes_per_token=data.bytes_per_token))
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluate import EvaluationModule
    from torch import Tensor
    from transformers import EvalPrediction

METRICS = ("token_accuracy", "perplexity", "bits_per_byte")
IGNORE_INDEX = -100
CHUNK = 1024  # tokens whose logits are in fp32 at once: 1024 x 49152 x 4 bytes = 192 MiB


@cache
def load_metrics() -> dict[str, EvaluationModule]:
    """The three metric modules by name. `import evaluate` takes seconds, so it waits for the first call."""
    import evaluate

    folder = Path(__file__).parent
    return {name: evaluate.load(str(folder / name), keep_in_memory=True) for name in METRICS}


def preprocess_logits_for_metrics(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce logits on their device, so that (batch, length, vocabulary) is neither gathered nor kept.

    Args:
        logits: (batch, length, vocabulary), or a tuple that starts with it (MoE models add router logits).
        labels: (batch, length), not shifted; -100 does not count.

    Returns:
        predictions: (batch, length - 1) int64, the likeliest next token after each position but the last.
        nll: (batch,) float32, summed negative log-likelihood in nats of each sequence.
    """
    import torch
    from torch.nn.functional import cross_entropy

    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]  # (batch, length - 1)
    step = max(1, CHUNK // len(labels))
    predictions, nll = [], torch.zeros(len(labels), device=logits.device)
    for start in range(0, targets.shape[1], step):
        target = targets[:, start : start + step]  # (batch, step)
        chunk = logits[:, start : start + target.shape[1]].flatten(0, 1).float()  # (batch * step, vocabulary)
        predictions.append(chunk.argmax(dim=-1).view_as(target))
        losses = cross_entropy(chunk, target.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
        nll += losses.view_as(target).sum(dim=1)
    return torch.cat(predictions, dim=1), nll


def compute_metrics(eval_prediction: EvalPrediction, bytes_per_token: float | None = None) -> dict[str, float]:
    """Metrics of a whole evaluation, from what `preprocess_logits_for_metrics` left.

    Args:
        eval_prediction: predictions `(predictions (n, length - 1), nll (n,))`, label_ids (n, length).
        bytes_per_token: mean UTF-8 bytes of a token of the validation text; None = no bits per byte.

    Returns:
        `accuracy`, `perplexity` and, with `bytes_per_token`, `bits_per_byte` (Trainer puts `eval_` in front). They are
        of the language model alone: a router loss that a model adds to its loss is not in them.
    """
    metrics = load_metrics()
    predictions, nll = eval_prediction.predictions
    targets = eval_prediction.label_ids[:, 1:]
    tokens = (targets != IGNORE_INDEX).sum(axis=1)
    result = metrics["token_accuracy"].compute(predictions=predictions, references=targets, ignore_index=IGNORE_INDEX)
    result |= metrics["perplexity"].compute(nll=nll, tokens=tokens)
    if bytes_per_token is not None:
        result |= metrics["bits_per_byte"].compute(nll=nll, bytes=tokens * bytes_per_token)
    return result
