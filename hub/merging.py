"""A new card and the one that a user edited: what the user changed stays, what they left is brought up to date.

The last line of a generated card is a comment with a hash of everything generated, by which the next one knows what
was edited; text that a user adds may come behind it. Pieces are the keys of the metadata and the sections under `##`
headings (and what comes before the first).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from blueberry.errors import UsageError

_RECORD = re.compile(r"\n*<!-- blueberry (\{.*\}) -->[ \t\r]*\n*")
_HEADER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*\r?\n?", re.DOTALL)
# Cards that no one wrote: of transformers' Trainer, of its push_to_hub, and of PEFT.
_AUTOMATIC = (
    "generated automatically according to the information the Trainer had access to",
    "This model card has been automatically generated",
    "# Model Card for Model ID",
)

Pieces = dict[str, Any]


def merged(generated: str, theirs: str | None) -> str:
    """`generated` (a card without a record) with what was edited in `theirs`, the card that is there now.

    A piece of `theirs` that differs from what was generated then, or was deleted since, stays so. A card of another
    origin counts as edited throughout, unless nobody wrote it.
    """
    metadata, sections = split(generated)
    record = {"metadata": _hashes(metadata), "sections": _hashes(sections)}
    if theirs is not None and not any(mark in theirs for mark in _AUTOMATIC):
        then = _record_of(theirs)
        old_metadata, old_sections = split(_RECORD.sub("\n\n", theirs))
        metadata = _merged(metadata, old_metadata, then.get("metadata", {}))
        sections = _merged(sections, old_sections, then.get("sections", {}))
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    body = "\n\n".join(text.strip() for text in sections.values() if text.strip())
    return f"---\n{header}---\n\n{body}\n\n<!-- blueberry {json.dumps(record)} -->\n"


def split(card: str) -> tuple[Pieces, Pieces]:
    """Metadata by key, text by heading ("" for what comes before the first)."""
    card = card.replace("\r\n", "\n")
    header = _HEADER.match(card)
    try:
        metadata = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError as error:
        raise UsageError(
            f"README.md: its metadata is no YAML ({' '.join(str(error).split())}); mend it first"
        ) from error
    if not isinstance(metadata or {}, dict):
        raise UsageError("README.md: its metadata must map names to values; mend it first")
    sections, heading, is_code = {"": ""}, "", False
    for line in card[header.end() if header else 0 :].splitlines(keepends=True):
        is_code ^= line.lstrip().startswith("```")
        if line.startswith("## ") and not is_code:
            heading = line[3:].strip()
            sections.setdefault(heading, "")
        sections[heading] += line
    return metadata or {}, sections


def _merged(new: Pieces, theirs: Pieces, then: Mapping[str, str]) -> Pieces:
    """In the order of `theirs`; pieces that are new follow the one that they follow in `new`."""
    result: Pieces = {}
    for name, piece in theirs.items():
        if then.get(name) != _hash(piece):
            result[name] = piece
        elif name in new:
            result[name] = new[name]
    previous = None
    for name, piece in new.items():
        if name not in result and name not in then:
            result = _inserted(result, previous, name, piece)
        previous = name if name in result else previous
    return result


def _inserted(pieces: Pieces, after: str | None, name: str, piece: Any) -> Pieces:
    names = list(pieces)
    place = names.index(after) + 1 if after is not None else 0
    names.insert(place, name)
    return {key: pieces.get(key, piece) for key in names}


def _record_of(card: str) -> dict[str, dict[str, str]]:
    found = _RECORD.findall(card)
    try:
        return json.loads(found[-1]) if found else {}
    except ValueError:
        return {}


def _hashes(pieces: Pieces) -> dict[str, str]:
    return {name: _hash(piece) for name, piece in pieces.items()}


def _hash(piece: Any) -> str:
    """Of a piece, whatever blanks its lines end in."""
    text = piece if isinstance(piece, str) else json.dumps(piece, sort_keys=True, default=str)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
