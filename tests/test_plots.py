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
    mesh = plots.norm_heatmap(log).axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-0.5, 0.5, 2.5, 7, 13])
    np.testing.assert_allclose(mesh.get_array(), [[1, 1.1, 1.4, 2], [2, 2.1, 2.4, 3], [3, 3.1, 3.4, 4]])


def test_colours_of_a_heatmap_span_what_it_shows_and_its_steps_those_of_the_run(log):
    figure = plots.norm_heatmap(log)
    shown = np.concatenate([axes.collections[0].get_array().ravel() for axes in figure.axes[:2]])
    norm = figure.axes[0].collections[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((shown.min(), shown.max()))
    assert norm.vmax == pytest.approx(4.5)  # experts of 4 and 5
    assert figure.axes[0].get_xlim() == (0, 10)
    assert "mean of experts" in figure.get_suptitle()
    assert "mean of experts" not in plots.norm_heatmap(log[log["projection"] == "q_proj"]).get_suptitle()


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


def test_stretching_is_relative_to_the_first_step_of_each_matrix(log):
    lines = plots.spectral_stretching(log).axes[1].lines
    np.testing.assert_allclose(
        lines[1].get_ydata(), [1, (2.1 / 2 + 3.1 / 3) / 2, (2.4 / 2 + 3.4 / 3) / 2, (3 / 2 + 4 / 3) / 2]
    )


def test_the_spectrum_map_has_a_column_per_step_and_the_largest_on_top(log):
    axes = plots.singular_spectrum_mri(log).axes[0]
    image = axes.collections[0].get_array()
    assert image.shape == (8, 4)
    np.testing.assert_allclose(image[:, -1], np.log10(np.linspace(4, 0.1, 8)), rtol=1e-6)
    assert axes.yaxis_inverted()


def shifted(log, norm: float, steps=(0, 1, 4, 10)) -> pd.DataFrame:
    values = ("spectral_norm", "update_alignment", "update_energy_in_top_k", "singular_values")
    log = log[log["step"].isin(steps)]
    return log.assign(**{name: log[name].map(lambda value: value + norm) for name in values})


def test_runs_are_side_by_side_with_shared_scales(log):
    pair = plots.combined({"muon": [log], "adamw": [shifted(log, 7)]})
    for draw in plots.FIGURES:
        left, right, *others = draw(pair).axes
        assert left.get_title() == "muon\nq_proj" and right.get_title() == "adamw\nq_proj", draw.__name__
        assert left.get_ylim() == right.get_ylim() and left.get_xlim() == right.get_xlim(), draw.__name__
        assert [axes.get_title() for axes in others[:2]] == ["up_proj (2 experts)"] * 2, draw.__name__
        assert all(max(line.get_ydata()) <= right.get_ylim()[1] for line in right.lines), draw.__name__
    left, right = plots.spectral_norm_evolution(pair).axes[:2]
    np.testing.assert_allclose(right.lines[0].get_ydata() - left.lines[0].get_ydata(), 7)
    meshes = [axes.collections[0] for axes in plots.norm_heatmap(pair).axes[:2]]
    assert meshes[0].norm is meshes[1].norm and meshes[0].norm.vmax == 7 + 4.5  # the mean of two experts


def test_seeds_are_a_mean_and_a_band_of_their_range(log):
    seeds = plots.combined({"muon": [log, shifted(log, 1), shifted(log, 5)]})
    for axes, experts in zip(plots.spectral_norm_evolution(seeds).axes, (0, 0.5), strict=False):
        line, band = axes.lines[0], axes.collections[0].get_paths()[0].get_extents()
        np.testing.assert_allclose(line.get_ydata(), np.array([1, 1.1, 1.4, 2]) + 2 + experts)
        np.testing.assert_allclose((band.y0, band.y1), (1 + experts, 7 + experts))
    assert len(plots.spectral_norm_vs_depth(seeds).axes[0].lines) == 4
    spectrum = plots.singular_spectrum(seeds).axes[0]
    assert len(spectrum.lines) == 4 and len(spectrum.collections) == 4


def test_seeds_logged_at_other_steps_are_interpolated(log):
    seeds = plots.combined({"muon": [log, shifted(log, 2, steps=(0, 10))]})
    line = plots.spectral_norm_evolution(seeds).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [2, 2.1, 2.4, 3])  # a mean of two everywhere: the metric is linear


def test_a_projection_that_one_run_lacks_says_so(log):
    pair = plots.combined({"moe": [log], "dense": [log[log["projection"] == "q_proj"]]})
    titles = [axes.get_title() for axes in plots.spectral_gap(pair).axes[:4]]
    assert titles == ["moe\nq_proj", "dense\nq_proj", "up_proj (2 experts)", "not in this run"]


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
    "name",
    [
        "spectral_norm_evolution",
        "norm_heatmap",
        "singular_spectrum",
        "spectral_norm_vs_depth",
        "singular_spectrum_mri",
    ],
)
@pytest.mark.parametrize(("change", "runs"), [(1e-8, 1), (3e-4, 1), (1e-8, 2)])
def test_no_text_of_a_figure_covers_another_or_is_cut_off(log, name, change, runs):
    """However little the values change, and over a hundred thousand steps."""
    metrics = ["spectral_norm", "spectral_gap", "spectral_entropy", "update_alignment", "update_energy_in_top_k"]
    barely = log.assign(step=log.step * 12_500, **{m: 0.7 + change * log.spectral_norm for m in metrics})
    wide = pd.concat([barely.assign(projection=f"{p}_proj_{p}") for p in "abcd"[: 4 // runs]])
    names = ["a_run_with_a_name_that_is_much_longer_than_its_panel", "b"][:runs]
    figure = getattr(plots, name)(plots.combined({run: [wide] for run in names}))
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
    drawn = {
        path.stem for path in plots.draw(SpectralLog(tmp_path / "run" / "spectral_log").read(), tmp_path, ["svg"])
    }
    assert drawn == {  # of one step of weights: nothing over steps, nothing of updates
        "singular_spectrum", "spectral_norm_vs_depth", "spectral_gap_vs_depth", "spectral_entropy_vs_depth",
    }  # fmt: skip
    with pytest.raises(UsageError, match="one step, 0"):
        plots.spectral_gap(weights_only)


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
    assert figures == {f"{function.__name__}.png" for function in plots.FIGURES}


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
        (["--compare", "empty", "nowhere"], "no run folder nowhere"),
        (["--plot_only", "--run", "empty"], "no spectral log in empty/spectral_log"),
        (["--plot_onl"], "--plot_only"),
    ]:
        result = track_manifold(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
