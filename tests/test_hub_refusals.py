"""Runs, tokens and files that cannot be pushed: one line, exit code 2, nothing on the Hub."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

pytestmark = pytest.mark.usefixtures("few_figures", "machine", "no_waiting")


@pytest.fixture(scope="module")
def run(arguments: list, run_script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "moe"
    run_script("train_llm.py", *arguments, "--output_dir", folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def refused(script, capsys):
    def call(name: str, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            script(name, *arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error

    return call


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


BREAKS = {
    "half of the model": (lambda run: half(run / "model.safetensors"), "damaged or cut off"),
    "the last byte of the model": (
        lambda run: os.truncate(run / "model.safetensors", (run / "model.safetensors").stat().st_size - 1),
        "damaged or cut off",
    ),
    "all but its header": (lambda run: os.truncate(run / "model.safetensors", 100), "damaged or cut off"),
    "all of it": (lambda run: os.truncate(run / "model.safetensors", 0), "damaged or cut off (0 bytes)"),
    "the arguments": (lambda run: (run / "config.yaml").write_text(""), "config.yaml is damaged"),
    "the results": (lambda run: (run / "eval_results.json").write_text("[]"), "eval_results.json is damaged"),
    "the generation": (lambda run: (run / "generation_config.json").write_text("{"), "generation_config.json is dam"),
    "the card": (lambda run: (run / "README.md").write_bytes(b"caf\xe9"), "README.md is not in UTF-8"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_run_with_a_broken_file_is_refused(hub, copy, refused, broken):
    damage, expected = BREAKS[broken]
    damage(copy)
    assert expected in refused("push_to_hub.py", "--run", copy, "--repo_id", "ann/moe")
    assert not hub.hub.repos


def test_a_config_that_names_no_class_can_be_pushed(copy, script, capsys):
    config = json.loads((copy / "config.json").read_text())
    del config["architectures"]
    (copy / "config.json").write_text(json.dumps(config))
    script("push_to_hub.py", "--run", copy, "--card_only")
    assert "| type | `blueberry`, a mixture" in (copy / "README.md").read_text()


def test_the_name_of_a_run_may_hold_a_comma(run, script, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "lr 0,1")
    script("push_to_hub.py", "--run", tmp_path / "lr 0,1", "--repo_id", "ann/moe", "--dry_run")
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("token", ["hf_sécret", "hf_abc def", "Bearer hf_ANN", "\x1b[200~hf_ANN"])
def test_a_token_that_cannot_be_one_is_named_as_the_cause_and_not_shown(hub, run, refused, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    error = refused("push_to_hub.py", "--run", run, "--repo_id", "ann/moe")
    assert "the token holds blanks or characters" in error and token not in error
    assert not hub.hub.repos


@pytest.mark.parametrize("status", [500, 0])
def test_a_card_that_does_not_come_at_first_is_asked_for_again(hub, run, script, refused, no_waiting, status):
    script("push_to_hub.py", "--run", run, "--repo_id", "ann/moe")
    shutil.rmtree(Path(HfApi().hf_hub_download("ann/moe", "README.md")).parents[2])
    hub.fail("HEAD", "/resolve/.*README", status, times=9)
    hub.fail("GET", "/resolve/.*README", status, times=9)
    no_waiting.clear()
    assert "the Hub failed" in refused("push_to_hub.py", "--run", run, "--repo_id", "ann/moe", "--license", "mit")
    assert [wait for wait in no_waiting if wait in (2.0, 8.0)][-2:] == [2.0, 8.0]


def test_a_cache_that_cannot_be_written_is_said(hub, run, script, refused, tmp_path, monkeypatch):
    script("push_to_hub.py", "--run", run, "--repo_id", "ann/moe")
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    error = refused("push_to_hub.py", "--run", run, "--repo_id", "ann/moe")
    assert str(tmp_path / "file") in error and "HF_HOME" in error


def test_a_folder_that_is_not_there_is_not_served(refused):
    pytest.importorskip("fastapi")
    assert "/nowhere: no such folder" in refused("serve.py", "/nowhere")
