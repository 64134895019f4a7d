"""What each path of the Hub's API does. `kind`: models, datasets or spaces; `repo`: USER/NAME."""

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from .repos import MAIN, Account, Commit, File, Hub, HubError, Repo, git_hash, is_large

if TYPE_CHECKING:
    from .server import HubServer

PAGE = 50  # entries of a listing
PART = 5 * 2**20  # bytes of a part of a large upload
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    server: "HubServer"
    method: str
    token: str | None
    headers: Message
    query: Mapping[str, list[str]]
    body: bytes

    @property
    def hub(self) -> Hub:
        return self.server.hub

    @property
    def account(self) -> Account | None:
        return self.hub.account(self.token)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def repo(self, kind: str | None, repo: str, write: bool = False) -> Repo:
        return self.hub.repo(self.account, (kind or "models").rstrip("/"), repo, write)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | headers)


# Accounts and repositories


def whoami(request: Request) -> Answer:
    account = request.account
    if account is None:
        raise HubError(401, message="Invalid username or password.")
    organizations = [{"name": name, "type": "org"} for name in account.organizations]
    auth = {"type": "access_token", "accessToken": {"role": account.role, "displayName": "test"}}
    return as_json({"type": "user", "name": account.name, "orgs": organizations, "auth": auth})


def create_repo(request: Request) -> Answer:
    wanted, account = request.json(), request.account
    namespace = wanted.get("organization") or (account.name if account else "")
    kind = f"{wanted.get('type') or 'model'}s"
    found, new = request.hub.create(account, kind, namespace, wanted["name"], wanted.get("visibility") == "private")
    answer = {"url": web_url(request, found), "name": found.id, "id": found.id}
    return as_json(
        answer if new else answer | {"error": f"You already created this repo: {found.id}"}, 200 if new else 409
    )


def delete_repo(request: Request) -> Answer:
    wanted = request.json()
    namespace = wanted.get("organization") or request.account.name
    repo = request.repo(f"{wanted.get('type') or 'model'}s", f"{namespace}/{wanted['name']}", write=True)
    del request.hub.repos[repo.kind, repo.id]
    return Answer()


def move_repo(request: Request) -> Answer:
    wanted = request.json()
    kind = f"{wanted.get('type') or 'model'}s"
    repo = request.repo(kind, wanted["fromRepo"], write=True)
    del request.hub.repos[kind, repo.id]
    request.hub.moved[kind, repo.id] = wanted["toRepo"]
    repo.id = wanted["toRepo"]
    request.hub.repos[kind, repo.id] = repo
    return Answer()


def settings(request: Request, kind: str, repo: str) -> Answer:
    request.repo(kind, repo, write=True).private = request.json().get("visibility") == "private"
    return as_json({})


def validate_yaml(request: Request) -> Answer:
    """Of a card: what the real Hub's schema refuses most often."""
    wanted = request.json()
    header = re.match(r"\s*---\r?\n(.*?)\r?\n---", wanted["content"], re.DOTALL)
    errors = []
    try:
        metadata = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": f"not YAML: {error}"}], "warnings": []}, 400)
    for name, kinds in {"license": str, "tags": list, "datasets": (list, str), "model-index": list,
                        "pipeline_tag": str, "library_name": str, "base_model": (list, str)}.items():  # fmt: skip
        if name in metadata and not isinstance(metadata[name], kinds):
            errors.append({"message": f'"{name}" has the wrong type'})
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def info(request: Request, kind: str, repo: str, revision: str = MAIN) -> Answer:
    found = request.repo(kind, repo)
    commit = found.at(unquote(revision))
    blobs = request.flag("blobs")
    siblings = [
        {"rfilename": path} | ({"size": file.size, "blobId": file.oid} | _lfs(file) if blobs else {})
        for path, file in sorted(commit.files.items())
    ]
    return as_json({
        "_id": "1", "id": found.id, "modelId": found.id, "author": found.namespace, "sha": commit.oid, "tags": [],
        "private": found.private, "gated": found.gated, "disabled": False, "downloads": 0, "likes": 0,
        "lastModified": DATE, "createdAt": DATE, "siblings": siblings, "cardData": {},
    })  # fmt: skip


