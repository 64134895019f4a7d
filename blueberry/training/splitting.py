"""Split documents into training and validation before anything is packed: no text on both sides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from blueberry.errors import UsageError
from blueberry.training.reading import Corpus, documents_in_batches

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BYTES_PER_TOKEN = 4  # only to turn a bound in tokens into one in bytes of text


@dataclass(frozen=True)
class Split:
    """Training and validation documents, the rule that parted them, and a hash of the training documents.

    `documents` (their number) and `content` are None when training is a stream.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    rule: str
    documents: int | None = None
    content: str | None = None


@dataclass(frozen=True)
class Survey:
    """One pass over all documents; arrays of one entry per document.

    Attributes:
        content: (n,) uint64, hash of the document.
        group: (n,) uint64, hash of its group key (the document itself where there are no groups).
        size: (n,) int64, UTF-8 bytes of a text, tokens of a tokenized row; 0 for a blank document.
        labels: hash of the labels of all documents, where there are some.
    """

    content: np.ndarray
    group: np.ndarray
    size: np.ndarray
    labels: str


def document_bytes(document: str | list[int] | np.ndarray | None) -> bytes:
    """What is hashed of a document: its UTF-8 bytes, or its token ids as int64; empty for a blank one."""
    if isinstance(document, str):
        return document.encode() if document.strip() else b""
    if document is None or len(document) == 0:
        return b""
    ids = np.asarray(document)
    if ids.dtype.kind not in "iu":
        raise UsageError(f"a row of token ids holds {ids.dtype} values (nulls?), not integers; tokenize it anew")
    return ids.astype(np.int64).tobytes()


def hash64(data: bytes) -> int:
    """First 64 bits of BLAKE2b: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def survey(rows: Dataset, column: str, group_column: str | None = None) -> Survey:
    """Hash and measure every document."""
    from tqdm.auto import tqdm

    content, group, size, labels = [], [], [], hashlib.sha256()
    bar = tqdm(total=len(rows), desc="Reading documents", unit="doc", delay=2)
    for batch in documents_in_batches(rows, column):
        encoded = [document_bytes(document) for document in batch[column]]
        content += map(hash64, encoded)
        size += map(len, encoded)
        if group_column:
            group += [hash64(str(key).encode()) for key in batch[group_column]]
        for row in batch.get("labels", ()):
            labels.update(document_bytes(row) + b"\0")
        bar.update(len(encoded))
    bar.close()
    hashes = np.array(content, dtype=np.uint64)
    sizes = np.array(size, dtype=np.int64) // (np.dtype(np.int64).itemsize if column == "input_ids" else 1)
    groups = np.array(group, dtype=np.uint64) if group_column else hashes
    return Survey(hashes, groups, sizes, labels.hexdigest())


def choose_validation(group: np.ndarray, size: np.ndarray, budget: float) -> np.ndarray:
    """Mark the documents of whole groups, taken in hash order until they hold `budget` (unit of `size`).

    A group that alone would make it more than twice the budget is passed over; when none fits, the smallest is taken.

    Returns:
        (n,) bool, with at least one group on each side.
    """
    keys, inverse = np.unique(group, return_inverse=True)  # sorted: hash order
    group_size = np.bincount(inverse, weights=size)
    if len(keys) < 2:
        raise UsageError(
            "a validation split needs two different documents (or years), this dataset has "
            f"{len(keys)}; give more documents, or set them apart by blank lines"
        )
    chosen, taken = np.zeros(len(keys), dtype=bool), 0.0
    for index, this in enumerate(group_size):
        if taken >= budget or chosen.sum() == len(keys) - 1:
            break
        if taken + this <= 2 * budget:
            chosen[index], taken = True, taken + this
    if not chosen.any():
        chosen[group_size.argmin()] = True
    return chosen[inverse]


def split_corpus(corpus: Corpus, fraction: float, max_validation_tokens: int) -> Split:
    """Training and validation documents of `corpus`; deterministic, the same for every seed of a run.

    A corpus with its own validation rows keeps them. Otherwise whole groups go to validation by hash (map-style) or
    the first documents do (stream). In any case no exact copy of a validation document stays in training.
    """
    from datasets import IterableDataset

    budget = max_validation_tokens * (1 if corpus.tokenized else BYTES_PER_TOKEN)
    if isinstance(corpus.documents, IterableDataset):
        return _split_stream(corpus, budget)
    if corpus.validation is not None:
        return _split_with_own_validation(corpus, budget)
    return _split_by_hash(corpus, fraction, budget)


def _split_by_hash(corpus: Corpus, fraction: float, budget: int) -> Split:
    """Whole groups in hash order until `fraction` of the text, at most `budget`."""
    found = survey(corpus.documents, corpus.column, corpus.group_column)
    rows = np.flatnonzero(found.size)  # blank documents are on no side
    _require_documents(corpus, len(rows))
    chosen = choose_validation(found.group[rows], found.size[rows], min(fraction * found.size.sum(), budget))
    train = rows[~chosen]
    key = corpus.group_column or "document"
    rule = f"whole {key}s by hash, {found.size[rows[chosen]].sum() / found.size.sum():.1%} of the text for validation"
    documents = corpus.documents
    return Split(documents.select(train), documents.select(rows[chosen]), rule, len(train), _digest(found, train))


def _split_with_own_validation(corpus: Corpus, budget: int) -> Split:
    """The source's validation rows, up to `budget`; training without exact copies of them."""
    validation, hashes = take_documents(corpus.validation, corpus.column, budget)
    found = survey(corpus.documents, corpus.column)
    train = np.flatnonzero((found.size > 0) & ~np.isin(found.content, np.array(list(hashes), dtype=np.uint64)))
    _require_documents(corpus, len(train))
    rule = "the dataset's own validation split; exact copies of its documents removed from training"
    return Split(corpus.documents.select(train), validation, rule, len(train), _digest(found, train))


