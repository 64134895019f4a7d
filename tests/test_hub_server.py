"""The Hub of the tests answers the unmodified client as the real one would."""

import os
from urllib.parse import urlsplit

import pytest
from conftest import OTHER_TOKEN, READ_TOKEN, TOKEN
from hub_server import HubServer
from hub_server.xet import chunk_offsets, hash_text
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, close_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = os.urandom(6 * 2**20) + bytes(2**16)  # two parts; the end compresses


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("ann/model")
    return api


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)


def add(api: HfApi, path: str = "a.txt", content: bytes = b"a", **how):
    return api.create_commit("ann/model", [CommitOperationAdd(path, content)], commit_message="m", **how)


def read(api: HfApi, path: str, **how) -> bytes:
    with open(api.hf_hub_download("ann/model", path, **how), "rb") as file:
        return file.read()


def test_who_a_token_belongs_to(hub, api):
    assert api.whoami()["name"] == "ann"
    assert [org["name"] for org in api.whoami()["orgs"]] == ["lab"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_NOBODY")


def test_files_come_back_as_they_were_sent(hub, api, path_of_large_files):
    api.create_commit(
        "ann/model",
        [CommitOperationAdd("model.safetensors", LARGE), CommitOperationAdd("sub/a.txt", b"text")],
        commit_message="two files",
    )
    assert read(api, "model.safetensors") == LARGE
    assert read(api, "sub/a.txt") == b"text"
    assert (hub.asked("POST", "/xet/.*/v1/shards"), hub.asked("PUT", "/upload/")) == {"xet": (1, 0), "lfs": (0, 2)}[
        path_of_large_files
    ]
    (info,) = api.get_paths_info("ann/model", "model.safetensors")
    assert info.size == len(LARGE) and info.lfs is not None


def test_a_new_server_on_the_port_of_an_earlier_one_is_sent_everything(hub, api, path_of_large_files):
    """hf_xet keeps on disk what each address holds: by port alone one test in a hundred met an earlier one's notes."""
    add(api, "model.safetensors", LARGE)
    port = urlsplit(hub.url).port
    hub.__exit__()
    close_session()  # connections that are kept alive still lead to the earlier one
    with HubServer(port) as other:
        other.add_account(TOKEN, "ann")
        api.create_repo("ann/model")
        add(api, "model.safetensors", LARGE)
        assert read(api, "model.safetensors", force_download=True) == LARGE


def test_what_is_there_already_is_not_sent_again(hub, api, path_of_large_files):
    add(api, "model.safetensors", LARGE)
    sent = len(hub.requests)
    first = api.repo_info("ann/model").sha
    add(api, "model.safetensors", LARGE)  # the same content: no commit
    assert api.repo_info("ann/model").sha == first
    add(api, "copy.safetensors", LARGE)
    assert not [path for method, path in hub.requests[sent:] if method == "PUT" or "/xorbs/default/" in path]


def test_content_that_differs_from_its_hash_is_refused(hub, api, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    operation = CommitOperationAdd("model.safetensors", b"one")
    operation.path_or_fileobj = b"two"
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model.safetensors'"):
        api.create_commit("ann/model", [operation], commit_message="m")
    assert "model.safetensors" not in api.list_repo_files("ann/model")


def test_every_revision_keeps_its_files(hub, api):
    first = add(api, content=b"one").oid
    add(api, content=b"two")
    api.create_branch("ann/model", branch="old", revision=first)
    api.create_tag("ann/model", tag="v2")
    add(api, content=b"three")
    contents = {revision: read(api, "a.txt", revision=revision) for revision in ("main", first, "old", "v2")}
    assert contents == {"main": b"three", first: b"one", "old": b"one", "v2": b"two"}
    refs = api.list_repo_refs("ann/model")
    assert {ref.name for ref in refs.branches} == {"main", "old"} and [ref.name for ref in refs.tags] == ["v2"]
    assert len(api.list_repo_commits("ann/model")) == 4
    with pytest.raises(RevisionNotFoundError):
        read(api, "a.txt", revision="nothing")


def test_a_pull_request_leaves_the_branch_alone(hub, api):
    info = add(api, create_pr=True)
    assert info.pr_url.endswith("/ann/model/discussions/1") and info.pr_revision == "refs/pr/1"
    assert "a.txt" not in api.list_repo_files("ann/model")
    assert read(api, "a.txt", revision="refs/pr/1") == b"a"


def test_files_and_folders_are_deleted(hub, api):
    for path in ("a.txt", "sub/b.txt", "sub/deep/c.txt"):
        add(api, path)
    api.create_commit("ann/model", [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/")], commit_message="m")
    assert api.list_repo_files("ann/model") == [".gitattributes"]


def test_long_listings_come_in_pages(hub, api):
    names = [f"f{number:03d}.txt" for number in range(120)]
    api.create_commit("ann/model", [CommitOperationAdd(name, b"x") for name in names], commit_message="m")
    assert [entry.path for entry in api.list_repo_tree("ann/model")][1:] == names
    assert hub.asked("GET", "/tree/") == 3


def test_a_commit_on_an_old_state_is_refused(hub, api):
    old = api.repo_info("ann/model").sha
    add(api)
    with pytest.raises(HfHubHTTPError, match="412"):
        add(api, "b.txt", parent_commit=old)


def test_a_card_with_wrong_metadata_is_refused_before_the_upload(hub, api):
    with pytest.raises(ValueError, match="license"):
        add(api, "README.md", b"---\nlicense: [1, 2]\n---\n")
    assert hub.asked("POST", "/preupload/") == 0


def test_strangers_do_not_see_private_repositories(hub, api):
    api.create_repo("ann/secret", private=True)
    assert api.repo_info("ann/secret").private
    for token in (OTHER_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("ann/secret", token=token)
    assert api.repo_info("ann/secret", token=READ_TOKEN).private
    api.update_repo_settings("ann/secret", private=False)
    assert not api.repo_info("ann/secret", token=False).private


@pytest.mark.parametrize("token", [READ_TOKEN, OTHER_TOKEN])
def test_who_may_not_write_gets_403(hub, api, token):
    with pytest.raises(HfHubHTTPError, match="403"):
        add(api, token=token)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("lab/model", token=token)


def test_repositories_have_one_kind_and_one_name(hub, api):
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("ann/Model")
    assert api.create_repo("ann/model", exist_ok=True).repo_id == "ann/model"
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("ann/model", repo_type="dataset")
    assert api.create_repo("ann/model", repo_type="dataset").endswith("/datasets/ann/model")
    api.move_repo("ann/model", "lab/model")
    assert api.repo_info("ann/model").id == "lab/model"
    api.delete_repo("lab/model")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("lab/model")


def test_gated_repositories_and_missing_files_are_told_apart(hub, api):
    add(api)
    with pytest.raises(RemoteEntryNotFoundError):
        read(api, "nothing.txt")
    hub.hub.repos["models", "ann/model"].gated = True
    with pytest.raises(GatedRepoError):
        read(api, "a.txt", token=False)


def test_requests_fail_as_often_as_told(hub, api):
    hub.fail("POST", "/preupload/", 500, times=2)
    add(api)  # the client tries again
    assert hub.asked("POST", "/preupload/") == 3
    hub.fail("POST", "/commit/", 0)
    with pytest.raises(Exception, match="disconnected"):
        add(api, "b.txt")
    hub.fail("POST", "/commit/", 502, after=True)
    with pytest.raises(HfHubHTTPError, match="502"):
        add(api, "b.txt")
    assert "b.txt" in api.list_repo_files("ann/model")  # done, though the answer was lost


def test_hashes_and_chunks_are_read_as_xet_writes_them():
    assert hash_text(bytes(range(32))).startswith("0706050403020100")  # of the specification
    chunk = bytes([0, 3, 0, 0, 0, 3, 0, 0]) + b"abc"
    assert chunk_offsets(chunk * 2) == [0, 11, 22]
