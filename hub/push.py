"""One commit on the Hub, or none: retried when the connection breaks, with errors of one line."""

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from blueberry.errors import UsageError

CARD = "README.md"
LISTING = ".blueberry_files"
Result = TypeVar("Result")
WAITS = (2.0, 8.0)  # seconds before the second and the third attempt; within one, the client retries each request
_LOST = (httpx2.TransportError, ConnectionError, TimeoutError, RuntimeError)  # RuntimeError: of hf_xet, and of LFS
_AGAIN = "nothing was published; the same command goes on where it stopped: what arrived is not sent twice"


@dataclass(frozen=True)
class Destination:
    """Where to, and as whom.

    Attributes:
        repo_id: USER/NAME.
        kind: model or dataset.
        revision: a branch, made if it is not there; None for main.
        private: of a repository that is made; a public one that is there already is refused.
        create_pr: open a pull request instead.
        token: None for the one that `hf auth login` left, or HF_TOKEN.
        argument: by which the user named it, for errors.
    """

    repo_id: str
    kind: str = "model"
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    token: str | None = field(default=None, repr=False)
    argument: str = "--repo_id"

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UsageError(f"{self.named} is no id of a repository: write USER/NAME") from error
        if self.repo_id.count("/") != 1:
            raise UsageError(f"{self.named} has no account: write USER/NAME")
        if self.create_pr and self.revision not in (None, "main"):
            raise UsageError(f"--create_pr with --revision {self.revision}: pull requests go to main; leave one out")
        if self.revision is not None and (".." in self.revision or not self.revision.strip()):
            raise UsageError(f"revision {self.revision!r} is no name of a branch")

    @property
    def named(self) -> str:
        """As the user wrote it."""
        return f"{self.argument} {self.repo_id}"

    @property
    def account(self) -> str:
        """The user or organization."""
        return self.repo_id.split("/")[0]


def push(
    destination: Destination,
    files: Mapping[str, bytes | Path],
    message: str,
    *,
    replaces: Callable[[str], bool] = lambda path: False,
    card: Callable[[str | None], str] | None = None,
) -> CommitInfo:
    """Upload `files` as one commit.

    Args:
        files: path in the repository -> content.
        replaces: of a file that an earlier push brought: whether it goes if `files` does not bring it again. Files
            that users added stay in any case; LISTING tells which is which.
        card: from the card that is there (None: there is none) to the one to upload.
    """
    attempts = 1 if destination.create_pr else 1 + len(WAITS)  # a second pull request would stand beside the first
    do = lambda: _push_once(destination, files, message, replaces, card)
    return insist(do, destination.named, destination.token, attempts)


def reserve(destination: Destination) -> None:
    """Make the repository and the branch, if they are not there: fails as a push would."""
    insist(lambda: _head(HfApi(token=destination.token), destination), destination.named, destination.token)


def insist(do: Callable[[], Result], named: str, token: str | None, attempts: int = 1 + len(WAITS)) -> Result:
    """`do`, which asks the Hub for something, as often as it takes; errors are UsageErrors.

    named: the repository as the user named it, for errors.
    """
    check_token(token or get_token())
    for attempt in range(attempts):
        try:
            with explained(named):
                return do()
        except Unavailable as error:
            if attempt == attempts - 1:
                raise UsageError(f"the Hub failed ({error}): {_AGAIN}") from error
            time.sleep(WAITS[attempt])
    raise AssertionError("unreachable")


def check_token(token: str | None) -> None:
    """Raises UsageError, without the token in it, unless one could be sent."""
    if not token:
        raise UsageError("the Hub wants a token: run `hf auth login`, or set HF_TOKEN")
    if re.fullmatch(r"[!-~]+", token) is None:
        raise UsageError("the token holds blanks or characters that no token has: copy it into HF_TOKEN again, or run "
                         "`hf auth login`")  # fmt: skip


