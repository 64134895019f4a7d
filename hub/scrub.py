"""Take out of texts what tells about the machine and its user: secrets, local paths, user and host names."""

import getpass
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Mapping
from mmap import mmap
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|KEY_ID)$", re.IGNORECASE)
_END = r"[^\s\"'`<>|,;)\]}]"  # of a path, everything but
_PATH = re.compile(
    rf"\bfile:/{{1,3}}{_END}+"
    rf"|(?<![\w./<>~-])(?:~|\.{{1,2}}|[A-Za-z]:)?/[\w.@+-]{_END}*"
    rf"|\b[A-Za-z]:\\{_END}+"
)
_PATH_AS_A_WHOLE = re.compile(r"file:/|[A-Za-z]:[\\/]|~?/\w|\.{1,2}/|[\w.@+-]+(/[\w.@+-]+){2,}/?$")
_HOME = re.compile(r"(^|[\\/])(home|Users)[\\/][^\\/]+$")
# Names that so many machines share that they say nothing, and that are words besides.
_COMMON = {"root", "user", "admin", "ubuntu", "runner", "jovyan", "localhost", "host", "build"}
_LEAST_IN_BINARY = 5  # letters of a name: compressed bytes hold every shorter one by chance


class Scrubber:
    """Knows what belongs to this machine.

    Attributes:
        secrets: tokens and keys of the environment; passwords that are plain words would be found everywhere.
        folders: home, working, temporary and run folders, the longest first.
        arguments: relative paths that a run was given.
        places: by name, what a user or host name stands in: an address, a home folder, the name of an event file. By
            itself it may be any word of a text.
    """

    def __init__(self, *folders: Path, public: str = "", tokens: Iterable[str | None] = (), paths: Iterable[str] = ()):
        """`folders`: of the runs. `public`: the account on the Hub, which may well be the user's name. `paths`: that
        the runs were given as arguments."""
        own = {token for token in (get_token(), *tokens) if token and len(token) >= 6}
        self.secrets = own | {value for name, value in os.environ.items() if _is_secret(name, value)}
        here = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *folders]
        self.folders = sorted({str(form) for path in here for form in (path.absolute(), path.resolve())} - {"/"},
                              key=len, reverse=True)  # fmt: skip
        self.arguments = sorted((path for path in paths if "/" in path), key=len, reverse=True)
        host = socket.gethostname()
        known = _COMMON | {public.lower()}
        names = {name for name in (_user(), host, host.split(".")[0]) if name and name.lower() not in known}
        self.places = {name: re.compile(_place(name)) for name in sorted(names, key=len, reverse=True)}

    def text(self, text: str) -> str:
        """`text` with secrets replaced, paths cut down to their last part, and names gone from addresses."""
        for secret in self.secrets:
            text = text.replace(secret, "<token>")
        text = TOKEN.sub("<token>", text)
        for folder in [*self.folders, *self.arguments]:  # as they may hold spaces
            short = "~" if _last_part(folder) == "~" else f"/{_last_part(folder)}"
            text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?=[/\"'\s,)\]}}]|$)", lambda _, to=short: to, text)
        text = _PATH.sub(lambda found: _last_part(found[0]), text)
        for place in self.places.values():
            text = place.sub("local", text)
        return text

    def value(self, value: Any) -> Any:
        """The same for every string of nested lists and mappings; one that is a path as a whole may hold spaces."""
        if isinstance(value, str):
            is_path = value in self.arguments or _PATH_AS_A_WHOLE.match(value)
            return _last_part(value) if is_path else self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value

    def leak(self, content: bytes | mmap) -> str | None:
        """What of this machine is still in `content`, in words; None if nothing is."""
        if any(_holds(content, re.escape(secret)) for secret in self.secrets) or _holds(content, TOKEN.pattern):
            return "a token"
        if any(_holds_folder(content, folder) for folder in self.folders):
            return "a local path"
        least = _LEAST_IN_BINARY if b"\0" in content[:1024] else 1
        if any(_holds(content, place.pattern) for name, place in self.places.items() if len(name) >= least):
            return "the name of the user or the machine"
        return None


def _last_part(path: str) -> str:
    """~ for a home folder, whose name is that of a user."""
    path = path.rstrip("/\\")
    return "~" if _HOME.search(path) or path == str(Path.home()) else re.split(r"[\\/]", path)[-1]


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        return None


def _is_secret(name: str, value: str) -> bool:
    """A value of an environment variable that no text holds by chance: no plain word, no plain number."""
    is_mixed = re.search(r"[A-Za-z]", value) and re.search(r"[^A-Za-z]", value)
    return bool(_SECRET_NAME.search(name)) and len(value) >= 8 and (bool(is_mixed) or len(value) >= 20)


def _place(name: str) -> str:
    """Where a user or host name is one, as a regular expression. One such as node-07.lab.example is no word."""
    if re.search(r"\.|-.*\d", name) and len(name) >= 8:
        return rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
    before = r"(?<=/home/)|(?<=/Users/)|(?<=\\Users\\)|(?<=~)|(?<=[\w.-]@)|(?<=tfevents\.\d{10}\.)|(?<=-\d\d_)"
    after = r"(?=@[\w-])|(?=:\d)"
    name = rf"(?<![A-Za-z0-9-]){re.escape(name)}(?![A-Za-z0-9-])"
    return rf"(?:{before}){name}|{name}(?:{after})"


def _holds(content: bytes | mmap, pattern: str) -> bool:
    return re.search(pattern.encode(), content) is not None


def _holds_folder(content: bytes | mmap, folder: str) -> bool:
    """A folder at the root, such as /data, may be a part of an address."""
    alone = re.escape(folder) if folder.count("/") > 1 else rf"(?<![\w.~/-]){re.escape(folder)}/\w"
    return len(folder) > 4 and _holds(content, alone)
