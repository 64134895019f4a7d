"""scripts/train_llm.py end to end at toy size: what it writes, when it keeps what is there."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, RUN
from safetensors.torch import load_file

from blueberry import BlueberryTrainer, BlueberryTrainingArguments
from blueberry.training import replacing, run_folder
from blueberry.training.cpu import warn_about_slow_bf16
from blueberry.training.data import DataArguments
from blueberry.training.model import ModelArguments
from blueberry.training.parser import BlueberryArgumentParser


@pytest.fixture(scope="module")
def finished(arguments: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 32 steps with tracked spectra, launched as users do, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               "scripts/accelerate_configs/single.yaml", "scripts/train_llm.py", *map(str, arguments),
               "--track_manifold", "true", "--track_every_n_steps", "8", "--output_dir", str(folder)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_a_run_is_one_folder_with_everything_in_it(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "runs", "spectral_log", "eval_results.json", "optimizer_audit.json", "checkpoint-32",
            "model.safetensors", "config.json", "tokenizer.json"} <= names  # fmt: skip


def test_eval_results_hold_loss_accuracy_perplexity_bits_and_the_unigram_loss(finished):
    results = json.loads((finished / "eval_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(2.718281828459045 ** results["eval_loss"], rel=1e-4)
    assert 0 < results["eval_accuracy"] < 1
    assert 0 < results["eval_bits_per_byte"] < 8
    assert results["eval_unigram_loss"] < 5.71  # ln 300, the loss of a uniform guess over the vocabulary


def test_training_reduces_the_loss(finished):
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[0] == pytest.approx(5.70, abs=0.4)  # ln 300 = 5.70 at the start
    assert losses[-1] < losses[0] - 0.5


def test_the_end_of_a_run_says_what_came_of_it(finished):
    text = (finished / "stdout.txt").read_text()
    for name in (
        "tokens/s",
        "validation loss",
        "unigram model",
        "perplexity",
        "bits per byte",
        "TensorBoard",
        "Sample",
    ):
        assert name in text


def test_the_audit_says_what_each_parameter_got(finished):
    audit = json.loads((finished / "optimizer_audit.json").read_text())
    assert {row["optimizer"] for row in audit if "experts" in row["name"]} == {"muon"}
    assert {row["optimizer"] for row in audit if "embed" in row["name"] or "gate" in row["name"]} == {"adamw"}


def test_tensorboard_has_losses_speed_and_one_learning_rate_for_each_group(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "runs")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/loss", "eval/accuracy", "train/tokens_per_second", "train/lr/muon",
            "train/lr/adamw"} <= tags  # fmt: skip
    peak = max(event.value for event in events.Scalars("train/lr/muon"))
    assert peak == pytest.approx(0.01, rel=0.05)
    assert any("q_proj" in tag for tag in tags)


def test_a_fresh_process_loads_the_model_and_generates_with_the_cache(finished):
    code = f"""
import torch, blueberry
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(finished)!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({str(finished)!r})
inputs = tokenizer("Fellow citizens", return_tensors="pt", return_token_type_ids=False)
cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
assert type(model).__name__ == "BlueberryForCausalLM" and torch.equal(cached, plain)
assert tokenizer.decode(tokenizer("Grüße, 世界!").input_ids) == "Grüße, 世界!"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_config_yaml_runs_the_same_again_and_the_command_line_wins(finished, script, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["muon_lr"] == 0.01 and config["train_tokens"] == 8192
    script("train_llm.py", "--config", finished / "config.yaml", "--output_dir", tmp_path / "again",
           "--track_manifold", "false")  # fmt: skip
    other = BlueberryArgumentParser([ModelArguments, DataArguments, BlueberryTrainingArguments])
    del config["track_manifold"], config["track_every_n_steps"], config["on_violation"]
    run_folder.write_yaml(tmp_path / "config.yaml", config)
    parsed = other.parse(["--config", str(tmp_path / "config.yaml"), "--optimizer", "adamw"])
    assert parsed[2].optimizer == "adamw"  # --muon_lr of the file is not held against it
    ours, theirs = load_file(tmp_path / "again/model.safetensors"), load_file(finished / "model.safetensors")
    assert not (tmp_path / "again/spectral_log").exists()
    # the first run was made with one OpenMP thread: another order of sums is all that may differ
    assert all(torch.allclose(ours[name], theirs[name], atol=0.05) for name in theirs)


def rows_of(run: Path) -> pd.DataFrame:
    keys = ["step", "parameter", "expert"]
    return pd.read_parquet(run / "spectral_log").sort_values(keys).reset_index(drop=True)


def test_two_processes_train_one_model(arguments, tmp_path):
    """Through accelerate's launcher and DDP, with Newton-Schulz shared out."""
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               "scripts/accelerate_configs/multi_cpu.yaml", "--main_process_port", "0", "scripts/train_llm.py",
               *map(str, arguments), "--per_device_train_batch_size", "4", "--track_manifold", "true",
               "--output_dir", str(folder)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (folder / "eval_results.json").is_file(), done.stderr[-3000:]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 32  # 2 processes x 4 windows x 32 tokens a step, as 1 x 8 x 32
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] < 5.2
    assert rows_of(folder).groupby(["step", "parameter", "expert"], dropna=False).size().max() == 1


