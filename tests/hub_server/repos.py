"""What a Hub keeps: accounts, repositories, commits, files. No HTTP here."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch

from .xet import ContentStore

MAIN = "main"
# Of a new repository's .gitattributes: what is kept outside of git.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.parquet", "*.arrow", "*tfevents*", "*.png", "*.gz")
LARGEST_REGULAR = 10 * 2**20  # bytes


class HubError(Exception):
    """An answer other than success. `code` goes into X-Error-Code; `headers` beside it."""

    def __init__(self, status: int, code: str = "", message: str = "", headers=None):
        super().__init__(message or code)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


@dataclass(frozen=True)
class Account:
    """Who a token belongs to; `role` is "read" or "write"."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.organizations)


@dataclass(frozen=True)
class File:
    """One version of a file: in git (`content`) or outside (`sha256`)."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """Git's hash of what it keeps: the content, or the pointer to it."""
        return git_hash(self.pointer if self.content is None else self.content)

    @property
    def pointer(self) -> bytes:
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    parent: "Commit | None" = None

    def history(self) -> Iterator["Commit"]:
        commit = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class Repo:
    """Named lines of commits; the newest of each is its last state."""

    kind: str  # models, datasets or spaces
    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
        files = {".gitattributes": File(len(attributes), attributes)}
        self.branches[MAIN] = Commit(git_hash(self.id.encode()), "initial commit", files)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or hash names."""
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return refs[revision]
        for head in self.heads():
            for commit in head.history():
                if len(revision) >= 7 and commit.oid.startswith(revision):
                    return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def heads(self) -> list[Commit]:
        return [*self.branches.values(), *self.tags.values(), *self.pull_requests.values()]

    def line(self, revision: str) -> dict[str, Commit]:
        """The refs that commits may be added to under this name."""
        for refs in (self.branches, self.pull_requests):
            if revision in refs:
                return refs
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, revision: str, title: str, added: dict[str, File], deleted: Iterable[str], parent: str | None,
               as_pull_request: bool) -> tuple[Commit, str | None]:  # fmt: skip
        """One commit on top of `revision`, and the number of the pull request if one is to be opened."""
        head = self.at(revision)
        if parent is not None and not head.oid.startswith(parent):
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        gone = [
            path for path in head.files for name in deleted if path == name or path.startswith(name.rstrip("/") + "/")
        ]
        files = {path: file for path, file in head.files.items() if path not in gone} | added
        tree = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        new = Commit(git_hash(f"{head.oid}\n{title}\n{tree}".encode()), title, files, head)
        if as_pull_request:
            number = str(len(self.pull_requests) + 1)
            self.pull_requests[f"refs/pr/{number}"] = new
            return new, number
        self.line(revision)[revision] = new
        return new, None


class Hub:
    """All accounts (by token), repositories (by kind and id) and large files."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.xet = ContentStore()

    def account(self, token: str | None) -> Account | None:
        """None for a visitor. A token that nobody has is refused."""
        if token is None:
            return None
        if token not in self.accounts:
            raise HubError(401, message="Invalid credentials in Authorization header")
        return self.accounts[token]

    def create(
        self, account: Account | None, kind: str, namespace: str, name: str, private: bool
    ) -> tuple[Repo, bool]:
        """The repository of this name, and whether it is new. Names differ in more than upper and lower case."""
        if account is None:
            raise HubError(401, message="Invalid username or password.")
        if not account.may_write(namespace):
            raise HubError(
                403, message=f"You don't have the rights to create a model under the namespace {namespace!r}"
            )
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}", name):
            raise HubError(400, message=f"Invalid repo name: {name}")
        repo_id = f"{namespace}/{name}"
        for repo in self.repos.values():
            if (repo.kind, repo.id.lower()) == (kind, repo_id.lower()):
                return repo, False
        self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        return self.repos[kind, repo_id], True

    def repo(self, account: Account | None, kind: str, repo_id: str, write: bool = False) -> Repo:
        """The repository, if `account` may see it (or write to it): a private one is as if it were not there."""
        repo = self.repos.get((kind, self.moved.get((kind, repo_id), repo_id)))
        belongs = account is not None and repo is not None and repo.namespace in (account.name, *account.organizations)
        if repo is None or (repo.private and not belongs):
            raise HubError(401 if account is None else 404, "RepoNotFound", "Repository not found")
        if write and account is None:
            raise HubError(401, message="Invalid username or password.")
        if write and not account.may_write(repo.namespace):
            raise HubError(403, message="You don't have the required permissions to write to this repository")
        return repo

    def has_large(self, sha256: str) -> bool:
        return sha256 in self.large or sha256 in self.xet.files


def is_large(path: str, size: int) -> bool:
    """Whether a file is kept outside of git."""
    return size > LARGEST_REGULAR or any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
