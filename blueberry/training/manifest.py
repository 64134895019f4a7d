"""The manifest of a checkpoint: size and SHA-256 of every file, by which a damaged checkpoint is known as one."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1  # of the checkpoint as a whole; raise it when an older Blueberry could not go on from a newer one's


def write_manifest(folder: Path) -> None:
    """Describe all files of `folder`. Files and manifest are on the disk, not only in its cache, on return."""
    files = {name: {"size": path.stat().st_size, "sha256": _hash(path, sync=True)} for name, path in _files(folder)}
    content = {"format": FORMAT, "files": files}
    hidden = folder / f".{MANIFEST}"
    with open(hidden, "w") as file:
        file.write(json.dumps(content | {"sha256": _hash_of(content)}, indent=1))  # to the last byte
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(folder / MANIFEST)
    sync_folder(folder)


def difference(folder: Path) -> str | None:
    """What is wrong with the files of `folder`, in words that follow its name; None if they are as written.

    Files that the manifest does not name are nobody's business.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        own_hash, version, files = content.pop("sha256"), content["format"], content["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"has a damaged {MANIFEST}"
    if own_hash != _hash_of(content):
        return f"has a damaged {MANIFEST}"
    if version != FORMAT:
        return f"was written by another version of Blueberry (checkpoint format {version}, this one reads {FORMAT})"
    reasons = (_difference(folder / name, written) for name, written in files.items())
    return next((reason for reason in reasons if reason), None)


def _difference(path: Path, written: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"has no {path.name}"
    size = path.stat().st_size
    if size != written["size"]:
        return f"has a broken {path.name} ({size} of {written['size']} bytes)"
    if _hash(path) != written["sha256"]:
        return f"has a damaged {path.name} (its SHA-256 is not the one in {MANIFEST})"
    return None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to the folder, path) of what a manifest describes; sharded engines write into subfolders."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix(), path


def _hash(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync` it is put on the disk meanwhile."""
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno()) if sync else None
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if synced is not None:
            synced.result()
        return digest


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