def _push_once(destination: Destination, files: Mapping[str, Any], message: str, replaces: Callable[[str], bool],
               card: Callable[[str | None], str] | None) -> CommitInfo:  # fmt: skip
    api = HfApi(token=destination.token)
    head = _head(api, destination)
    there = api.list_repo_files(destination.repo_id, repo_type=destination.kind, revision=head)
    additions = dict(files)
    if card is not None:
        path = _download(api, destination, head, CARD) if CARD in there else None
        additions[CARD] = card(path and read_card(path)).encode()
    listed = _listed(api, destination, head) if LISTING in there else []
    missing = {*listed} & {*there} - {*additions, LISTING}
    stale = sorted(path for path in missing if replaces(path))
    additions[LISTING] = listing({*listed, *additions} - {*stale})
    operations = [CommitOperationAdd(path, content) for path, content in additions.items()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the spectral log
        return api.create_commit(
            destination.repo_id,
            operations=[*operations, *(CommitOperationDelete(path) for path in stale)],
            commit_message=message,
            repo_type=destination.kind,
            revision=destination.revision,
            create_pr=destination.create_pr,
            parent_commit=None if destination.create_pr else head,  # of no edit that was not seen
        )


def _head(api: HfApi, destination: Destination) -> str:
    """The commit to build on; repository and branch are made if they are not there."""
    where = {"repo_id": destination.repo_id, "repo_type": destination.kind}
    api.whoami()
    try:
        info = api.repo_info(**where)
    except RepositoryNotFoundError:
        _check_other_kind(api, destination)
        api.create_repo(**where, private=destination.private or None)
        info = api.repo_info(**where)
    if destination.private and not info.private:
        raise UsageError(f"{destination.named} is public already: make it private in its settings, or choose another")
    if destination.revision is None:
        return info.sha
    try:
        return api.repo_info(**where, revision=destination.revision).sha
    except RevisionNotFoundError:
        api.create_branch(**where, branch=destination.revision)
        return info.sha


def _check_other_kind(api: HfApi, destination: Destination) -> None:
    """A name that stands for a data set would hardly be meant for a model."""
    for kind in {"model", "dataset", "space"} - {destination.kind}:
        if api.repo_exists(destination.repo_id, repo_type=kind):
            raise UsageError(f"{destination.named} is a {kind} on the Hub: choose another name")


def _download(api: HfApi, destination: Destination, head: str, path: str) -> Path:
    return Path(api.hf_hub_download(destination.repo_id, path, repo_type=destination.kind, revision=head))


def _listed(api: HfApi, destination: Destination, head: str) -> list[str]:
    return _download(api, destination, head, LISTING).read_text("utf-8", errors="replace").splitlines()


def read_card(path: Path) -> str:
    """Raises UsageError if it is no text."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{CARD} is not in UTF-8 ({error}): save it so") from error


def listing(paths: Iterable[str]) -> bytes:
    """The content of LISTING: a line for each file that pushes have brought and not taken away since."""
    return "".join(f"{path}\n" for path in sorted({*paths, LISTING})).encode()


class Unavailable(Exception):
    """The Hub did not answer, or failed; another attempt may succeed."""


@contextmanager
def explained(named: str) -> Iterator[None]:
    """The Hub's refusals as UsageErrors of one line; Unavailable where it did not answer."""
    try:
        yield
    except UsageError:
        raise
    except BadRequestError as error:
        raise UsageError(f"the Hub refuses this: {_line(error)}") from error
    except HfHubHTTPError as error:
        _explain(error, named)
    except LocalEntryNotFoundError as error:  # a file did not come
        raise Unavailable(_line(error)) from error
    except ValueError as error:  # metadata of the card that the Hub found wrong, before anything was uploaded
        raise UsageError(f"{CARD}: {_line(error)}") from error
    except _LOST as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            _explain(error.__cause__, named)
        raise Unavailable(_line(error)) from error
    except OSError as error:  # of a file here
        raise UsageError(f"{_line(error)}: nothing was published; mend that (HF_HOME names the cache)") from error


def _explain(error: HfHubHTTPError, named: str) -> None:
    status = error.response.status_code
    if status == 401:
        raise UsageError(
            "the Hub does not know this token (401): run `hf auth login` again, or set HF_TOKEN"
        ) from error
    if status == 403:
        raise UsageError(f"{named}: this token may not write there (403); take one with write access, or "
                         "choose another") from error  # fmt: skip
    if status == 409:
        raise UsageError(f"{named}: the name is taken (409); choose another") from error
    if status in (412, 429) or status >= 500:
        raise Unavailable(f"{status} {error.response.reason_phrase}") from error
    raise UsageError(f"{named}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