def refs(request: Request, kind: str, repo: str) -> Answer:
    found = request.repo(kind, repo)

    def listed(items: Mapping[str, Commit], prefix: str) -> list[dict]:
        return [{"name": name.removeprefix("refs/pr/"), "ref": prefix + name, "targetCommit": commit.oid}
                for name, commit in items.items()]  # fmt: skip

    return as_json({"branches": listed(found.branches, "refs/heads/"), "tags": listed(found.tags, "refs/tags/"),
                    "pullRequests": listed(found.pull_requests, ""), "converts": []})  # fmt: skip


def commits(request: Request, kind: str, repo: str, revision: str) -> Answer:
    history = request.repo(kind, repo).at(unquote(revision)).history()
    return as_json([{"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": []} for c in history])


def branch(request: Request, kind: str, repo: str, name: str) -> Answer:
    return _change_ref(request, request.repo(kind, repo, write=True), "branches", unquote(name))


def tag(request: Request, kind: str, repo: str, name: str) -> Answer:
    """Made: `name` is the revision, the tag is in the body; deleted: `name` is the tag."""
    found = request.repo(kind, repo, write=True)
    if request.method == "POST":
        found.tags[request.json()["tag"]] = found.at(unquote(name))
        return Answer()
    return _change_ref(request, found, "tags", unquote(name))


def _change_ref(request: Request, repo: Repo, which: str, name: str) -> Answer:
    names = getattr(repo, which)
    if request.method == "DELETE":
        if names.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"no {name}")
    elif name in names:
        raise HubError(409, message=f"Reference {name} already exists")
    else:
        names[name] = repo.at(request.json().get("startingPoint", MAIN))
    return Answer()


# Reading


def tree(request: Request, kind: str, repo: str, revision: str, path: str = "") -> Answer:
    found = request.repo(kind, repo)
    folder = f"{unquote(path)}/" if path else ""
    files = {name: file for name, file in found.at(unquote(revision)).files.items() if name.startswith(folder)}
    if folder and not files:
        raise HubError(404, "EntryNotFound", f"{path} does not exist")
    entries = [_entry(name, file, request) for name, file in sorted(files.items())
               if request.flag("recursive") or "/" not in name[len(folder) :]]  # fmt: skip
    folders = {folder + name[len(folder) :].split("/")[0] for name in files if "/" in name[len(folder) :]}
    entries += [
        {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name} for name in sorted(folders)
    ]
    first = int(request.query.get("cursor", ["0"])[0])
    following = f"<{request.server.url}/api/{kind}/{repo}/tree/{revision}{'/' + path if path else ''}?"
    following += (
        f'recursive={request.flag("recursive")}&expand={request.flag("expand")}&cursor={first + PAGE}>; rel="next"'
    )
    link = {"Link": following} if len(entries) > first + PAGE else {}
    return as_json(entries[first : first + PAGE], **link)


def paths_info(request: Request, kind: str, repo: str, revision: str) -> Answer:
    files = request.repo(kind, repo).at(unquote(revision)).files
    is_json = request.headers.get("Content-Type", "").startswith("application/json")
    wanted = request.json()["paths"] if is_json else parse_qs(request.body.decode())["paths"]
    return as_json([_entry(path, files[path], request) for path in wanted if path in files])


def _entry(path: str, file: File, request: Request) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid} | _lfs(file)
    if file.sha256 in request.hub.xet.files:
        entry["xetHash"] = request.hub.xet.files[file.sha256].hash
    if request.flag("expand"):
        entry["lastCommit"] = {"id": "0" * 40, "title": "", "date": DATE}
    return entry


def _lfs(file: File) -> dict[str, Any]:
    if file.content is not None:
        return {}
    return {"lfs": {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}}


