"""Experiment 5 at its smoke scale, what it leaves on disk, and the statistics that experiments share."""

import json
import math
from pathlib import Path

import pytest
from conftest import ROOT

from blueberry.spectral.log import SpectralLog


@pytest.fixture
def experiment(script, small_corpus, tmp_path, monkeypatch):
    """`experiment("--seeds", 0, 1)` runs experiment 5 on eight small documents; returns its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(*arguments: object) -> Path:
        script("experiment_5_manifold_muon.py", "--scale", "smoke", "--dataset", small_corpus, "--output_dir",
               tmp_path / "out", *arguments)  # fmt: skip
        return tmp_path / "out"

    return run


def test_the_experiment_leaves_a_table_and_a_record_for_each_run_and_repeats_none(experiment, capsys):
    folder = experiment("--seeds", 0, 1)
    results = folder / "experiment_5" / "experiment_5_results.json"
    text, records = (results.parent / "table.md").read_text(), sorted(folder.glob("runs/*/*-12x*.json"))
    assert text in capsys.readouterr().out
    assert len(records) == 6 and len(list(folder.glob("runs/*/*-4x*.json"))) >= 9  # of tuning
    for criterion in ("constraint violations", "singular values", "deviation of the loss", "final validation loss"):
        assert f"| {criterion}" in text
    record = json.loads(next(path for path in records if "manifold" in path.name).read_text())
    assert record["violations"] == 0 and record["max_violation"]["stiefel_muon"] < 1e-4
    assert 0.9999 < record["sigma_min"] <= record["sigma_max"] < 1.0001
    assert len(record["losses"]) == len(record["gradient_norms"]) == record["run"]["steps"] == 12
    assert len(record["eval_losses"]) == 6 and record["eval_losses"][-1] == record["eval_loss"]
    assert len(SpectralLog(records[1].with_suffix("") / "spectral_log").table()) > 0
    assert {"commit", "torch", "threads"} <= set(record["versions"]) and record["time"]["optimizer_step_ms"] > 0
    table = json.loads(results.read_text())["table"]
    assert [row["criterion"] for row in table if row["holds"]][:2] == ["constraint violations", "singular values"]

    records[0].unlink()  # as if the experiment had been cut off in this run
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("runs/*/*.json")}
    experiment("--seeds", 0, 1)
    assert records[0].is_file() and kept == {path: path.stat().st_mtime_ns for path in kept}
    again = json.loads(results.read_text())["table"]
    final = [[row["minus adamw"] for row in rows if "final" in row["criterion"]] for rows in (table, again)]
    assert final[0] == final[1]  # the run that was made again is the same


def test_a_study_of_other_arms_is_refused(experiment, capsys):
    experiment("--seeds", 0, 1)
    with pytest.raises(SystemExit):
        experiment("--seeds", 0, 1, "--batch", 8)
    assert "was made with another config: use another --output_dir" in capsys.readouterr().err


def test_a_trial_of_a_killed_worker_is_tried_again(experiment, monkeypatch):
    """It stays RUNNING in the database, without heartbeats."""
    import optuna
    from experiments import sweeps

    monkeypatch.setattr(sweeps, "HEARTBEAT", 1)
    folder = experiment("--seeds", 0, 1)
    study = optuna.load_study(study_name="experiment_5", storage=f"sqlite:///{folder}/studies.sqlite")
    study.enqueue_trial({"seed": 5, "arm": "muon"})
    killed = study.ask()
    experiment("--seeds", 0, 1, 5)
    assert len(list(folder.glob("runs/*/*-12x*-seed5.json"))) == 3
    again = [trial for trial in study.trials if trial.params == {"seed": 5, "arm": "muon"}]
    assert [trial.state.name for trial in again if trial.number != killed.number] == ["COMPLETE"]


def test_one_seed_has_no_interval(experiment, capsys):
    with pytest.raises(SystemExit):
        experiment("--seeds", 0)
    assert "--seeds 0: an interval needs two seeds at least" in capsys.readouterr().err


def test_the_paired_interval_is_that_of_students_t(monkeypatch):
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2 degrees of freedom) = 4.3027."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from experiments.intervals import paired

    result = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert result["difference"] == 2 and result["n"] == 3
    assert result["interval"] == pytest.approx([2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)], abs=1e-4)