def test_an_earlier_run_is_neither_overwritten_nor_touched_without_being_told(finished, arguments, script, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SystemExit):
        script("train_llm.py", *arguments, "--output_dir", finished)
    assert "already holds a run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_overwriting_replaces_the_run_but_keeps_what_no_run_writes(arguments, script, tmp_path):
    folder = tmp_path / "run"
    short = [*arguments, "--train_tokens", 512, "--output_dir", folder]
    script("train_llm.py", *short)
    mine = ["notes.txt", "README.md", "tokenizer_notes.txt", "modeling_blueberry.py", "my_results.json"]
    for name in mine:
        (folder / name).write_text("mine")
    (folder / "checkpoint-2" / "old").write_text("old")
    script("train_llm.py", *short, "--overwrite_output_dir")
    assert all((folder / name).read_text() == "mine" for name in mine)
    assert (folder / "checkpoint-2").is_dir() and not (folder / "checkpoint-2" / "old").exists()


def test_a_folder_of_other_files_is_never_taken_for_a_run(arguments, script, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        script("train_llm.py", *arguments, "--output_dir", tmp_path, "--overwrite_output_dir")
    assert "no run of Blueberry" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("polynomial", "{}"), ("cosine_with_min_lr", '{"min_lr": 0.001}'), ("warmup_stable_decay", "{}")],
)
def test_schedules_with_settings_of_their_own_run(kind, kwargs, arguments, script, tmp_path):
    script("train_llm.py", *arguments, "--train_tokens", 512, "--output_dir", tmp_path / "run", "--lr_scheduler_type",
           kind, "--lr_scheduler_kwargs", kwargs)  # fmt: skip
    assert (tmp_path / "run" / "eval_results.json").is_file()


def test_a_schedule_without_its_settings_is_one_line(arguments, script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("train_llm.py", *arguments, "--output_dir", tmp_path / "run", "--lr_scheduler_type",
               "cosine_with_min_lr")  # fmt: skip
    assert "--lr_scheduler_type cosine_with_min_lr" in capsys.readouterr().err.splitlines()[-1]


def test_a_stream_of_documents_trains_for_the_tokens_asked_for(small_corpus, small_config, script, tmp_path):
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(small_corpus.glob("*.txt"))]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    script("train_llm.py", "--dataset", tmp_path / "documents.jsonl", "--streaming", "true", "--config_name",
           small_config, *RUN, "--train_tokens", 1000, "--max_validation_tokens", 500, "--output_dir",
           tmp_path / "run")  # fmt: skip
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 4  # 1000 tokens in steps of 8 x 32


