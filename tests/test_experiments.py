"""Every experiment at its smoke scale: what it leaves on disk, that nothing is made twice, what the report says."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT

from blueberry.spectral.log import SpectralLog

SCRIPTS = {
    "experiment_1": "experiment_1_baseline_comparison.py",
    "experiment_2": "experiment_2_ablation_muon.py",
    "experiment_3": "experiment_3_hyperparameter_sensitivity.py",
    "experiment_4": "experiment_4_profiling_overhead.py",
    "experiment_5": "experiment_5_manifold_muon.py",
    "experiment_6": "experiment_6_variants.py",
}
SMALL_GRID = ("--rates", 0.01, 0.05, "--momenta", 0.9, "--ns_steps", 3, 5, "--adamw_rates", 0.004, 0.016)


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture(scope="module")
def run(run_script, small_corpus):
    """`run("experiment_1", folder)` runs an experiment on eight small documents with two seeds and short tuning."""

    def run(experiment: str, folder: Path, *arguments: object) -> None:
        from experiments import drawings, runs, sweeps

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweeps, "FURTHEST", 0)
            patch.setattr(runs, "VALIDATION_BATCHES", 1)
            patch.setattr(drawings, "SPECTRAL", drawings.SPECTRAL[:1])  # all have tests of their own
            run_script(SCRIPTS[experiment], "--scale", "smoke", "--dataset", small_corpus, "--output_dir", folder,
                       "--seeds", 0, 1, *arguments)  # fmt: skip

    return run


@pytest.fixture(scope="module")
def results(run, run_script, tmp_path_factory) -> Path:
    """The results of all experiments, and the report."""
    folder = tmp_path_factory.mktemp("results")
    for experiment in SCRIPTS:
        run(experiment, folder, *(SMALL_GRID if experiment == "experiment_3" else ()))
    with pytest.MonkeyPatch.context() as patch:
        from experiments import drawings

        patch.setattr(drawings, "SPECTRAL", drawings.SPECTRAL[:1])
        run_script("report.py", "--results", folder)
    return folder


def read(folder: Path, experiment: str) -> dict:
    return json.loads((folder / experiment / f"{experiment}_results.json").read_text())


def test_a_record_holds_what_a_figure_must_be_quoted_with(results):
    path = results / "runs" / read(results, "experiment_1")["moe"]["runs"]["muon"][0]
    record = json.loads(path.read_text())
    assert record["run"]["seed"] == 0 and record["run"]["optimizer"] == "muon" and record["run"]["steps"] == 12
    assert len(record["losses"]) == len(record["gradient_norms"]) == 12
    assert record["eval_losses"][-1] == record["eval_loss"] and record["eval_steps"][-1] == 12
    assert record["eval_perplexity"] == pytest.approx(math.exp(record["eval_loss"]), rel=1e-4)
    assert {"commit", "torch", "threads", "transformers"} <= set(record["versions"])
    assert record["time"]["optimizer_step_ms"] > 0 and record["peak_memory_mib"] > 0
    log = SpectralLog(path.with_suffix("") / "spectral_log").read()
    assert log.step.min() == 0 and log.step.max() == 12 and log.update_spectral_norm.notna().any()


def test_the_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_data(results):
    """The first logged loss comes before the first update: equal for every optimizer, different between seeds."""
    for experiment in ("experiment_2", "experiment_6"):
        runs = read(results, experiment)["runs"]
        for seed in (0, 1):
            first = {json.loads((results / "runs" / some[seed]).read_text())["losses"][0]
                     for arm, some in runs.items() if arm != "manifold Muon"}  # fmt: skip
            assert len(first) == 1  # the manifold puts the weights on it before the first step


def test_one_seed_gives_one_result_to_the_last_bit(run, results, tmp_path):
    run("experiment_5", tmp_path)
    for again in tmp_path.glob("runs/*/*-seed1.json"):
        records = [json.loads(path.read_text()) for path in (again, results / again.relative_to(tmp_path))]
        assert records[0]["losses"] == records[1]["losses"] and records[0]["eval_loss"] == records[1]["eval_loss"]


def test_an_interrupted_experiment_goes_on_and_repeats_nothing(run, results):
    runs = read(results, "experiment_5")["runs"]
    (results / "runs" / runs["muon"][1]).unlink()  # as if the experiment had been cut off in this run
    before = {path: path.stat().st_mtime_ns for path in results.glob("runs/*/*.json")}
    run("experiment_5", results)
    assert (results / "runs" / runs["muon"][1]).is_file()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_experiments_share_the_runs_that_they_have_in_common(results):
    full = read(results, "experiment_2")["runs"]["full"]
    assert (
        full == read(results, "experiment_1")["moe"]["runs"]["muon"] == read(results, "experiment_6")["runs"]["muon"]
    )


def test_the_learning_rate_of_every_arm_is_the_best_that_was_tried(results):
    for result in read(results, "experiment_1").values():
        for arm, tried in result["tuning"].items():
            assert result["learning_rates"][arm] == float(min(tried, key=tried.get)) and len(tried) == 3


def test_the_manifold_experiment_judges_the_criteria_of_its_document(results):
    rows = {row["criterion"]: row for row in read(results, "experiment_5")["table"]}
    assert {rows[name]["verdict"] for name in ("constraint violations", "singular values")} == {"holds"}
    assert 0.9999 < rows["singular values"]["manifold"][0] <= rows["singular values"]["manifold"][1] < 1.0001
    losses = {arm: [json.loads((results / "runs" / name).read_text())["eval_loss"] for name in some]
              for arm, some in read(results, "experiment_5")["runs"].items()}  # fmt: skip
    mean = sum(a - b for a, b in zip(losses["manifold"], losses["adamw"], strict=True)) / 2
    assert rows["final validation loss"]["minus adamw"]["difference"] == pytest.approx(mean)
    assert "| final validation loss |" in (results / "experiment_5" / "table.md").read_text()


def test_profiles_add_up_and_leave_a_trace(results):
    rows = read(results, "experiment_4")["rows"]
    assert {row["model"] for row in rows} == {"moe", "dense"} and len(rows) == 10
    for row in rows:
        assert row["newton_schulz_ms"] <= row["optimizer_ms"] <= row["step_ms"]
        assert (row["newton_schulz_ms"] > 0) == row["arm"].startswith("muon")
        assert (results / "experiment_4" / "traces" / row["trace"]).stat().st_size > 1000
        assert row["kernels"][0]["self_ms"] >= row["kernels"][-1]["self_ms"] > 0


def test_a_profile_shows_what_muon_does_on_several_threads(monkeypatch, tmp_path):
    """Products of its workers would be missing from kernels and trace: torch profiles the calling thread alone."""
    import experiment_4_profiling_overhead as experiment_4
    import torch

    from blueberry.optim import Muon
    from blueberry.threads_blueberry import blas_threads

    weights = [torch.nn.Parameter(torch.randn(8, 9 + number)) for number in range(3)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    monkeypatch.setattr(experiment_4, "_timed_step", lambda plan, muon, tokens: muon.step())
    with blas_threads(2):
        experiment_4._profiled_step(None, Muon(weights), None, tmp_path / "trace.json")
    assert (tmp_path / "trace.json").read_text().count('"aten::baddbmm"') == 4 * len(weights)


def test_the_report_gives_every_claim_a_verdict_by_its_rule(results):
    claims = {claim["id"]: claim for claim in json.loads((results / "report.json").read_text())["claims"]}
    assert {number.split("_")[0] for number in claims} == {str(number) for number in range(1, 13)}
    for claim in claims.values():
        assert claim["n"] >= 2 and claim["commit"] and claim["findings"]
        for finding in claim["findings"]:
            (low, high), (least, most) = finding["interval"], finding["needed"]
            least, most = -math.inf if least is None else least, math.inf if most is None else most
            inside, outside = least <= low and high <= most, high < least or low > most or finding["everywhere"]
            expected = "holds" if inside else "does_not_hold" if outside else "not_decided"
            assert finding["verdict"] == expected
        decides = next(finding for finding in claim["findings"] if finding["verdict"] == claim["verdict"])
        assert (claim["interval"], claim["model"]) == (decides["interval"], decides["model"])
    assert claims["11_constraint_holds"]["verdict"] == "holds"
    page = (results / "report.html").read_text()
    figures = re.findall(r'src="([^"]+)"', page)
    assert figures and all((results / figure).is_file() for figure in figures)
    assert all(claim["text"].split(" (")[0].replace("'", "") in page.replace("'", "") for claim in claims.values())


def test_the_spectral_log_is_dense_where_spectra_change_fastest(results):
    """AdamW's entropy once fell "at or before step 62", the first log there was."""
    from experiments.runs import Run

    run = Run("moe", {}, "sotu", steps=500, batch=16, length=128, optimizer="adamw", lr=0.01, spectral_logs=8)
    assert run.logged_steps() == [1, 2, 4, 8, 16, 32, *range(62, 501, 62)]
    assert run.with_(steps=6).logged_steps() == [1, 2, 3, 4, 5, 6]
    name = read(results, "experiment_1")["moe"]["runs"]["adamw"][0]
    record = json.loads((results / "runs" / name).read_text())
    log = pd.read_parquet((results / "runs" / name).with_suffix("") / "spectral_log")
    assert sorted(log.step.unique()) == [0, *Run(**record["run"]).logged_steps()]