def resolve(request: Request, kind: str | None, repo: str, revision: str, path: str) -> Answer:
    found = request.repo(kind, repo)
    if found.gated and request.account is None:
        raise HubError(401, "GatedRepo", "Access to this repository is restricted")
    commit, path = found.at(unquote(revision)), unquote(path)
    head = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise HubError(404, "EntryNotFound", "Entry not found", head)
    file = commit.files[path]
    if file.content is not None:
        return ranged(request, file.content, head | {"ETag": f'"{file.oid}"'})
    linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    if file.sha256 in request.hub.xet.files:
        where = f"{request.server.url}/api/{found.kind}/{found.id}/xet-read-token/{commit.oid}"
        linked |= {"X-Xet-Hash": request.hub.xet.files[file.sha256].hash, "Link": f'<{where}>; rel="xet-auth"'}
    location = f"{request.server.storage_url}/lfs/{file.sha256}"
    return Answer(status=302, headers=head | linked | {"Location": location})


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """All of `content`, or the bytes that a Range header asks for."""
    headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return Answer(content, headers=headers | {"Content-Length": str(len(content))})
    first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
    if first >= len(content):
        raise HubError(416, headers={"Content-Range": f"bytes */{len(content)}"})
    return Answer(content[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})


# Writing


def preupload(request: Request, kind: str, repo: str, revision: str) -> Answer:
    """Which files go where, and what the repository has under their names."""
    found = request.repo(kind, repo, write=not request.flag("create_pr"))
    there = found.at(unquote(revision)).files
    answers = []
    for file in request.json()["files"]:
        old = there.get(file["path"])
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        oid = None if old is None else (old.sha256 or old.oid)
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return as_json({"files": answers})