def test_a_model_without_positions_trains_on_windows_of_the_length_asked_for(small_corpus, script, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    (tmp_path / "mamba.json").write_text(json.dumps({"model_type": "mamba", **sizes}))
    script("train_llm.py", "--dataset", small_corpus, "--config_name", tmp_path / "mamba.json", *RUN, "--train_tokens",
           256, "--max_length", 16, "--output_dir", tmp_path / "run")  # fmt: skip
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2  # of 8 x 16 tokens


def test_a_start_that_fails_in_its_first_step_does_not_stand_in_the_way_of_the_next(
    arguments, script, tmp_path, monkeypatch
):
    given = [*arguments, "--train_tokens", 512, "--track_manifold", "true", "--output_dir", tmp_path]
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(BlueberryTrainer, "training_step", mock.Mock(side_effect=RuntimeError("out of memory")))
        script("train_llm.py", *given)
    assert not list(tmp_path.iterdir())
    script("train_llm.py", *given)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("killed", [False, True])
def test_the_run_to_be_replaced_is_kept_until_the_new_one_has_taken_a_step(
    killed, arguments, script, tmp_path, monkeypatch
):
    given = [*arguments, "--train_tokens", 512, "--output_dir", tmp_path]
    script("train_llm.py", *given)
    before = contents(tmp_path)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(BlueberryTrainer, "training_step", mock.Mock(side_effect=RuntimeError("out of memory")))
        if killed:  # nothing is undone then; the next attempt finds both runs, and fails orderly
            with monkeypatch.context() as kill, pytest.raises(RuntimeError):
                kill.setattr(run_folder.RunFolderCallback, "undo", lambda *_: None)
                script("train_llm.py", *given, "--overwrite_output_dir")
        script("train_llm.py", *given, "--overwrite_output_dir")
    assert contents(tmp_path) == before
    script("train_llm.py", *given, "--overwrite_output_dir", "--seed", 1)
    assert not (tmp_path / ".replaced").exists()
    assert contents(tmp_path)["model.safetensors"] != before["model.safetensors"]


class Killed(BaseException):
    """Stands for kill -9: nothing is undone."""


@pytest.mark.parametrize("when", ["after one file", "before the config", "after all files", "while it is deleted"])
def test_a_run_that_is_being_replaced_survives_a_kill_at_any_time(
    when, arguments, script, tmp_path, monkeypatch, capsys
):
    given = [*arguments, "--train_tokens", 512, "--output_dir", tmp_path]
    script("train_llm.py", *given)
    before = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_folder.RunFolderCallback, "undo", lambda *_: None)
        patch.setattr(run_folder, "write_json", mock.Mock(side_effect=Killed))
        renames, rename = [], Path.rename
        stop = {"after one file": 2, "before the config": len(replacing._contents(tmp_path))}.get(when)

        def killing(path: Path, target: Path) -> Path:
            renames.append(path.name)
            if len(renames) == stop:
                raise Killed
            return rename(path, target)

        patch.setattr(Path, "rename", killing)
        script("train_llm.py", *given, "--overwrite_output_dir")
    if when == "while it is deleted":  # the new run has taken its step: its folder stays, and the rest goes
        (tmp_path / ".replaced").rename(tmp_path / ".discarded")
        (tmp_path / "config.yaml").write_text("train_tokens: 512")
        script("train_llm.py", *given, "--overwrite_output_dir")
        assert not (tmp_path / ".discarded").exists()
        return
    with pytest.raises(SystemExit):
        script("train_llm.py", *given)
    assert "a start was killed while it replaced the run there, which is back now" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_of_two_runs_started_together_the_second_gets_no_folder(arguments, script, tmp_path, monkeypatch, capsys):
    """The second starts while the first takes its first step, and passed the look at the folder before."""
    given = [*arguments, "--train_tokens", 512, "--output_dir", tmp_path / "run"]
    step, outcomes = BlueberryTrainer.training_step, []

    def start_another(trainer: BlueberryTrainer, *inputs: object) -> torch.Tensor:
        if not outcomes:
            outcomes.append(None)
            with mock.patch.object(run_folder, "check_run_folder"), pytest.raises(SystemExit) as stop:
                script("train_llm.py", *given, "--seed", 7)
            outcomes.append(stop.value.code)
        return step(trainer, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(BlueberryTrainer, "training_step", start_another)
        script("train_llm.py", *given)
    assert outcomes == [None, 2]
    assert "another run is writing into it" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 42
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_came_and_went_while_another_prepared_is_not_overwritten(arguments, script, tmp_path, capsys):
    given = [*arguments, "--train_tokens", 512, "--output_dir", tmp_path]
    script("train_llm.py", *given)
    before = contents(tmp_path)
    with mock.patch.object(run_folder, "check_run_folder"), pytest.raises(SystemExit):
        script("train_llm.py", *given, "--seed", 7)
    assert "already holds a run" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_lock_file_of_a_killed_run_stands_in_nobodys_way(arguments, script, tmp_path):
    (tmp_path / ".lock").touch()
    script("train_llm.py", *arguments, "--train_tokens", 512, "--output_dir", tmp_path)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("extra", [[], ["--dataloader_drop_last", "true"]])
def test_windows_that_fill_no_batch_still_make_up_the_tokens_asked_for(extra, arguments, script, tmp_path):
    script("train_llm.py", *arguments, "--per_device_train_batch_size", 250, "--gradient_accumulation_steps", 1,
           "--train_tokens", 30_000, "--output_dir", tmp_path, *extra)  # fmt: skip
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    step = 250 * 32
    assert 30_000 <= state["num_input_tokens_seen"] < 30_000 + step


def test_everybody_may_read_the_weights_who_may_read_the_rest(finished):
    for folder in (finished, finished / "checkpoint-32"):
        modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
        assert len(modes) == 1


def test_without_tensorboard_the_summary_names_no_log(arguments, script, tmp_path, capsys):
    script("train_llm.py", *arguments, "--train_tokens", 256, "--report_to", "none", "--output_dir", tmp_path)
    assert "TensorBoard" not in capsys.readouterr().out


def test_the_length_on_the_command_line_replaces_that_of_the_config_file(arguments, script, tmp_path):
    file = {"train_tokens": 8192, "per_device_train_batch_size": 8, "preset": "blueberry-88m"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(file))
    rest = [a for i, a in enumerate(arguments) if "--train_tokens" not in (a, arguments[i - 1])]
    script("train_llm.py", "--config", tmp_path / "config.yaml", *rest, "--max_steps", 2, "--output_dir",
           tmp_path / "run")  # fmt: skip
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


def test_the_config_file_names_every_argument_that_another_version_may_default_otherwise(finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    fields = [f for group in (DataArguments, BlueberryTrainingArguments) for f in dataclasses.fields(group)]
    defaults = {f.name for f in fields if f.default not in (None, "", dataclasses.MISSING)}
    assert type(config["eval_delay"]) is float  # as it is read back
    assert (
        defaults - config.keys() - run_folder._LEFT_OUT == {"max_steps", "use_cpu"} - config.keys()
    )  # train_tokens, the machine
    assert config["seed"] == 42 and config["adam_beta2"] == 0.95
    assert not {"output_dir", "hub_token", "logging_dir"} & config.keys()


def test_the_preset_by_default_is_named_in_the_config_file():
    training = BlueberryTrainingArguments(use_cpu=True)
    assert run_folder.describe(training, ModelArguments())["preset"] == "tiny"


def test_arguments_read_back_from_the_config_file_describe_the_same_run(tmp_path):
    groups = [ModelArguments, DataArguments, BlueberryTrainingArguments]
    line = ("--use_cpu true --preset tiny --dataset a.txt --max_steps 7 --bf16 true --torch_compile true "
            "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {\"num_decay_steps\":3} --report_to none "
            "--warmup_steps 0.1 --save_strategy no --optimizer adamw --learning_rate 0.003")  # fmt: skip
    first = BlueberryArgumentParser(groups).parse(line.split())
    settings = run_folder.describe(first[2], *first[:2])
    run_folder.write_yaml(tmp_path / "config.yaml", settings)
    again = BlueberryArgumentParser(groups).parse(["--config", str(tmp_path / "config.yaml")])
    assert run_folder.describe(again[2], *again[:2]) == settings
    assert again[2].adamw_lr == 0.003 and again[2].lr_scheduler_kwargs == {"num_decay_steps": 3}


def test_bf16_without_hardware_is_one_line_of_warning(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    warn_about_slow_bf16()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    warn_about_slow_bf16()
    assert re.fullmatch("warning: --bf16 true .* slower than fp32.*\n", capsys.readouterr().err)


GENERATE = {
    "no prompt": (["--prompt", " "], "--prompt is empty"),
    "no tokens": (["--max_new_tokens", 0], "--max_new_tokens 0 writes nothing"),
    "negative seed": (["--seed", -1], "--seed -1: must be at least 0"),
    "no model": (["--model", "results/nope"], "--model results/nope: no such folder, and the Hub did not give it"),
    "no folder": (["--model", "./nope"], "--model ./nope: no such folder; check the path"),
    "too many tokens": (["--max_new_tokens", 99], "--max_new_tokens 99: after a prompt of"),
    "long prompt": (["--prompt", "word " * 40], "tokens, the model 32 positions: give a shorter"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_what_cannot_be_generated_is_one_line(case, finished, script, capsys):
    given, message = GENERATE[case]
    with pytest.raises(SystemExit) as stop:
        script("generate.py", "--model", finished, *given)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and re.search(message, error[0])


def test_a_model_of_few_positions_writes_what_it_has_room_for(finished, script, capsys):
    script("generate.py", "--model", finished)
    assert capsys.readouterr().out.startswith("My fellow citizens,")


def test_a_model_without_a_tokenizer_is_one_line(finished, script, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(finished / name)
    with pytest.raises(SystemExit) as stop:
        script("generate.py", "--model", tmp_path)
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and "has no tokenizer" in error[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["spectral", "--repeat", 3], "unrecognized arguments: --repeat 3"),
        (["model_zoo"], "invalid choice: 'model_zoo'"),
        (["spectral", "--repeats", 0], "--repeats 0 measures nothing"),
    ],
)
def test_benchmark_refuses_in_one_line(given, message, script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    with pytest.raises(SystemExit) as stop:
        script("benchmark.py", *given)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
