"""From documents to windows: tokenize, join with the end-of-text token, cut without overlap.

One generator serves the map-style path (cached on disk, memory-mapped) and the streaming path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from blueberry.errors import UsageError
from blueberry.training.reading import documents_in_batches

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

BATCH_SIZE = 2_000_000
RECIPE = "windows-2"  # part of the cache key: raise it when packing changes its result


@dataclass(frozen=True)
class TextEncoder:
    """Text -> token ids, each document followed by `eos_token_id`.

    Attributes:
        backend: a `tokenizers.Tokenizer` without truncation and padding.
        eos_token_id: set after every document.
        process: id of the one that has the backend's threads.
    """

    backend: Tokenizer
    eos_token_id: int
    column: str = "text"
    process: int = field(default_factory=os.getpid)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
        """From a fast tokenizer, whose own settings stay as they are."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, tokenizer.eos_token_id)

    def __call__(self, batch: dict) -> np.ndarray:
        """Texts of a batch -> (tokens,) int32."""
        texts = [text for text in batch["text"] if text and text.strip()]
        end = np.array([self.eos_token_id], dtype=np.int32)
        parts = []
        for encoding in self._encode(texts):
            parts += [np.array(encoding.ids, dtype=np.int32), end]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        """On all cores; in another process, as a data loader's worker is, on one: threads do not follow a fork."""
        self.backend.encode_special_tokens = True  # `<|endoftext|>` written in a text is text (lost when pickled)
        if os.getpid() == self.process:
            return self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self.backend.encode(text, add_special_tokens=False) for text in texts]

    def key(self) -> str:
        """Changes whenever the ids can change."""
        return f"{self.eos_token_id} {self.backend.to_str()}"


@dataclass(frozen=True)
class RowChecker:
    """Already tokenized rows -> their ids as they are, after checks.

    Attributes:
        vocab_size: ids must be below.
        max_row: longest row that is accepted, None = any.
    """

    vocab_size: int
    max_row: int | None = None
    column: str = "input_ids"

    def __call__(self, batch: dict) -> np.ndarray:
        """Rows of a batch -> (tokens,) int32; UsageError for ids, lengths or labels that this trainer cannot use."""
        rows = []
        for row, labels in zip(batch["input_ids"], batch.get("labels", batch["input_ids"]), strict=True):
            if row is None or len(row) == 0:
                continue
            self._check_row(row)
            if not np.array_equal(row, labels):
                raise UsageError(
                    "labels differ from input_ids (masked tokens?); this trainer trains on every token, drop `labels`"
                )
            rows.append(row.astype(np.int32))
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)

    def _check_row(self, row: np.ndarray) -> None:
        if not 0 <= row.min() <= row.max() < self.vocab_size:
            worst = row.min() if row.min() < 0 else row.max()
            raise UsageError(
                f"token id {worst} is outside the model's vocabulary of {self.vocab_size}; raise --vocab_size to "
                "that of the tokenizer that made the data"
            )
        if self.max_row is not None and len(row) > self.max_row:
            raise UsageError(
                f"a tokenized row has {len(row)} tokens, the model {self.max_row} positions; "
                f"--max_length {self.max_row} cuts rows anew, or give the model max_position_embeddings {len(row)}"
            )

    def key(self) -> str:
        """Changes whenever the verdict can change."""
        return f"{self.vocab_size} {self.max_row}"


Encoder = TextEncoder | RowChecker


def pack(arrays: Iterable[np.ndarray], max_length: int) -> Iterator[np.ndarray]:
    """Join token arrays and cut windows of (max_length,): no token twice, none lost but the tail."""
    rest = np.empty(0, dtype=np.int32)
    for array in arrays:
        tokens = np.concatenate([rest, array])
        whole = len(tokens) // max_length * max_length
        yield from tokens[:whole].reshape(-1, max_length)
        rest = tokens[whole:]


def windows(
    documents: Dataset | IterableDataset, encoder: Encoder, max_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Training rows, at least one: `input_ids` and equal `labels` (the model shifts), each (max_length,) int32."""
    window = None
    for window in pack(token_arrays(documents, encoder), max_length):
        yield {"input_ids": window, "labels": window}
    if window is None:
        raise UsageError(f"the training text is shorter than one window of {max_length} tokens; lower --max_length")


def token_arrays(documents: Dataset | IterableDataset, encoder: Encoder) -> Iterator[np.ndarray]:
    """Token ids of the documents, an array per batch of documents, with a progress bar after two seconds."""
    from datasets import Dataset
    from tqdm.auto import tqdm

    counted = isinstance(documents, Dataset)
    bar = tqdm(total=len(documents) if counted else None, desc="Tokenizing", unit="doc", delay=2, disable=not counted)
    for batch in _merge_batches(documents_in_batches(documents, encoder.column, batch_size=32), encoder.column):
        yield encoder(batch)
        bar.update(len(batch[encoder.column]))
    bar.close()


def _merge_batches(batches: Iterable[dict], column: str) -> Iterator[dict]:
    """Batches of at least BATCH_SIZE characters or tokens: work for all cores, whatever the documents' length."""
    pending, size = [], 0
    for batch in batches:
        pending.append(batch)
        size += sum(len(document) for document in batch[column] if document is not None)
        if size >= BATCH_SIZE:
            yield {key: [value for part in pending for value in part[key]] for key in batch}
            pending, size = [], 0
    if pending:
        yield {key: [value for part in pending for value in part[key]] for key in pending[0]}


def window_features() -> Features:
    """Columns of a packed dataset."""
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


def pack_to_disk(documents: Dataset, content: str, encoder: Encoder, max_length: int, cache: str) -> Dataset:
    """Windows in a memory-mapped dataset under `cache`, made once per content, encoder and length."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    key = hashlib.sha256("\n".join([RECIPE, content, encoder.key(), str(max_length)]).encode()).hexdigest()
    arguments = {"documents": documents, "encoder": encoder, "max_length": max_length}
    try:
        with _own_progress_bar_only():
            return Dataset.from_generator(
                windows, features=window_features(), cache_dir=cache, gen_kwargs=arguments, fingerprint=key
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise


@contextmanager
def _own_progress_bar_only() -> Iterator[None]:
    """Without the bar of `datasets`, which knows no total."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def pack_stream(documents: IterableDataset, encoder: Encoder, max_length: int) -> IterableDataset:
    """The same windows, made while they are read; nothing is kept."""
    from datasets import IterableDataset

    arguments = {"documents": documents, "encoder": encoder, "max_length": max_length}
    return IterableDataset.from_generator(windows, features=window_features(), gen_kwargs=arguments)
