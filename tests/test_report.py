"""report.html holds the numbers of the log, on one page that stays small whatever the run."""

import base64
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_plots import synthetic_rows

from blueberry.errors import UsageError
from blueberry.spectral.log import SCHEMA, SpectralLog
from blueberry.spectral.plots import combined
from blueberry.spectral.report import payload, write_report

LIMIT = 10e6  # bytes


@pytest.fixture
def log(tmp_path) -> pd.DataFrame:
    SpectralLog(tmp_path / "log").append(synthetic_rows())
    return SpectralLog(tmp_path / "log").read()


def spectra(run: dict, place: str, layer: int) -> np.ndarray:
    """(steps, points)."""
    cell = run["layers"][place][layer]
    raw = base64.b64decode(cell["spectra"])
    return np.frombuffer(raw, "<f4").reshape(len(run["steps"]), len(cell["places"]))


def test_the_page_holds_metrics_and_spectra_of_every_layer_with_experts_averaged(log):
    data = payload(log)
    assert data["projections"] == ["self_attn.q_proj", "mlp.up_proj"] and data["steps"] == [0, 1, 4, 10]
    (run,) = data["runs"]
    assert run["layers"]["mlp.up_proj"][2]["values"]["spectral_norm"] == [3.5, 3.6, 3.9, 4.5]
    assert run["layers"]["self_attn.q_proj"][0]["values"]["update_alignment"] == [None, 0.3, 0.3, 0.3]
    np.testing.assert_allclose(spectra(run, "self_attn.q_proj", 1)[2], np.linspace(2.4, 0.1, 8), rtol=1e-6)
    np.testing.assert_allclose(spectra(run, "mlp.up_proj", 0)[0], np.linspace(1.5, 0.1, 8), rtol=1e-6)


def test_runs_keep_their_own_steps_and_the_slider_has_all(log):
    data = payload(combined({"a": [log], "b": [log[log["step"] != 4]]}))
    assert data["steps"] == [0, 1, 4, 10] and [run["steps"] for run in data["runs"]] == [[0, 1, 4, 10], [0, 1, 10]]


def test_layers_may_differ_in_width_and_matrices_lack_a_module(log):
    log.loc[log["layer"] == 0, ["module", "projection"]] = None
    log["singular_values"] = [x[: 4 + layer] for x, layer in zip(log["singular_values"], log["layer"], strict=True)]
    (run,) = payload(log)["runs"]
    assert spectra(run, "layers.0.q_proj", 0).shape == (4, 4) and spectra(run, "self_attn.q_proj", 2).shape == (4, 6)


def test_seeds_are_averaged(log):
    other = log.assign(spectral_norm=log["spectral_norm"] + 2)
    (run,) = payload(combined({"a": [log, other]}))["runs"]
    assert run["layers"]["self_attn.q_proj"][0]["values"]["spectral_norm"] == [2, 2.1, 2.4, 3]


def test_a_metric_that_is_null_everywhere_is_not_offered_and_nan_is_null(log):
    log.loc[0, "spectral_norm"] = np.nan
    data = payload(log)
    assert "stable_rank" not in data["metrics"] and "spectral_norm" in data["metrics"]
    assert data["runs"][0]["layers"]["self_attn.q_proj"][0]["values"]["spectral_norm"][0] is None


def test_the_page_of_a_long_run_of_a_large_model_stays_below_ten_megabytes(tmp_path):
    """300 logs of 80 layers of 7 projections with 512 singular values each, all metrics."""
    pytest.importorskip("plotly")
    spectrum = np.random.default_rng(0).random(512).astype(np.float32)
    names = [field.name for field in SCHEMA if str(field.type) == "double"]
    index = pd.MultiIndex.from_product([range(300), range(80), list("abcdefg")], names=["step", "layer", "projection"])
    columns = dict.fromkeys(names, 0.123456789) | {"module": "mlp", "parameter": "w", "expert": None}
    log = index.to_frame(index=False).assign(**columns)
    log["singular_values"] = [spectrum] * len(log)
    path = write_report(log, "large", tmp_path / "report.html")
    assert path.stat().st_size < LIMIT


def test_a_name_cannot_break_out_of_the_page(log, tmp_path):
    pytest.importorskip("plotly")
    name = "</script><script>alert(1)</script>{{plotly}}"
    page = write_report(combined({name: [log]}), name, tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["runs"][0]["name"] == name


def test_without_plotly_the_error_says_what_to_install(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match="pip install plotly"):
        write_report(log, "x", tmp_path / "report.html")


def test_the_command_writes_the_report_of_a_comparison(tmp_path):
    pytest.importorskip("plotly")
    for name in "ab":
        SpectralLog(tmp_path / name / "spectral_log").append(synthetic_rows())
    command = [sys.executable, ROOT / "scripts" / "track_manifold.py", "--compare", "a", "b", "--report"]
    done = subprocess.run([*command, "--formats", "svg"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "figures of a and b in results/research_plots/a_vs_b" in done.stdout
    assert (tmp_path / "results" / "research_plots" / "a_vs_b" / "report.html").is_file()