def test_norms_are_set_against_losses_of_steps_between_two_spectral_logs(run_script):
    """Evaluations and spectral logs fall on different steps: the report once said "correlation nan"."""
    from experiments.stretching import _correlation

    log = pd.DataFrame({"step": [0, 4, 8], "projection": "q_proj", "layer": 0, "parameter": "q", "expert": None,
                        "spectral_norm": [1.0, 2.0, 3.0]})  # fmt: skip
    assert _correlation(log, {"eval_steps": [3, 5, 8], "eval_losses": [6.0, 5.0, 4.0]}) == pytest.approx(-1)


def test_a_map_keeps_all_of_its_colours_and_says_what_it_clips(tmp_path):
    import numpy as np
    from experiments import figures
    from PIL import Image

    losses = np.linspace(5, 6, 600).reshape(20, 30)
    figure = figures.loss_heatmaps({"a": losses}, range(20), range(30), ("row", "column"))
    assert figure.axes[-1].get_ylabel() == "validation loss, nats (arrow: above 5.90)"
    saved = Image.open(figures.save(figure, tmp_path / "map.png", is_map=True))
    assert len(saved.convert("RGB").getcolors(10**6)) > 256


def test_figures_drawn_again_from_the_records_are_identical(results):
    from experiments.drawings import draw

    before = {path: path.read_bytes() for path in results.glob("experiment_2/*.png")}
    assert len(before) == 2
    draw("experiment_2", results)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("how", ["a record is missing", "an arm lacks a seed", "a run has another config"])
