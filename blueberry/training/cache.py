"""Folders that outlive a run: where they are, and that they can be written."""

import os
import tempfile
from pathlib import Path

from blueberry.errors import UsageError


def cache_folder(kind: str) -> Path:
    """`$BLUEBERRY_CACHE/kind`, or `~/.cache/blueberry/kind`; made where it is missing."""
    root = Path(os.environ.get("BLUEBERRY_CACHE") or "~/.cache/blueberry").expanduser()
    return writable(root / kind, "BLUEBERRY_CACHE")


def writable(folder: Path, variable: str) -> Path:
    """`folder`, made where it is missing; UsageError that names the environment `variable` where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"the cache {folder} cannot be written ({error.strerror}): set {variable} to a folder that can"
        ) from error
    return folder
