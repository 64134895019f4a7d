"""Figures show the numbers of the log; the command line draws them from the log alone."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from blueberry.errors import UsageError
from blueberry.spectral import plots
from blueberry.spectral.log import SpectralLog

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "track_manifold.py"


def synthetic_rows() -> list[dict]:
    """Three layers, two projections of which one has experts; spectral norm 1 + layer + step / 10 (+ expert)."""
    rows = []
    for step in (0, 1, 4, 10):
        for layer in range(3):
            for projection, expert in (("q_proj", None), ("up_proj", 0), ("up_proj", 1)):
                norm = 1 + layer + step / 10 + (expert or 0)
                spectrum = np.linspace(norm, 0.1, 8)
                row = {
                    "step": step, "layer": layer, "module": "mlp" if expert is not None else "self_attn",
                    "projection": projection, "expert": expert, "rows": 16, "columns": 8, "spectral_norm": norm,
                    "parameter": f"layers.{layer}.{projection}", "spectral_gap": 1.1, "spectral_entropy": 0.9,
                    "singular_values": list(spectrum),
                }  # fmt: skip
                if step:
                    row |= {"update_alignment": 0.3, "update_energy_in_top_k": 0.2, "update_energy_chance": 5 / 16}
                rows.append(row)
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("results") / "demo"
    SpectralLog(run / "spectral_log").append(synthetic_rows())
    return run


@pytest.fixture(scope="module")
def log(run):
    return SpectralLog(run / "spectral_log").read()


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_evolution_has_a_panel_per_projection_and_a_line_per_layer_with_expert_means(log):
    figure = plots.spectral_norm_evolution(log)
    assert titles(figure) == ["q_proj", "up_proj (2 experts)"]
    q, up = figure.axes[:2]
    assert len(q.lines) == len(up.lines) == 3
    np.testing.assert_array_equal(q.lines[2].get_xdata(), [0, 1, 4, 10])
    np.testing.assert_allclose(q.lines[2].get_ydata(), [3, 3.1, 3.4, 4])
    np.testing.assert_allclose(up.lines[0].get_ydata(), [1.5, 1.6, 1.9, 2.5])
    assert not q.collections and len(up.collections) == 3  # bands over experts


def test_heatmap_places_unevenly_spaced_steps_to_scale(log):
    mesh = plots.layer_heatmap(log).axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-0.5, 0.5, 2.5, 7, 13])
    np.testing.assert_allclose(mesh.get_array(), [[1, 1.1, 1.4, 2], [2, 2.1, 2.4, 3], [3, 3.1, 3.4, 4]])


def test_colours_of_a_heatmap_span_what_it_shows_and_its_steps_those_of_the_run(log):
    figure = plots.layer_heatmap(log)
    shown = np.concatenate([axes.collections[0].get_array().ravel() for axes in figure.axes[:2]])
    norm = figure.axes[0].collections[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((shown.min(), shown.max()))
    assert norm.vmax == pytest.approx(4.5)  # experts of 4 and 5
    assert figure.axes[0].get_xlim() == (0, 10)
    assert "mean of experts" in figure.get_suptitle()
    assert "mean of experts" not in plots.layer_heatmap(log[log["projection"] == "q_proj"]).get_suptitle()


def test_spectra_of_layers_of_different_width_are_drawn_and_averaged_at_relative_places(log):
    line = lambda start, count: list(np.linspace(start, 0, count + 1)[1:])  # start (1 - i / count)
    widths = pd.Series([4, 8, 16])
    rows = log[log["projection"] == "q_proj"].copy()
    rows["singular_values"] = [line(layer + 1, widths[layer]) for layer in rows["layer"]]
    *_, wide, dashed = plots.singular_spectrum(rows).axes[0].lines
    places = np.arange(1, 17) / 16
    np.testing.assert_allclose(wide.get_ydata(), 3 * (1 - places), atol=1e-12)
    np.testing.assert_allclose(dashed.get_ydata()[3:], 2 * (1 - places[3:]), atol=1e-12)  # from the first of each on


def test_matrices_without_a_module_are_drawn_under_the_name_of_their_parameter(log):
    nameless = log.assign(
        module=log["module"].where(log["layer"] > 0), projection=log["projection"].where(log["layer"] > 0)
    )
    figure = plots.spectral_norm_evolution(nameless)
    assert set(titles(figure)) == {"q_proj", "up_proj (2 experts)", "layers.0.q_proj", "layers.0.up_proj (2 experts)"}


def test_singular_spectrum_shows_the_last_step_and_the_first_dashed(log):
    lines = plots.singular_spectrum(log).axes[0].lines
    assert len(lines) == 4
    np.testing.assert_allclose(lines[0].get_ydata()[0], 2)
    np.testing.assert_allclose(lines[3].get_ydata()[0], 2)  # mean of 1, 2, 3 at step 0
    assert lines[3].is_dashed()


def test_depth_figure_has_a_line_per_step_over_layers(log):
    lines = plots.spectral_norm_vs_depth(log).axes[0].lines
    assert len(lines) == 4
    np.testing.assert_allclose(lines[-1].get_ydata(), [2, 3, 4])


def test_update_figures_show_their_chance_level(log):
    energy = plots.update_energy_in_top_k(log).axes[0]
    assert energy.lines[-1].get_ydata()[0] == pytest.approx(5 / 16)
    alignment = plots.update_alignment(log).axes[0]
    assert alignment.lines[-1].get_ydata()[0] == pytest.approx(plots.alignment_by_chance(16, 5))


def test_layers_are_told_apart_by_colour(log):
    colors = {line.get_color() for line in plots.spectral_gap(log).axes[0].lines}
    assert len(colors) == 3


def texts_of(figure) -> list[tuple[str, Bbox]]:
    """What a drawn figure says, and where."""
    FigureCanvasAgg(figure).draw()
    texts = set(figure.texts)
    for axes in figure.axes:
        texts.add(axes.title)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts |= {axis.get_offset_text(), axis.label, *(tick.label1 for tick in ticks)}
            texts |= {tick.label2 for tick in ticks}
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible() and text.get_text()]


@pytest.mark.parametrize(
    "name", ["spectral_norm_evolution", "norm_heatmap", "singular_spectrum", "spectral_norm_vs_depth"]
)
@pytest.mark.parametrize("change", [1e-8, 3e-4])
def test_no_text_of_a_figure_covers_another_or_is_cut_off(log, name, change):
    """However little the values change, and over a hundred thousand steps."""
    metrics = ["spectral_norm", "spectral_gap", "spectral_entropy", "update_alignment", "update_energy_in_top_k"]
    barely = log.assign(step=log.step * 12_500, **{m: 0.7 + change * log.spectral_norm for m in metrics})
    wide = pd.concat([barely.assign(projection=f"{p}_proj_{p}") for p in "abcd"])
    figure = plots.FIGURES[name](wide)
    texts = texts_of(figure)
    assert len(texts) > 20
    for text, box in texts:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, box), (other, other_box) in combinations(texts, 2):
        assert Bbox.intersection(box, other_box) is None, (one, other)


def test_a_metric_that_was_not_logged_is_an_error_for_one_figure_and_skipped_by_draw_run(log, tmp_path):
    weights_only = log[log["step"] == 0]
    with pytest.raises(UsageError, match="no values of update_alignment"):
        plots.update_alignment(weights_only)
    rows = [row for row in synthetic_rows() if row["step"] == 0]
    SpectralLog(tmp_path / "run" / "spectral_log").append(rows)
    drawn = {path.stem for path in plots.draw_run(tmp_path / "run", tmp_path / "plots", formats=["svg"])}
    assert "spectral_gap" in drawn and "update_alignment" not in drawn


def test_matrices_without_layers_are_drawn(log):
    figure = plots.spectral_norm_evolution(log[log["layer"] == 0].assign(layer=None))
    assert len(figure.axes[0].lines) == 1


def track_manifold(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env=environment)


def test_the_command_draws_the_newest_run_from_its_log_without_torch(run):
    """A torch that cannot be imported stands first on the path."""
    (run.parent.parent / "torch.py").write_text("raise ImportError('torch is not needed to draw')")
    command = f"import sys, runpy; sys.path.insert(0, {str(run.parent.parent)!r}); sys.argv[0] = 'track_manifold.py'; "
    command += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    # tmp/results?/demo: the script looks under ./results of the folder it is started in
    home = run.parent.parent / "home"
    home.mkdir()
    (home / "results").symlink_to(run.parent)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", command, "--plot_only", "--formats", "png"],
        cwd=home, capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = {path.name for path in (home / "results" / "research_plots" / "demo").iterdir()}
    assert figures == {f"{name}.png" for name in plots.FIGURES}


def test_a_file_in_the_place_of_the_figures_is_one_line(run, tmp_path):
    (tmp_path / "figures").touch()
    for target in ("figures", "figures/below"):
        result = track_manifold("--plot_only", "--run", str(run), "--output_dir", target, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: --output_dir {target}: ") and result.stderr.count("\n") == 1


def test_missing_runs_and_logs_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["--plot_only"], "no spectral log under results/"),
        (["--plot_only", "--run", "nowhere"], "no run folder nowhere"),
        (["--plot_only", "--run", "empty"], "no spectral log in empty/spectral_log"),
        (["--plot_onl"], "--plot_only"),
    ]:
        result = track_manifold(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