def test_the_report_refuses_results_that_do_not_belong_together(results, run_script, tmp_path, capsys, how):
    (tmp_path / "experiment_6").mkdir()
    runs = read(results, "experiment_2")["runs"]
    for name in [name for some in runs.values() for name in some]:
        copy = tmp_path / "runs" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((results / "runs" / name).read_text())
    result = read(results, "experiment_2")
    victim = tmp_path / "runs" / runs["neither"][0 if how == "a run has another config" else 1]
    if how == "a record is missing":
        victim.unlink()
    elif how == "an arm lacks a seed":
        result["runs"]["neither"].pop()
    else:
        record = json.loads(victim.read_text())
        record["run"]["steps"] += 1
        victim.write_text(json.dumps(record))
    (tmp_path / "experiment_2").mkdir()
    (tmp_path / "experiment_2" / "experiment_2_results.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit) as stopped:
        run_script("report.py", "--results", tmp_path)
    error = capsys.readouterr().err
    expected = {
        "a record is missing": f"misses 1 records, {runs['neither'][1]} first",
        "an arm lacks a seed": "neither has the seeds [0], full has [0, 1]",
        "a run has another config": "neither has steps 13, full has 12",
    }[how]
    assert stopped.value.code == 2 and expected in error and error.count("\n") == 1
    assert not (tmp_path / "report.md").exists()


def test_a_study_of_other_arms_is_refused(run, results, capsys):
    with pytest.raises(SystemExit):
        run("experiment_5", results, "--batch", 8)
    assert "was made with another config: use another --output_dir" in capsys.readouterr().err


def test_a_trial_of_a_killed_worker_is_tried_again(run, results, monkeypatch):
    """It stays RUNNING in the database, without heartbeats."""
    import optuna
    from experiments import sweeps

    monkeypatch.setattr(sweeps, "HEARTBEAT", 1)
    study = optuna.load_study(study_name="experiment_5", storage=f"sqlite:///{results}/studies.sqlite")
    study.enqueue_trial({"seed": 5, "arm": "muon"})
    killed = study.ask()
    run("experiment_5", results, "--seeds", 0, 5)
    again = [trial for trial in study.trials if trial.params == {"seed": 5, "arm": "muon"}]
    assert [trial.state.name for trial in again if trial.number != killed.number] == ["COMPLETE"]
    run("experiment_5", results)  # as it was, for the other tests


@pytest.mark.parametrize("arguments, error", [
    (("--seeds", 0), "--seeds 0: an interval needs two seeds at least"),
    (("--workers", 0), "--workers 0: at least 1"),
    (("--steps", -3), "--steps -3: at least 1"),
    (("--seeds", 0, 1, 1), "--seeds 0 1 1: a seed counts once"),
    (("--seeds", 0, 1000), "--seeds 0 1000: learning rates are chosen on 1000"),
    (("--seeds", 0, -1), "--seeds 0 -1: a seed lies between 0 and"),
    (("--storage", "nonsense"), "--storage nonsense: Could not parse"),
    (("--storage", "postgresql://me:secret@here/x"), "--storage postgresql://...@here/x: "),
    (("--storage", "sqlite:////nowhere/x.sqlite"), "unable to open database file; give a database's URL"),
    (("--output_dir", __file__), "test_experiments.py is a file: name a folder"),
    (("--output_dir", __file__ + "/x"), "test_experiments.py/x: Not a directory; name another folder"),
])  # fmt: skip
def test_bad_arguments_are_one_line(run, tmp_path, capsys, arguments, error):
    with pytest.raises(SystemExit) as stopped:
        run("experiment_1", tmp_path, *arguments)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and error in told and told.count("\n") == 1 and "secret" not in told


def test_a_study_whose_records_lie_elsewhere_is_refused_before_anything_is_made_again(run, results, tmp_path, capsys):
    shared = f"sqlite:///{results / 'studies.sqlite'}"
    with pytest.raises(SystemExit):
        run("experiment_5", tmp_path, "--storage", shared)
    assert "has its records in another folder: share that one" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*.json"))


def test_a_dataset_that_changed_under_its_name_is_refused(run, results, monkeypatch, capsys):
    from experiments import runs

    changed = lambda *arguments: SimpleNamespace(content="other text")
    monkeypatch.setattr(runs, "_data", changed)
    with pytest.raises(SystemExit):
        run("experiment_2", results)
    assert "its text is not that of" in capsys.readouterr().err


def test_two_workers_share_the_trials_of_a_search_and_pruned_ones_are_told(
    run_script, small_corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers
    arguments = ("--scale", "smoke", "--dataset", small_corpus, "--output_dir", tmp_path, "--sampler", "grid",
                 "--trials", 6, "--low", 0.0001, "--high", 0.1)  # fmt: skip
    run_script("learning_rate_search.py", *arguments, "--workers", 2)
    found = json.loads((tmp_path / "learning_rate_search" / "learning_rate_search-muon-grid.json").read_text())
    rates = sorted(trial["lr"] for trial in found["trials"])
    assert rates == pytest.approx([0.0001 * 1000 ** (i / 5) for i in range(6)])
    finished = [trial for trial in found["trials"] if trial["state"] == "COMPLETE"]
    assert found["best"]["loss"] == min(trial["loss"] for trial in finished)
    capsys.readouterr()
    run_script("learning_rate_search.py", *arguments)
    assert "validation loss" in (out := capsys.readouterr().out) and " s\n" not in out  # nothing was trained again


def test_a_sampled_search_goes_on_until_its_number_of_trials(run_script, small_corpus, tmp_path):
    arguments = ("--scale", "smoke", "--dataset", small_corpus, "--output_dir", tmp_path)
    for trials in (2, 3):
        run_script("learning_rate_search.py", *arguments, "--trials", trials)
        name = tmp_path / "learning_rate_search" / "learning_rate_search-muon-tpe.json"
        assert len(json.loads(name.read_text())["trials"]) == trials


def test_the_intervals_are_those_of_students_t():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2 degrees of freedom) = 4.3027."""
    from experiments.intervals import paired, single

    expected = pytest.approx([2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)], abs=1e-4)
    result = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert result["difference"] == 2 and result["n"] == 3 and result["interval"] == expected
    assert single([1.0, 2.0, 3.0])["interval"] == expected
    assert single([1.0, 1.0])["interval"] == [1.0, 1.0]
    assert all(map(math.isnan, single([1.0])["interval"]))


def test_the_interval_of_a_ratio_of_variances_covers_it_in_95_of_100_draws():
    import numpy as np
    from experiments.intervals import variance_ratio

    rng = np.random.default_rng(0)
    draws = [variance_ratio(3 * rng.normal(size=4), rng.normal(size=4))["interval"] for _ in range(2000)]
    covered = np.mean([low <= 9 <= high for low, high in draws])
    assert covered == pytest.approx(0.95, abs=0.02)  # four standard errors of 2000 draws


def test_tokens_to_a_loss_are_interpolated_between_evaluations():
    from experiments.measures import tokens_to

    record = {"eval_losses": [5.0, 4.0, 3.0], "eval_steps": [10, 20, 30], "tokens": 3000, "run": {"steps": 30}}
    assert tokens_to(record, 3.5) == 2500 and tokens_to(record, 5.5) == 1000 and tokens_to(record, 3.0) == 3000
    assert tokens_to(record, 2.9) is None
    assert math.isnan(tokens_to(record, math.nan))  # the other run diverged: this one did not fail


def test_the_robust_range_ends_where_the_loss_is_one_percent_above_the_best():
    from experiments.sensitivity import robust_range

    found = robust_range({0.01: 1.02, 0.1: 1.0, 1.0: 1.04})  # 1.01 lies halfway, and a quarter of the way
    assert found["best"] == 0.1 and not found["reaches_the_end"]
    assert found["low"] == pytest.approx(0.1 * 0.1**0.5) and found["high"] == pytest.approx(0.1 * 10**0.25)
    assert robust_range({0.01: 1.0, 0.1: 1.5, 1.0: math.inf})["reaches_the_end"]


def test_spectral_measures_follow_their_definitions():
    """Two layers of one matrix each; the second doubles its norm while the updates' norms sum to 4."""
    import pandas as pd
    from experiments import spectra

    rows = [
        {"step": step, "layer": layer, "projection": "q_proj", "parameter": f"w{layer}", "expert": None, "rows": 4,
         "columns": 4, "spectral_norm": 1.0 + layer * step / 4, "spectral_gap": 1.0 + layer * step / 8,
         "spectral_entropy": 0.9 - 0.01 * step * layer, "nuclear_norm": 4.0, "frobenius_norm": 2.0,
         "update_spectral_norm": math.nan if step == 0 else 1.0, "update_energy_in_top_k": 0.1 * (1 + layer)}
        for step in range(5) for layer in range(2)
    ]  # fmt: skip
    log = pd.DataFrame(rows)
    assert spectra.norm_growth(log, spectra.is_deep) == 1.0 and spectra.norm_growth(log, spectra.is_shallow) == 0.0
    assert spectra.gap_change(log) == 0.5 and spectra.flatness(log) == 1.0  # four equal singular values
    assert spectra.change(log, "spectral_entropy") == pytest.approx(-0.02)
    assert spectra.of_updates(log, "update_energy_in_top_k") == pytest.approx(0.15)
    assert spectra.collapse_step(log, drop=0.015) == {"0": None, "1": 2}
    share, _ = spectra.growth_over_bound(log)
    assert share == pytest.approx((0 + 1 / 4) / 2)


def test_growth_by_exactly_the_sum_of_the_updates_is_all_of_it_in_either_half():
    """Logs at steps 0, 10, .., 50, an update of norm 0.1 at every step, and the norm grows by as much."""
    from experiments import spectra

    log = pd.DataFrame([
        {"step": step, "layer": 0, "projection": "q_proj", "parameter": "w", "expert": None,
         "spectral_norm": 1 + 0.1 * step, "update_spectral_norm": 0.1 if step else math.nan}
        for step in range(0, 60, 10)
    ])  # fmt: skip
    assert spectra.growth_over_bound(log) == pytest.approx((1, 0))
    assert log.update_spectral_norm.isna().sum() == 1  # the log is as it was


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 7, 8, 12, 22])
def test_deep_and_shallow_layers_are_equally_many_at_every_depth(layers):
    from experiments import spectra

    names = [f"w{layer}" for layer in range(layers)]
    log = pd.DataFrame({"layer": range(layers), "projection": "q_proj", "parameter": names, "expert": None})
    rows = spectra.hidden(log)
    deep, shallow = rows.layer[spectra.is_deep(rows)], rows.layer[spectra.is_shallow(rows)]
    assert len(deep) == len(shallow) == max(1, layers // 3)
    assert deep.max() == layers - 1 and shallow.min() == 0


def test_a_collapse_at_the_first_log_is_told_as_at_or_before_it():
    from experiments.stretching import _steps

    assert _steps([62, 124, None], [62, 62, 62]) == "at or before 62, 124, never"


def test_a_bound_that_one_run_breaks_does_not_hold_and_nan_breaks_it():
    from experiments.claims import _extreme
    from experiments.stored import Comparison

    comparison = Comparison("experiment_5", {"manifold": [{"versions": {"commit": "a"}}]}, Path(), [])

    def verdict(*values: float) -> str:
        return _extreme("11_constraint_holds", "m", "error", values, (0.0, 1e-4), comparison).verdict

    assert verdict(1e-6, 2e-6) == "holds"
    assert verdict(1e-6, 7.8) == verdict(1e-6, math.nan) == verdict(math.nan, 1e-6) == "does_not_hold"


def test_a_constraint_error_of_nan_stays_in_the_record(monkeypatch):
    import torch
    from experiments import runs

    errors = iter([1e-6, math.nan, 1e-6])
    report = lambda: {"total_violations": 0, "by_type": {"stiefel_muon": {"max_violation": next(errors)}}}
    monkeypatch.setattr(runs, "composed_optimizer", lambda _: SimpleNamespace(check_constraints=report))
    health = runs.Health()
    for _ in range(3):
        health.on_step_end(None, SimpleNamespace(global_step=10, max_steps=10), None, None)
    assert math.isnan(health.numbers["max_violation"]["stiefel_muon"])
    assert runs.singular_values(torch.full((2, 2), math.nan)).isnan().all()


def test_a_learning_rate_at_the_end_of_those_tried_is_told():
    from experiments.measures import edge_note

    tuning = {"adamw": {"0.05": 2, "0.1": 1, "0.2": 3}, "muon": {"0.05": 3, "0.1": 2, "0.2": 1}}
    results = {"learning_rates": {"adamw": 0.1, "muon": 0.2}, "tuning": tuning}
    assert "rate of muon was the last one tried" in edge_note(results)
    results["learning_rates"]["muon"] = 0.1
    assert edge_note(results) == ""


def test_a_number_that_json_lacks_is_null_in_a_file_and_nan_in_a_record(tmp_path):
    from experiments.runs import read_record

    from blueberry.training.run_folder import write_json

    path = tmp_path / "record.json"
    write_json(path, {"run": {"bf16": None}, "eval_loss": math.nan, "losses": [1.0, math.inf]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["losses"] == [1.0, None]
    record = read_record(path)
    assert math.isnan(record["eval_loss"]) and math.isnan(record["losses"][1]) and record["run"] == {"bf16": None}
