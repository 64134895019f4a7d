"""Content-addressed storage as hf_xet speaks it: files are lists of chunks, chunks lie in xorbs.

Formats: https://huggingface.co/docs/xet (shard, xorb, api). Chunks are stored as they come, compressed by the client:
nothing here looks into them.
"""

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

_SHARD_HEADER = 48
_ENTRY = 48  # bytes of every record of a shard
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30
_BOOKEND = b"\xff" * 32


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb, and its length when unpacked."""

    xorb: str
    start: int
    end: int
    size: int


@dataclass(frozen=True)
class StoredFile:
    hash: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


class ContentStore:
    """Xorbs by their hash, files by the SHA-256 of their content."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, StoredFile] = {}

    def add_shard(self, shard: bytes) -> None:
        for sha256, file in files_of_shard(shard):
            missing = {term.xorb for term in file.terms} - self.xorbs.keys()
            if missing:
                raise ValueError(f"xorb {missing.pop()} was never uploaded")
            self.files[sha256] = file

    def reconstruction(self, file_hash: str, first: int, last: int, base: str) -> dict[str, Any] | None:
        """How to put bytes `first` to `last` of a file together (version 1); None for an unknown file."""
        file = next((file for file in self.files.values() if file.hash == file_hash), None)
        if file is None:
            return None
        ends = list(accumulate(term.size for term in file.terms))
        wanted = [
            (term, end) for term, end in zip(file.terms, ends, strict=True) if end > first and end - term.size <= last
        ]
        fetch: dict[str, list] = {}
        for term, _ in wanted:
            begins = chunk_offsets(self.xorbs[term.xorb])
            chunks = {"start": term.start, "end": term.end}
            span = {"start": begins[term.start], "end": begins[term.end] - 1}
            fetch.setdefault(term.xorb, []).append(
                {"range": chunks, "url": f"{base}/xorbs/{term.xorb}", "url_range": span}
            )
        return {
            "offset_into_first_range": first - (wanted[0][1] - wanted[0][0].size) if wanted else 0,
            "terms": [
                {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.start, "end": term.end}}
                for term, _ in wanted
            ],
            "fetch_info": fetch,
        }


def files_of_shard(shard: bytes) -> list[tuple[str, StoredFile]]:
    """(sha256, file) of every file that a shard describes."""
    at, found = _SHARD_HEADER, []
    while shard[at : at + 32] != _BOOKEND:
        file_hash, flags, count = struct.unpack_from("<32sII", shard, at)
        at += _ENTRY
        terms = []
        for _ in range(count):
            xorb, _flags, size, start, end = struct.unpack_from("<32sIIII", shard, at)
            terms.append(Term(hash_text(xorb), start, end, size))
            at += _ENTRY
        if flags & _WITH_VERIFICATION:
            at += _ENTRY * count
        if not flags & _WITH_METADATA:
            raise ValueError("a file without its SHA-256")
        sha256 = hash_text(shard[at : at + 32])
        at += _ENTRY
        found.append((sha256, StoredFile(hash_text(file_hash), tuple(terms))))
    return found


def hash_text(value: bytes) -> str:
    """Xet's text of a hash: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", value))


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk begins, and where the last one ends. A chunk: version, 3 bytes of length, scheme, 3 of size."""
    offsets = [0]
    while offsets[-1] + 8 <= len(xorb) and xorb[offsets[-1]] == 0:
        offsets.append(offsets[-1] + 8 + int.from_bytes(xorb[offsets[-1] + 1 : offsets[-1] + 4], "little"))
    return offsets
