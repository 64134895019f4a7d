"""What a model refuses to read, and to write: one line that names the value and the remedy.

Values are looked at on the CPU only: elsewhere the look would stall the device, whose own assertion will fire. The
file ships to the Hub as remote code, so it imports torch and transformers only.
"""

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_input(
    input_ids: Tensor | None,  # (batch, seq)
    inputs_embeds: Tensor | None,  # (batch, seq, hidden)
    attention_mask: Tensor | None,
    past: int | Tensor,  # tokens in the cache
    vocab_size: int,
    max_positions: int,
) -> None:
    """Raise ValueError unless there is exactly one of the first two, a batch of known ids, and a mask of its size.

    More positions than the model was made for are computed, with a warning.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if torch.compiler.is_compiling():
        return
    given, dims = (inputs_embeds, "(batch, seq, hidden)") if input_ids is None else (input_ids, "(batch, seq)")
    if given.dim() != dims.count(",") + 1:
        raise ValueError(f"input of shape {tuple(given.shape)} must have shape {dims}: a batch of sequences")
    if given.numel() == 0:
        raise ValueError(f"empty input of shape {tuple(given.shape)}: give at least one sequence of one token")
    if input_ids is not None:
        _check_ids(input_ids, vocab_size)
    batch, seq = given.shape[:2]
    total = past + seq if isinstance(past, int) else seq  # a static cache counts on the device
    if isinstance(attention_mask, Tensor):
        _check_mask(attention_mask, batch, total, exactly=isinstance(past, int))
    if total > max_positions:
        logger.warning_once(
            f"position {total} is beyond max_position_embeddings={max_positions}: rotary angles are extrapolated, and "
            "the output may be poor; shorten the input, or set rope_parameters for long sequences"
        )


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    if input_ids.device.type != "cpu":
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}: "
            "use the tokenizer of this model, or resize_token_embeddings"
        )


def _check_mask(attention_mask: Tensor, batch: int, total: int, exactly: bool) -> None:
    """A mask that does not reach the last token would hide it (transformers fills in zeros); one whose columns are
    known to be too many has those of other tokens."""
    if attention_mask.dim() == 4 and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        return
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} and {attention_mask.dtype}: give (batch, tokens), "
            "or (batch, 1 or heads, seq, tokens) as booleans or as numbers that are added to the scores"
        )
    rows, columns = attention_mask.shape
    if rows != batch or columns < total or (exactly and columns > total):
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit {batch} sequences of {total} tokens"
            ": give one column for each token of the cache and of the input"
        )


def check_labels(labels: Tensor, shape: tuple[int, int], vocab_size: int, ignore_index: int = -100) -> None:
    """Raise ValueError unless there is a label for each token (batch, seq), a token id or `ignore_index`."""
    if torch.compiler.is_compiling():
        return
    if labels.shape != shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit an input of {tuple(shape)}: one a token")
    if labels.device.type != "cpu":
        return
    low, high = (int(bound) for bound in labels.masked_fill(labels == ignore_index, 0).aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"label {low if low < 0 else high} is outside the vocabulary of {vocab_size}: "
            f"use the tokenizer of this model, and {ignore_index} for tokens without a loss"
        )


class RefuseNaN(LogitsProcessor):
    """Raise ValueError where logits are NaN: their argmax would be token 0, again and again. Not in CUDA graphs."""

    supports_continuous_batching = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (batch, vocab) as they are."""
        captured = torch.compiler.is_compiling() or (scores.is_cuda and torch.cuda.is_current_stream_capturing())
        if not captured and scores.amax().isnan():  # one pass: the maximum of anything with NaN is NaN
            bad = int(scores.isnan().any(dim=-1).sum())
            raise ValueError(f"logits of {bad} of {len(scores)} sequences are NaN: the model's weights are damaged")
        return scores