def lfs_batch(request: Request, kind: str | None, repo: str) -> Answer:
    request.repo(kind, repo)
    _needs_account(request)
    objects = []
    for item in request.json()["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if not request.hub.has_large(item["oid"]):
            answer["actions"] = {"upload": _upload_action(request, item["oid"], item["size"])}
        objects.append(answer)
    return as_json({"transfer": "basic", "objects": objects})


def _upload_action(request: Request, oid: str, size: int) -> dict[str, Any]:
    place = f"{request.server.storage_url}/upload/{oid}"
    if size <= PART:
        return {"href": place, "header": {}}
    parts = {str(number + 1): f"{place}/{number + 1}" for number in range(-(-size // PART))}
    return {"href": f"{request.server.url}/complete/{oid}", "header": {"chunk_size": str(PART)} | parts}


def upload(request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, message="content and SHA-256 differ")
    request.hub.large[oid] = request.body
    return Answer(headers={"ETag": f'"{oid}"'})


def upload_part(request: Request, oid: str, number: str) -> Answer:
    request.hub.large[f"{oid}/{int(number):06d}"] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete(request: Request, oid: str) -> Answer:
    large = request.hub.large
    parts = sorted(name for name in large if name.startswith(f"{oid}/"))
    content = b"".join(large.pop(name) for name in parts)
    if len(request.json()["parts"]) != len(parts) or hashlib.sha256(content).hexdigest() != oid:
        raise HubError(400, message="parts do not make up the file")
    large[oid] = content
    return as_json({"success": True})


def download(request: Request, oid: str) -> Answer:
    if oid not in request.hub.large:
        raise HubError(404, "EntryNotFound", "stored by chunks: install hf_xet")
    return ranged(request, request.hub.large[oid], {"ETag": f'"{oid}"'})


def commit(request: Request, kind: str, repo: str, revision: str) -> Answer:
    """One commit, or nothing at all."""
    as_pull_request = request.flag("create_pr")
    found = request.repo(kind, repo, write=not as_pull_request)
    _needs_account(request)
    header, added, deleted = {}, {}, []
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] in ("deletedFile", "deletedFolder"):
            deleted.append(value["path"])
        else:
            added[_checked_path(value["path"])] = _file(request, item["key"], value)
    if not header.get("summary"):
        raise HubError(400, message="a commit needs a summary")
    new, number = found.commit(
        unquote(revision), header["summary"], added, deleted, header.get("parentCommit"), as_pull_request
    )
    answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{web_url(request, found)}/commit/{new.oid}",
              "hookOutput": ""}  # fmt: skip
    if number is not None:
        answer["pullRequestUrl"] = f"{web_url(request, found)}/discussions/{number}"
    return as_json(answer)


def _file(request: Request, key: str, value: Mapping[str, Any]) -> File:
    if key == "file":
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise HubError(400, message=f"{value['path']}: {error}") from error
        return File(len(content), content)
    oid = value["oid"]
    if not request.hub.has_large(oid):
        raise HubError(400, message=f"LFS pointer pointed to a file that does not exist: {value['path']}")
    size = len(request.hub.large[oid]) if oid in request.hub.large else request.hub.xet.files[oid].size
    return File(size, sha256=oid)


def _checked_path(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/") or not path:
        raise HubError(400, message=f"Invalid path: {path}")
    return path


def _needs_account(request: Request) -> None:
    if request.account is None:
        raise HubError(401, message="Invalid username or password.")


def web_url(request: Request, repo: Repo) -> str:
    return f"{request.server.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}"


# Xet


def xet_token(request: Request, kind: str, repo: str, access: str, revision: str) -> Answer:
    request.repo(kind, repo, write=access == "write" and not request.flag("create_pr"))
    url, expires = f"{request.server.url}/xet/{request.server.name}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return as_json({"casUrl": url, "exp": expires, "accessToken": "xet"}, **headers)


def put_xorb(request: Request, name: str) -> Answer:
    new = name not in request.hub.xet.xorbs
    request.hub.xet.xorbs[name] = request.body
    return as_json({"was_inserted": new})


def get_xorb(request: Request, name: str) -> Answer:
    return ranged(request, request.hub.xet.xorbs[name], {})


def put_shard(request: Request) -> Answer:
    try:
        request.hub.xet.add_shard(request.body)
    except ValueError as error:
        raise HubError(400, message=str(error)) from error
    return as_json({"result": 1})


def reconstruction(request: Request, name: str) -> Answer:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-"))
    first, last = int(wanted[1]), int(wanted[2] or 2**62)
    stored = next((file for file in request.hub.xet.files.values() if file.hash == name), None)
    if stored is not None and first >= stored.size > 0:
        raise HubError(416)
    found = request.hub.xet.reconstruction(
        name, first, last, f"{request.server.storage_url}/xet/{request.server.name}"
    )
    if found is None:
        raise HubError(404)
    return as_json(found)


def unknown_chunk(request: Request, name: str) -> Answer:
    """No global deduplication."""
    raise HubError(404)


_ANY = r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_WEB = r"/(?P<kind>(?:datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"
_XET, _HASH = r"/xet/[0-9a-f]{32}", r"(?P<name>[0-9a-f]{64})"
_REV = r"(?P<revision>[^/]+|refs/pr/\d+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("DELETE", r"/api/repos/delete", delete_repo),
    ("POST", r"/api/repos/move", move_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("PUT", rf"/api/{_ANY}/settings", settings),
    ("GET", rf"/api/{_ANY}", info),
    ("GET", rf"/api/{_ANY}/revision/{_REV}", info),
    ("GET", rf"/api/{_ANY}/refs", refs),
    ("GET", rf"/api/{_ANY}/commits/{_REV}", commits),
    ("POST|DELETE", rf"/api/{_ANY}/branch/(?P<name>.+)", branch),
    ("POST|DELETE", rf"/api/{_ANY}/tag/(?P<name>.+)", tag),
    ("GET", rf"/api/{_ANY}/tree/{_REV}(?:/(?P<path>.+))?", tree),
    ("POST", rf"/api/{_ANY}/paths-info/{_REV}", paths_info),
    ("GET", rf"/api/{_ANY}/xet-(?P<access>read|write)-token/{_REV}", xet_token),
    ("POST", rf"/api/{_ANY}/preupload/{_REV}", preupload),
    ("POST", rf"/api/{_ANY}/commit/{_REV}", commit),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", lfs_batch),
    ("GET|HEAD", rf"{_WEB}/resolve/{_REV}/(?P<path>.+)", resolve),
    ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})", upload),
    ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", upload_part),
    ("POST", r"/complete/(?P<oid>[0-9a-f]{64})", complete),
    ("GET|HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", download),
    ("POST", rf"{_XET}/v1/xorbs/default/{_HASH}", put_xorb),
    ("GET", rf"{_XET}/xorbs/{_HASH}", get_xorb),
    ("POST", rf"{_XET}/v1/shards|{_XET}/shards", put_shard),
    ("GET", rf"{_XET}/v1/reconstructions/{_HASH}", reconstruction),
    ("GET", rf"{_XET}/v1/chunks/[\w-]+/{_HASH}", unknown_chunk),
]
