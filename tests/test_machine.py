"""The commit that a record names is that of the code."""

import subprocess
from pathlib import Path

import pytest

from blueberry.machine import commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With one package and one record in it."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "code.py").write_text("x = 1\n")
    (tmp_path / "record.json").write_text("{}")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_results_that_a_run_writes_do_not_make_its_commit_dirty_but_changed_code_does(checkout):
    name = git(checkout, "rev-parse", "--short", "HEAD").strip()
    (checkout / "record.json").write_text("{1}")
    assert commit(checkout / "package") == name
    (checkout / "script.py").write_text("y = 2\n")  # new, and elsewhere in the checkout
    assert commit(checkout / "package") == f"{name}-dirty"


def test_a_package_installed_in_the_checkout_of_something_else_has_no_commit(checkout):
    (checkout / ".gitignore").write_text(".venv")
    (checkout / ".venv" / "package").mkdir(parents=True)
    (checkout / ".venv" / "package" / "code.py").write_text("x = 1\n")
    assert commit(checkout / ".venv" / "package") == ""


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit(checkout / "package") == ""
