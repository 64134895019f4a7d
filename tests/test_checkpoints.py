"""Checkpoints are whole or not there: damage is found, a full disk costs nothing, the last intact one stays, signals
end a run in order."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_resuming import assert_same_weights, rows_of, state_of

from blueberry import BlueberryTrainer
from blueberry.errors import UsageError
from blueberry.training.checkpoints import checkpoints_of, delete_old_checkpoints, flaw, new_checkpoint
from blueberry.training.manifest import MANIFEST, write_manifest


@pytest.fixture(scope="module")
def finished(arguments: list, tmp_path_factory: pytest.TempPathFactory, run_script: Callable) -> Path:
    """A run of 32 steps with tracked spectra and checkpoints at 16 and 32."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    run_script("train_llm.py", *arguments, *TRACKED, "--output_dir", folder)
    return folder


TRACKED = ["--track_manifold", "true", "--track_every_n_steps", 8]


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, Path.unlink])
def test_damage_to_any_file_is_found(damage, finished, tmp_path):
    """Each file in turn, the manifest too."""
    checkpoint = finished / "checkpoint-32"
    assert flaw(checkpoint) is None
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST} < names
    for name in sorted(names):
        damaged = Path(shutil.copytree(checkpoint, tmp_path / name))
        damage(damaged / name)
        assert name in flaw(damaged) or "model*.safetensors" in flaw(damaged) or "optimizer*" in flaw(damaged), name


def test_every_bit_of_a_manifest_counts(finished, tmp_path):
    """Flipped, it is found out, or means the same as before."""
    copy = Path(shutil.copytree(finished / "checkpoint-32", tmp_path / "copy"))
    written = (copy / MANIFEST).read_bytes()
    for index in range(len(written)):
        flipped = written[:index] + bytes([written[index] ^ (1 << index % 8)]) + written[index + 1 :]
        (copy / MANIFEST).write_bytes(flipped)
        assert flaw(copy) is not None, (index, flipped[index - 5 : index + 5])


def test_damage_is_found_before_a_step_is_taken(finished, script, capsys, tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "eval_results.json").unlink()
    flip_a_bit(run / "checkpoint-32" / "optimizer.pt")
    flip_a_bit(run / "checkpoint-16" / "model.safetensors")
    monkeypatch.setattr(BlueberryTrainer, "training_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(SystemExit) as stop:
        script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "holds no checkpoint that is whole" in printed.err
    for step, name in ((32, "optimizer.pt"), (16, "model.safetensors")):
        assert f"checkpoint-{step} has a damaged {name}" in printed.out


def test_a_checkpoint_of_another_version_is_named_as_such(finished, script, capsys, tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.setattr("blueberry.training.manifest.FORMAT", 2)
    write_manifest(run / "checkpoint-32")
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        script("train_llm.py", "--resume_from_checkpoint", run / "checkpoint-32")
    error = capsys.readouterr().err
    assert "was written by another version of Blueberry (checkpoint format 2, this one reads 1)" in error
    assert f"the newest is {run / 'checkpoint-16'}" in error


def written(run: Path, step: int, *, intact: bool = True) -> Path:
    """A checkpoint folder, without what training needs."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (folder / name).write_text(name)
    if intact:
        write_manifest(folder)
    return folder


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_limit_never_deletes_the_last_intact_checkpoint(limit, tmp_path):
    """Also where damaged ones of later steps are left over, from which the run was resumed further back."""
    for step, intact in ((8, True), (32, False), (40, False)):
        written(tmp_path, step, intact=intact)
    newest = written(tmp_path, 16)
    delete_old_checkpoints(newest, limit, best=None)
    kept = checkpoints_of(tmp_path)
    assert len(kept) == limit and newest in kept
    assert limit < 2 or tmp_path / "checkpoint-8" in kept


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    folders = [written(tmp_path, step) for step in (8, 16, 24, 32)]
    delete_old_checkpoints(folders[-1], 2, best=str(folders[0]))
    assert checkpoints_of(tmp_path) == [folders[-1], folders[0]]


def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path):
    with pytest.raises(ZeroDivisionError), new_checkpoint(tmp_path / "checkpoint-1", is_first=True) as folder:
        assert folder.parent == tmp_path and not folder.match("checkpoint-*")
        raise ZeroDivisionError
    assert checkpoints_of(tmp_path) == []
    with new_checkpoint(tmp_path / "checkpoint-1", is_first=True) as folder:
        (folder / "file").write_text("content")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text())["files"].keys() == {"file"}


@pytest.fixture
def small_files():
    """No file may grow beyond 100 kB: what a full disk looks like to a process, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save", [lambda path: torch.save(torch.zeros(50_000), path / "optimizer.pt"),
                                  lambda path: (path / "config.json").write_text("x" * 200_000)])  # fmt: skip
