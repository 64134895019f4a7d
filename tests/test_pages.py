"""What a person sees: report.html and TensorBoard in a headless Chromium. Skipped where there is none."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_callbacks import mixture, trainer

from blueberry.spectral import SpectralLog
from blueberry.spectral.plots import combined
from blueberry.spectral.report import write_report
from trainer_callbacks import SpectralMetricsCallback, TensorBoardCallback

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser) -> Iterator["playwright.Page"]:
    """A page that collects errors and requests."""
    page = browser.new_page(viewport={"width": 1400, "height": 1200})
    page.errors, page.requested = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.requested.append(request.url))
    yield page
    page.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path, board = tmp_path_factory.mktemp("run"), TensorBoardCallback()
    callback = SpectralMetricsCallback(every_n_steps=4, tensorboard=board)
    trainer(path, board, callback, model=mixture(), max_steps=8).train()
    board.close()
    return path


def test_the_report_works_from_a_file_without_network(run, page, tmp_path):
    pytest.importorskip("plotly")
    log = SpectralLog(run / "spectral_log").read()
    path = write_report(combined({"one": [log], "two": [log]}), "two runs", tmp_path / "report.html")
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=true]")
    assert page.inner_text("h1") == "two runs"
    assert page.locator(".plot .main-svg").count() >= 5  # two maps, two line charts, the spectra
    assert page.inner_text("#step-label") == "8"
    page.locator("#step").fill("1")
    assert page.inner_text("#step-label") == "4" and "step 4" in page.text_content("#map-0 .gtitle")
    page.select_option("#metric", "stable_rank")
    assert page.inner_text("#map-title") == "stable rank of every layer"
    assert page.requested == [path.as_uri()] and not page.errors


def test_a_click_on_a_layer_shows_its_spectrum(run, page, tmp_path):
    pytest.importorskip("plotly")
    log = SpectralLog(run / "spectral_log").read()
    page.goto(write_report(log, "run", tmp_path / "report.html").as_uri())
    page.wait_for_selector("body[data-ready=true]")
    assert page.inner_text("#spectrum-title") == "Singular values of self_attn.q_proj, layer 1"
    box = page.locator("#map-0 .nsewdrag").first.bounding_box()
    places = 8  # q, k, v, o, gate and up of the experts, down, router
    page.mouse.click(box["x"] + box["width"] * 6.5 / places, box["y"] + box["height"] * 0.25)
    page.wait_for_function("document.getElementById('spectrum-title').textContent.includes('down_proj, layer 0')")
    expected = log[(log["projection"] == "down_proj") & (log["layer"] == 0) & (log["step"] == 8)]["spectral_norm"]
    top = page.evaluate("document.getElementById('spectrum').data[0].y[0]")
    assert top == pytest.approx(expected.mean(), rel=1e-5)
    assert not page.errors


@pytest.fixture
def tensorboard(run) -> Iterator[str]:
    """The address of a TensorBoard of the run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run / "runs"), "--port", "0"]
    with subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, text=True) as process:
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+/", line)))
        yield address
        process.terminate()


def test_tensorboard_shows_charts_by_metric_and_projection_and_heatmaps(tensorboard, page):
    page.goto(f"{tensorboard}#custom_scalars")
    page.wait_for_selector("text=spectral_norm", timeout=60_000)
    page.wait_for_selector("text=/^self_attn.q_proj$/")
    page.wait_for_selector("text=Matches (2)")  # two layers, one line each
    page.goto(f"{tensorboard}#images")
    page.reload()
    page.wait_for_selector("text=heatmap/spectral_norm", timeout=60_000)
