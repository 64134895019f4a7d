"""The committed results: the report says what their records say, and refuses what was tampered with."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from blueberry.errors import UsageError
from blueberry.training.run_folder import write_json

CPU = ROOT / "results" / "experiments" / "cpu"
LIMIT = 5e6  # bytes of what is committed under results/


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The records and results, to be tampered with."""
    return Path(shutil.copytree(CPU, tmp_path / "cpu", ignore=shutil.ignore_patterns("*.png")))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def results_of(folder: Path, experiment: str) -> Path:
    return folder / experiment / f"{experiment}_results.json"


def one_record(folder: Path) -> Path:
    """Of Muon, seed 1, in experiment 1."""
    return next(folder.glob("runs/dense/muon-lr*-500x16x128-seed1.json"))


def test_the_committed_report_is_what_the_committed_records_give(tmp_path):
    from experiments.claims import judged
    from report import as_json

    write_json(tmp_path / "report.json", {"claims": [as_json(claim) for claim in judged(CPU)]})
    assert (tmp_path / "report.json").read_text() == (CPU / "report.json").read_text()


def test_what_is_committed_under_results_stays_below_five_megabytes():
    listed = subprocess.run(["git", "ls-files", "-z", "results"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    assert 0 < sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name) < LIMIT


def same_seed_twice(results: dict) -> None:
    for model in results.values():
        model["runs"] = {arm: [files[0], files[0], files[1]] for arm, files in model["runs"].items()}


def one_seed(results: dict) -> None:
    for model in results.values():
        model["runs"] = {arm: files[:1] for arm, files in model["runs"].items()}


@pytest.mark.parametrize("change, error", [
    (lambda results: results.pop("dense"), "misses the model dense of its scale"),
    (lambda results: results["moe"]["runs"].pop("adamw"), "its arms are adamw, muon; check 'adamw'"),
    (lambda results: results["moe"].pop("tuning"), "misses the losses of its tuning"),
    (same_seed_twice, r"has the seeds \[0, 0, 1\], one of them twice"),
    (one_seed, "has 1 seed: an interval needs two"),
])  # fmt: skip
def test_results_that_lack_a_part_are_refused(copied, change, error):
    from experiments.stored import read_baseline

    edit(results_of(copied, "experiment_1"), change)
    with pytest.raises(UsageError, match=error):
        read_baseline(copied)


@pytest.mark.parametrize("change, error", [
    (lambda record: record["run"].update(optimizer="adamw"), "muon is of optimizer muon, seed 1 has adamw"),
    (lambda record: record["run"].update(lr=0.08), "muon is of lr 0.02, seed 1 has 0.08"),
    (lambda record: record["run"].update(settings={"momentum": 0.0}), "muon is of settings {}, seed 1 has"),
    (lambda record: record["run"].update(seed=1000), "muon has the seeds"),
    (lambda record: record["versions"].update(torch="1.0"), "muon has torch 1.0, adamw has"),
    (lambda record: record["versions"].update(device="H100"), "muon has device H100, adamw has"),
])  # fmt: skip
def test_a_record_that_is_not_of_its_arm_or_its_machine_is_refused(copied, change, error):
    from experiments.stored import read_baseline

    edit(one_record(copied), change)
    with pytest.raises(UsageError, match=error):
        read_baseline(copied)


def test_records_of_two_texts_are_refused_where_the_text_is_known(copied):
    from experiments.stored import read_baseline

    edit(one_record(copied), lambda record: record.update(data="a"))
    read_baseline(copied)  # of the others it is not known
    edit(one_record(copied).with_name(one_record(copied).name.replace("seed1", "seed2")), lambda r: r.update(data="b"))
    with pytest.raises(UsageError, match="muon has training text b, muon has a"):
        read_baseline(copied)


def test_times_of_runs_with_other_numbers_of_threads_are_not_compared(copied):
    from experiments.stored import read_baseline

    edit(one_record(copied), lambda record: record["versions"].update(threads=64))
    with pytest.raises(UsageError, match="muon has threads 64, adamw has 1"):
        read_baseline(copied)["dense"].check_threads()


def test_damaged_files_are_named_in_one_line(copied):
    from experiments.stored import read_baseline, read_results

    for path in (one_record(copied), results_of(copied, "experiment_1")):
        path.write_text(path.read_text()[:500])
        with pytest.raises(UsageError, match=f"{path.name} is damaged"):
            read_baseline(copied)
    with pytest.raises(UsageError, match="is damaged"):
        read_results(copied, "experiment_1")


def test_a_missing_spectral_log_is_refused(copied):
    """Without the whole log of every seed, claims 2 to 7 used to drop a model and flip their verdicts."""
    from experiments.claims import judged

    shutil.rmtree(copied / "runs" / "moe" / "adamw-lr0.004-500x16x128-seed1")
    with pytest.raises(UsageError, match=r"experiment_1 misses the spectral log .*adamw-lr0\.004"):
        judged(copied)


def test_a_spectral_log_that_ends_before_its_run_is_refused(copied):
    from experiments.stored import read_baseline

    from blueberry.spectral.log import SpectralLog

    SpectralLog(one_record(copied).with_suffix("") / "spectral_log").truncate(after_step=434)
    with pytest.raises(UsageError, match="ends before its run"):
        _ = read_baseline(copied)["dense"].logs


def test_the_claim_on_cost_needs_the_models_of_the_comparison(copied):
    from experiments.claims import _overhead

    def without_moe(results: dict) -> None:
        results["rows"] = [row for row in results["rows"] if row["model"] != "moe"]

    edit(results_of(copied, "experiment_4"), without_moe)
    with pytest.raises(UsageError, match="experiment_4 misses Muon's times on moe"):
        list(_overhead(copied))


@pytest.mark.parametrize("arm", ["neither", "full"])
def test_the_ablation_needs_all_of_its_arms(copied, arm):
    from experiments.claims import _ablation

    edit(results_of(copied, "experiment_2"), lambda results: results["runs"].pop(arm))
    with pytest.raises(UsageError, match=f"check '{arm}'"):
        list(_ablation(copied))


def test_claims_on_the_ablation_follow_its_records(copied):
    """They used to follow what the experiment had computed from them."""
    from experiments.claims import _ablation

    before = {finding.claim: finding.value for finding in _ablation(copied)}
    edit(next(copied.glob("runs/moe/muon-momentum=0.0-lr0.16-500x16x128-seed0.json")),
         lambda record: record.update(eval_loss=record["eval_loss"] + 3))  # fmt: skip
    after = {finding.claim: finding.value for finding in _ablation(copied)}
    assert after["8_momentum_matters"] == pytest.approx(before["8_momentum_matters"] + 1)
    assert after["8_synergy"] == pytest.approx(before["8_synergy"] - 1)


def test_the_claim_on_sensitivity_needs_every_record(copied):
    """It used to read none."""
    from experiments.claims import _sensitivity

    def lose(results: dict) -> None:
        results["runs"]["adamw"] = results["runs"]["adamw"][:-1]

    next(copied.glob("runs/moe/adamw-*-166x16x128-seed0.json")).unlink()
    with pytest.raises(UsageError, match="experiment_3 misses 1 records"):
        list(_sensitivity(copied))
    shutil.copytree(CPU / "runs", copied / "runs", dirs_exist_ok=True)
    edit(results_of(copied, "experiment_3"), lose)
    with pytest.raises(UsageError, match="not every learning rate of adamw has each seed"):
        list(_sensitivity(copied))
