"""Pushing while training, through the Hub of the tests."""

import shutil
from pathlib import Path

import pytest
from conftest import HOST, TOKEN, files_of
from huggingface_hub import HfApi
from ranks import run_ranks

from blueberry.errors import UsageError
from blueberry.training.checkpoints import flaw
from hub.callback import PushToHubCallback
from hub.push import Destination

pytestmark = pytest.mark.usefixtures("few_figures", "machine", "no_waiting")


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_training_pushes_by_each_strategy(hub, arguments, script, tmp_path, strategy, capsys):
    """And leaves what resumes, and nothing about the machine."""
    out = tmp_path / "run"
    told = ["--push_to_hub", "true", "--hub_strategy", strategy, "--hub_model_id", "ann/live", "--hub_token", TOKEN]
    script("train_llm.py", *arguments, "--output_dir", out, *told)
    assert "pushed to" in capsys.readouterr().out
    files = files_of(HfApi(), "ann/live", tmp_path / "all")
    commits = [commit.title for commit in HfApi().list_repo_commits("ann/live")]
    steps = {f"Training in progress, step {step}" for step in (16, 32)}
    assert steps & set(commits) == (set() if strategy == "end" else steps)
    assert commits[0].startswith("Upload run") and "Trained with Blueberry" in files["README.md"].decode()
    folders = {path.split("/")[0] for path in files if "checkpoint" in path}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-16", "checkpoint-32"}}
    assert folders == expected.get(strategy, set())
    assert all(flaw(tmp_path / "all" / folder) is None for folder in folders)
    local = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in local if TOKEN.encode() in path.read_bytes()]
    for path, content in files.items():
        assert not [secret for secret in (HOST, TOKEN, str(tmp_path), "pytest-of-") if secret.encode() in content], (
            path
        )
        assert not path.endswith("training_args.bin")


def test_a_checkpoint_from_the_hub_goes_on(hub, arguments, small_corpus, small_config, script, tmp_path, monkeypatch):
    """In a place where data and config have the names that they had."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_corpus, "corpus")
    shutil.copy(small_config, "config.json")
    named = {small_corpus: "corpus", small_config: "config.json"}
    given = [named.get(argument, argument) for argument in arguments]
    told = ["--push_to_hub", "true", "--hub_strategy", "checkpoint", "--hub_model_id", "live"]  # the account's own
    script("train_llm.py", *given, "--output_dir", "run", *told)
    HfApi().snapshot_download("ann/live", local_dir="again")
    Path("again/last-checkpoint").rename("again/checkpoint-32")
    script("train_llm.py", "--resume_from_checkpoint", "again/checkpoint-32", "--train_tokens", 12288,
           "--output_dir", "again", "--push_to_hub", "false")  # fmt: skip
    assert Path("again/checkpoint-48").is_dir()


def test_a_hub_that_fails_while_training_costs_a_push_and_not_the_run(hub, arguments, script, tmp_path, caplog):
    hub.fail("POST", "/commit/", 500, times=3)
    told = ["--push_to_hub", "true", "--hub_model_id", "ann/live"]
    script("train_llm.py", *arguments, "--output_dir", tmp_path / "run", *told)
    assert "step 16 was not pushed: the Hub failed (500" in caplog.text
    assert "model.safetensors" in HfApi().list_repo_files("ann/live")


def test_training_that_may_not_push_does_not_start(hub, arguments, script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("train_llm.py", *arguments, "--output_dir", tmp_path / "run", "--push_to_hub", "true",
               "--hub_model_id", "bob/live")  # fmt: skip
    assert (
        stopped.value.code == 2
        and "--hub_model_id bob/live: this token may not write there (403)" in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("status", [500, 0])
def test_a_hub_that_does_not_tell_the_account_is_an_error_of_one_line(
    hub, arguments, script, tmp_path, capsys, status
):
    hub.fail("GET", "/whoami", status, times=9)
    with pytest.raises(SystemExit) as stopped:
        script("train_llm.py", *arguments, "--output_dir", tmp_path / "run", "--push_to_hub", "true",
               "--hub_model_id", "live")  # fmt: skip
    assert stopped.value.code == 2 and "error: the Hub failed" in capsys.readouterr().err


def push_sharded(rank: int, folder: Path) -> str:
    from test_fsdp import trainer

    made = trainer(folder / "run", 2, sharded=True)
    made.add_callback(PushToHubCallback(Destination("ann/live")))
    try:
        made.train()
    except UsageError as error:
        return str(error)
    return "trained"


def test_sharded_checkpoints_are_refused_before_the_first_step(tmp_path):
    for said in run_ranks(push_sharded, 2, tmp_path):
        assert said.startswith("--hub_strategy every_save: sharded checkpoints") and "--hub_strategy end" in said
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_checkpoint_that_cannot_be_read_costs_a_push_and_not_the_run(hub, arguments, script, tmp_path, caplog,
                                                                       monkeypatch):  # fmt: skip
    def broken(folder, scrub):
        raise FileNotFoundError(2, "No such file or directory", "config.json")

    monkeypatch.setattr("hub.callback.model_files", broken)
    told = ["--push_to_hub", "true", "--hub_model_id", "ann/live"]
    script("train_llm.py", *arguments, "--output_dir", tmp_path / "run", *told)
    assert "step 16 was not pushed: [Errno 2]" in caplog.text
    assert "model.safetensors" in HfApi().list_repo_files("ann/live")
