"""Take out of texts what tells about the machine and its user: secrets, absolute paths, user and host names."""

import getpass
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_SECRET_NAME = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)$")
_ABSOLUTE = re.compile(r"(?<![\w.:/<>~-])~?/[\w.@+-][^\s\"'`<>|,;)\]}]*|\b[A-Za-z]:\\[^\s\"'`<>|,;)\]}]+")
# Names that so many machines share that they say nothing, and that are words besides.
_COMMON = {"root", "user", "admin", "ubuntu", "runner", "jovyan", "localhost", "host", "build"}


class Scrubber:
    """Knows what belongs to this machine.

    Attributes:
        secrets: tokens and keys of the environment.
        folders: home, working, temporary and run folders, the longest first.
        names: of the user and the host, if they are not common ones and not `public`.
    """

    def __init__(self, *folders: Path, public: str = "", tokens: tuple[str | None, ...] = ()):
        """`folders`: of the runs. `public`: the account on the Hub, which may well be the user's name."""
        environment = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
        self.secrets = {secret for secret in (get_token(), *tokens, *environment) if secret and len(secret) >= 6}
        places = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *folders]
        self.folders = sorted({str(form) for path in places for form in (path.absolute(), path.resolve())} - {"/"},
                              key=len, reverse=True)  # fmt: skip
        host = socket.gethostname()
        names = {getpass.getuser(), host, host.split(".")[0]}
        self.names = {name for name in names if len(name) > 1 and name.lower() not in _COMMON | {public.lower()}}

    def text(self, text: str) -> str:
        """`text` with secrets and names replaced, and absolute paths cut down to their last part."""
        for secret in self.secrets:
            text = text.replace(secret, "<token>")
        text = TOKEN.sub("<token>", text)
        for folder in self.folders:  # as they may hold spaces
            text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?=[/\"'\s,)\]}}]|$)", f"/{Path(folder).name}", text)
        text = _ABSOLUTE.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("/\\"))[-1], text)
        for name in self.names:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "local", text)
        return text

    def value(self, value: Any) -> Any:
        """The same for every string of nested lists and mappings."""
        if isinstance(value, str):
            return Path(value).name if re.match(r"~?/\w", value) else self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value

    def leak(self, content: bytes) -> str | None:
        """What of this machine is still in `content`, in words; None if nothing is.

        Names of fewer than five letters are not looked for: any compressed file holds them.
        """
        if any(secret.encode() in content for secret in self.secrets) or re.search(TOKEN.pattern.encode(), content):
            return "a token"
        if any(len(folder) > 4 and folder.encode() in content for folder in self.folders):
            return "a local path"
        if any(len(name) > 4 and _is_word(name.encode(), content) for name in self.names):
            return "the name of the user or the machine"
        return None


def _is_word(name: bytes, content: bytes) -> bool:
    return re.search(rb"(?<![A-Za-z0-9])" + re.escape(name) + rb"(?![A-Za-z0-9])", content) is not None