def _split_stream(corpus: Corpus, budget: int) -> Split:
    """Own validation rows, or the first documents of the stream; training filters exact copies of them."""
    own = corpus.validation
    validation, hashes = take_documents(corpus.documents if own is None else own, corpus.column, budget)
    train = corpus.documents if own is not None else corpus.documents.skip(len(validation))
    train = train.filter(partial(_not_in, column=corpus.column, hashes=hashes))
    if next(iter(train), None) is None:
        raise UsageError(
            f"--dataset {corpus.name}: validation takes all {len(validation)} documents of the stream; "
            "leave --streaming out, or lower --max_validation_tokens"
        )
    rule = "the first documents of the stream" if own is None else "the dataset's own validation split"
    return Split(train, validation, f"{rule}; exact copies removed from training")


def _not_in(row: dict, column: str, hashes: frozenset[int]) -> bool:
    """Whether a row is neither blank nor a copy of a document with one of `hashes`."""
    data = document_bytes(row[column])
    return bool(data) and hash64(data) not in hashes


def take_documents(rows: Dataset | IterableDataset, column: str, budget: int) -> tuple[Dataset, frozenset[int]]:
    """The first documents, until they hold `budget` (bytes or tokens), in memory, with their hashes."""
    from datasets import Dataset

    taken, hashes, size = [], set(), 0
    for row in rows:
        data = document_bytes(row[column])
        if not data:
            continue
        taken.append(row)
        hashes.add(hash64(data))
        size += len(data) if column == "text" else len(row[column])
        if size >= budget:
            break
    if not taken:
        raise UsageError("the validation split holds no text; remove it, or give it documents")
    return Dataset.from_list(taken), frozenset(hashes)


def _require_documents(corpus: Corpus, count: int) -> None:
    if count == 0:
        raise UsageError(f"--dataset {corpus.name}: has no document with text for training; give a dataset with text")


def _digest(found: Survey, rows: np.ndarray) -> str:
    """A hash of the documents of `rows` in order, and of all labels: masked ones must not pass for their ids."""
    return hashlib.sha256(found.content[rows].tobytes() + found.labels.encode()).hexdigest()
