"""One commit on the Hub, or none: retried when the connection breaks, with errors of one line."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from blueberry.errors import UsageError

CARD = "README.md"
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
    """

    repo_id: str
    kind: str = "model"
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    token: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UsageError(f"--repo_id {self.repo_id} is no id of a repository: write USER/NAME") from error
        if self.repo_id.count("/") != 1:
            raise UsageError(f"--repo_id {self.repo_id} has no account: write USER/NAME")
        if self.create_pr and self.revision not in (None, "main"):
            raise UsageError(f"--create_pr with --revision {self.revision}: pull requests go to main; leave one out")
        if self.revision is not None and (".." in self.revision or not self.revision.strip()):
            raise UsageError(f"--revision {self.revision!r} is no name of a branch")

    @property
    def account(self) -> str:
        """The user or organization."""
        return self.repo_id.split("/")[0]


def push(
    destination: Destination,
    files: Mapping[str, bytes | Path],
    message: str,
    *,
    owned: Sequence[str] = (),
    card: Callable[[str | None], str] | None = None,
) -> CommitInfo:
    """Upload `files` as one commit.

    Args:
        files: path in the repository -> content.
        owned: patterns of files that are deleted in the same commit unless `files` brings them again.
        card: from the card that is there (None: there is none) to the one to upload.
    """
    attempts = 1 if destination.create_pr else 1 + len(WAITS)  # a second pull request would stand beside the first
    return _insisting(lambda: _push_once(destination, files, message, owned, card), destination, attempts)


def reserve(destination: Destination) -> None:
    """Make the repository and the branch, if they are not there: fails as a push would."""
    _insisting(lambda: _head(HfApi(token=destination.token), destination), destination, 1 + len(WAITS))


def _insisting(do: Callable[[], Result], destination: Destination, attempts: int) -> Result:
    """`do`, as often as it takes."""
    if not (destination.token or get_token()):
        raise UsageError("the Hub wants a token: run `hf auth login`, or set HF_TOKEN")
    for attempt in range(attempts):
        try:
            with explained(destination.repo_id):
                return do()
        except Unavailable as error:
            if attempt == attempts - 1:
                raise UsageError(f"the Hub failed ({error}): {_AGAIN}") from error
            time.sleep(WAITS[attempt])
    raise AssertionError("unreachable")


def _push_once(destination: Destination, files: Mapping[str, Any], message: str, owned: Sequence[str],
               card: Callable[[str | None], str] | None) -> CommitInfo:  # fmt: skip
    api = HfApi(token=destination.token)
    head = _head(api, destination)
    there = api.list_repo_files(destination.repo_id, repo_type=destination.kind, revision=head)
    additions = dict(files)
    if card is not None:
        additions[CARD] = card(_read_card(api, destination, head) if CARD in there else None).encode()
    stale = [path for path in there if path not in additions and any(fnmatch(path, pattern) for pattern in owned)]
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
        raise UsageError(f"--private: {destination.repo_id} is public already; make it private in its settings, or "
                         "choose another --repo_id")  # fmt: skip
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
            raise UsageError(f"--repo_id {destination.repo_id} is a {kind} on the Hub: choose another name")


def _read_card(api: HfApi, destination: Destination, head: str) -> str:
    path = api.hf_hub_download(destination.repo_id, CARD, repo_type=destination.kind, revision=head)
    return Path(path).read_text()


class Unavailable(Exception):
    """The Hub did not answer, or failed; another attempt may succeed."""


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """The Hub's refusals as UsageErrors of one line."""
    try:
        yield
    except UsageError:
        raise
    except BadRequestError as error:
        raise UsageError(f"the Hub refuses this: {_line(error)}") from error
    except HfHubHTTPError as error:
        _explain(error, repo_id)
    except ValueError as error:  # metadata of the card that the Hub found wrong, before anything was uploaded
        raise UsageError(f"{CARD}: {_line(error)}") from error
    except _LOST as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            _explain(error.__cause__, repo_id)
        raise Unavailable(_line(error)) from error


def _explain(error: HfHubHTTPError, repo_id: str) -> None:
    status = error.response.status_code
    if status == 401:
        raise UsageError(
            "the Hub does not know this token (401): run `hf auth login` again, or set HF_TOKEN"
        ) from error
    if status == 403:
        raise UsageError(f"this token may not write to {repo_id} (403): take one with write access, or "
                         "another --repo_id") from error  # fmt: skip
    if status == 409:
        raise UsageError(f"--repo_id {repo_id}: the name is taken (409); choose another") from error
    if status in (412, 429) or status >= 500:
        raise Unavailable(f"{status} {error.response.reason_phrase}") from error
    raise UsageError(f"{repo_id}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