def test_a_full_disk_is_one_error_and_leaves_earlier_checkpoints_alone(save, tmp_path, small_files):
    earlier = written(tmp_path, 8)
    small_files(100_000)
    refusal = pytest.raises(UsageError, match=r"checkpoint-16 could not be written: .*; make room and go on with")
    with refusal, new_checkpoint(tmp_path / "checkpoint-16", is_first=True) as folder:
        save(folder)
    assert list(tmp_path.iterdir()) == [earlier] and flaw(earlier) is None


def test_a_run_that_finds_the_disk_full_can_be_resumed(finished, arguments, script, tmp_path, capsys, small_files):
    run = tmp_path / "run"
    save_checkpoint = BlueberryTrainer._save_checkpoint

    def with_a_full_disk(trainer: BlueberryTrainer, *given: object) -> None:
        small_files(100_000 if trainer.state.global_step > 16 else resource.RLIM_INFINITY)
        save_checkpoint(trainer, *given)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(BlueberryTrainer, "_save_checkpoint", with_a_full_disk)
        script("train_llm.py", *arguments, *TRACKED, "--output_dir", run)
    small_files(resource.RLIM_INFINITY)
    assert stop.value.code == 2 and "checkpoint-32 could not be written" in capsys.readouterr().err
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert_same_weights(run, finished)


@pytest.mark.parametrize("when", ["_save_checkpoint", "save_model"])
def test_a_disk_that_fills_up_after_a_checkpoint_is_one_line_and_costs_nothing(
    when, finished, arguments, script, tmp_path, capsys, small_files
):
    """Logs, audit and model: whatever is written next, by training or when it is over."""
    run, original = tmp_path / "run", getattr(BlueberryTrainer, when)

    def before_the_disk_is_full(trainer: BlueberryTrainer, *given: object, **named: object) -> None:
        if when == "save_model":
            small_files(resource.RLIM_INFINITY if "_internal_call" in named else 10_000)
        original(trainer, *given, **named)
        if when == "_save_checkpoint":
            small_files(1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(BlueberryTrainer, when, before_the_disk_is_full)
        script("train_llm.py", *arguments, *TRACKED, "--output_dir", run)
    small_files(resource.RLIM_INFINITY)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and "could not be written: " in error
    assert "; make room and " in error
    newest = checkpoints_of(run)[0]
    assert flaw(newest) is None and newest.name == ("checkpoint-32" if when == "save_model" else "checkpoint-16")
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert_same_weights(run, finished)
    assert rows_of(run).equals(rows_of(finished))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_the_run_in_order(number, finished, arguments, script, tmp_path, monkeypatch, capsys):
    """In step 21, between two checkpoints and two logs; what is resumed equals what was never stopped."""
    run, original = tmp_path / "run", BlueberryTrainer.training_step

    def signalled_in_step_21(trainer: BlueberryTrainer, *given: object) -> torch.Tensor:
        if trainer.state.global_step == 20:
            os.kill(os.getpid(), number)
        return original(trainer, *given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(BlueberryTrainer, "training_step", signalled_in_step_21)
        script("train_llm.py", *arguments, *TRACKED, "--output_dir", run)
    assert stop.value.code == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} at step 21; go on from {run / 'checkpoint-21'} with")
    assert flaw(run / "checkpoint-21") is None and not (run / "eval_results.json").exists()
    assert signal.getsignal(number) == signal.SIG_DFL
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert_same_weights(run, finished)
    assert rows_of(run).equals(rows_of(finished))
    ours, theirs = (
        [(row["step"], row.get("loss")) for row in state_of(one)["log_history"]] for one in (run, finished)
    )
    assert ours == theirs


def test_the_best_model_of_a_mixture_of_experts_is_loaded_whole(arguments, script, tmp_path):
    """Experts included. The largest loss counts as the best, so that it is not the last."""
    given = ["--eval_steps", 8, "--save_steps", 8, "--load_best_model_at_end", "true", "--save_total_limit", 1,
             "--metric_for_best_model", "loss", "--greater_is_better", "true"]  # fmt: skip
    script("train_llm.py", *arguments, *given, "--output_dir", tmp_path)
    best = state_of(tmp_path)["best_global_step"]
    assert best < 32
    assert_same_weights(tmp_path, tmp_path / f"checkpoint-{best}")
