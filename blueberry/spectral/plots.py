"""Figures from a spectral log, one function per figure: DataFrame in, matplotlib Figure out. Needs no torch.

Every figure has one panel per projection and run. Lines over a MoE layer's experts are their mean, with their range as
a band; over several seeds they are the mean of the seeds, with the range of the seeds as the band. Layers are coloured
by depth, steps by time (viridis and plasma: sequential, readable with any colour vision).

`combined` puts the logs of several runs and seeds into one DataFrame that all figures take.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm.auto import tqdm

from blueberry.errors import UsageError

from .chance import alignment_by_chance
from .panels import CHANCE, by_depth, colorbar, count_steps, depth_colorbar, edges, label, panels

Level = Callable[[pd.DataFrame], float]  # the chance level of a panel


def spectral_norm_evolution(log: pd.DataFrame) -> Figure:
    """Largest singular value of each layer's weights over training."""
    return _evolution(log, "spectral_norm", "Spectral norm over training", r"spectral norm $\sigma_1$")


def spectral_stretching(log: pd.DataFrame) -> Figure:
    """Spectral norm of each layer's weights over its value at the first logged step."""
    rows = _with(log, "spectral_norm").sort_values("step", kind="stable")
    of_matrix = rows.groupby(["run", "seed", "parameter", "expert"])["spectral_norm"]
    initial = of_matrix.transform("first").replace(0, np.nan)  # a LoRA product starts at zero
    stretched = rows.assign(spectral_norm=rows["spectral_norm"] / initial)
    title = "Hierarchical stretching: spectral norm over its initial value"
    return _evolution(stretched, "spectral_norm", title, r"$\sigma_1(t)\,/\,\sigma_1(0)$")


def spectral_gap(log: pd.DataFrame) -> Figure:
    """sigma_1 / sigma_2 of each layer's weights over training."""
    return _evolution(log, "spectral_gap", "Spectral gap over training", r"spectral gap $\sigma_1/\sigma_2$")


def spectral_entropy(log: pd.DataFrame) -> Figure:
    """Normalized entropy of the squared singular values over training; 1 is a flat spectrum."""
    return _evolution(log, "spectral_entropy", "Spectral entropy over training", "spectral entropy (1 = flat)")


def update_alignment(log: pd.DataFrame) -> Figure:
    """Mean cosine between the top-k left subspaces of update and weights, with the level of random subspaces."""
    level = lambda rows: alignment_by_chance(int(rows["rows"].iloc[0]), _subspace_dimension(rows))
    title = "Alignment of updates with weights (dashed: chance)"
    return _evolution(log, "update_alignment", title, "mean cosine, top-$k$ left", level)


def update_energy_in_top_k(log: pd.DataFrame) -> Figure:
    """Share of the update's energy inside the weights' top-k left subspace, with its chance level k / out."""
    level = lambda rows: float(rows["update_energy_chance"].iloc[0])
    title = "Update energy in the weights' top subspace (dashed: chance)"
    return _evolution(log, "update_energy_in_top_k", title, r"share of $\|\Delta W\|_F^2$", level)


def norm_heatmap(log: pd.DataFrame) -> Figure:
    """Layer x step map of the spectral norm."""
    return layer_heatmap(log, "spectral_norm")


def entropy_heatmap(log: pd.DataFrame) -> Figure:
    """Layer x step map of the spectral entropy."""
    return layer_heatmap(log, "spectral_entropy")


def layer_heatmap(log: pd.DataFrame, metric: str) -> Figure:
    """Layer x step map of one metric, of experts their mean, all panels on one colour scale."""
    log = _over_steps(_with(log, metric))
    tables = {key: _by_step(rows, "layer", metric).T for key, rows in log.groupby(["run", "module", "projection"])}
    norm = Normalize(min(t.min(axis=None) for t in tables.values()), max(t.max(axis=None) for t in tables.values()))
    name = metric.replace("_", " ")
    of_experts = " (mean of experts)" if log["expert"].nunique() > 1 else ""
    figure, found = panels(log, f"{name.capitalize()} by layer and step{of_experts}")
    for axes, rows in found:
        table = tables[tuple(rows[["run", "module", "projection"]].iloc[0])]
        steps, layers = np.asarray(table.columns, float), np.asarray(table.index, float)
        axes.pcolormesh(edges(steps), edges(layers), table.to_numpy(float), cmap="viridis", norm=norm, rasterized=True)
        axes.set_xlim(log["step"].min(), log["step"].max())  # cells reach half a step further than the run
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        count_steps(axes.xaxis)
        axes.grid(False)
    label(figure, "step", "layer")
    colorbar(figure, ScalarMappable(norm, "viridis"), name)
    return figure


def singular_spectrum(log: pd.DataFrame) -> Figure:
    """All singular values of each layer at the last logged step; dashed: the mean of the layers at the first."""
    log = _with(log, "singular_values")
    first, last = log["step"].min(), log["step"].max()
    dashed = f" (dashed: step {first}, mean of layers)" if first < last else ""
    figure, found = panels(log, f"Singular values at step {last}{dashed}")
    colors = by_depth(log)
    for axes, rows in found:
        for layer, of_layer in rows[rows["step"] == rows["step"].max()].groupby("layer"):
            _spectrum_line(axes, of_layer, color=colors(layer), linewidth=1.4)
        if first < last:
            _spectrum_line(axes, rows[rows["step"] == rows["step"].min()], **CHANCE)
    _from_zero(figure)
    label(figure, "index $i$ / number of singular values", r"singular value $\sigma_i$")
    depth_colorbar(figure, log)
    return figure


def singular_spectrum_mri(log: pd.DataFrame) -> Figure:
    """All singular values of the last layer over training, as a map of index and step."""
    log = _over_steps(_with(log, "singular_values"))
    deepest = log[log["layer"] == log["layer"].max()]
    log_sigma = lambda values: np.log10(np.maximum(values, 1e-12))
    values = log_sigma(np.concatenate(list(deepest["singular_values"])))
    norm = Normalize(max(values.min(), values.max() - 4), values.max())
    figure, found = panels(deepest, f"Singular values of layer {deepest['layer'].max()} over training")
    for axes, rows in found:
        spectra = _mean_spectra(rows, "step")
        image = log_sigma(spectra.to_numpy())  # (number, steps)
        steps, places = edges(np.asarray(spectra.columns, float)), np.linspace(0, 1, len(image) + 1)
        axes.pcolormesh(steps, places, image, cmap="magma", norm=norm, rasterized=True)
        axes.set_xlim(log["step"].min(), log["step"].max())
        axes.set_ylim(1, 0)  # the largest on top
        count_steps(axes.xaxis)
        axes.grid(False)
    label(figure, "step", "index $i$ / number of singular values")
    colorbar(figure, ScalarMappable(norm, "magma"), r"$\log_{10}\,\sigma_i$")
    return figure


def spectral_norm_vs_depth(log: pd.DataFrame) -> Figure:
    """Spectral norm against depth, one line per logged step, coloured by step."""
    return _against_depth(log, "spectral_norm", "Spectral norm against depth", r"spectral norm $\sigma_1$")


def spectral_gap_vs_depth(log: pd.DataFrame) -> Figure:
    """sigma_1 / sigma_2 against depth, one line per logged step, coloured by step."""
    return _against_depth(log, "spectral_gap", "Spectral gap against depth", r"spectral gap $\sigma_1/\sigma_2$")


def spectral_entropy_vs_depth(log: pd.DataFrame) -> Figure:
    """Spectral entropy against depth, one line per logged step, coloured by step."""
    return _against_depth(log, "spectral_entropy", "Spectral entropy against depth", "spectral entropy (1 = flat)")


FIGURES: tuple[Callable[[pd.DataFrame], Figure], ...] = (
    spectral_norm_evolution,
    spectral_stretching,
    norm_heatmap,
    singular_spectrum,
    singular_spectrum_mri,
    spectral_gap,
    spectral_entropy,
    entropy_heatmap,
    update_alignment,
    update_energy_in_top_k,
    spectral_norm_vs_depth,
    spectral_gap_vs_depth,
    spectral_entropy_vs_depth,
)


class NothingToDraw(UsageError):
    """The log holds no value of the metric that a figure shows, or one step of a figure over steps."""


def combined(runs: Mapping[str, Sequence[pd.DataFrame]]) -> pd.DataFrame:
    """The logs of all seeds of each run (name -> logs) as one, with columns `run` and `seed`."""
    return pd.concat(
        [log.assign(run=name, seed=seed) for name, logs in runs.items() for seed, log in enumerate(logs)],
        ignore_index=True,
    )


def draw(log: pd.DataFrame, output_dir: Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Draw every figure that the log has data for; returns the files written, `<figure>.<format>`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for function in tqdm(FIGURES, desc="Drawing", unit="figure", delay=2):
        try:
            figure = function(log)
        except NothingToDraw:
            continue
        for suffix in formats:
            written.append(output_dir / f"{function.__name__}.{suffix}")
            figure.savefig(written[-1], dpi=160)
    return written


def _evolution(log: pd.DataFrame, metric: str, title: str, ylabel: str, chance: Level | None = None) -> Figure:
    """One line per layer over steps, and what chance would give."""
    log = _over_steps(_with(log, metric))
    figure, found = panels(log, title)
    colors = by_depth(log)
    for axes, rows in found:
        for layer, of_layer in rows.groupby("layer"):
            _line_and_band(axes, _by_step(of_layer, _band(of_layer), metric), colors(layer))
        if chance is not None:
            axes.axhline(chance(rows), **CHANCE)
        count_steps(axes.xaxis)
    if chance is not None:
        _from_zero(figure)
    label(figure, "step", ylabel)
    depth_colorbar(figure, log)
    return figure


def _against_depth(log: pd.DataFrame, metric: str, title: str, ylabel: str) -> Figure:
    """One line per step that all seeds of a run have (thinned to nine) over layers."""
    log = _with(log, metric)
    norm, cmap = Normalize(0, max(1, log["step"].max())), matplotlib.colormaps["plasma"].resampled(256)
    figure, found = panels(log, title)
    for axes, rows in found:
        seeds = rows.groupby("step")["seed"].nunique()
        for step in _thin(list(seeds.index[seeds == seeds.max()]), 9):
            of_step = rows[rows["step"] == step]
            table = of_step.pivot_table(index="layer", columns=_band(of_step), values=metric, aggfunc="mean")
            _line_and_band(axes, table, cmap(0.9 * norm(step)), marker="o", markersize=3, linewidth=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label(figure, "layer", ylabel)
    if log["step"].nunique() > 1:
        shown = ListedColormap(cmap(np.linspace(0, 0.9, 256)))
        count_steps(colorbar(figure, ScalarMappable(norm, shown), "step").ax.yaxis)
    return figure


def _with(log: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that have the metric; layer and expert -1 where there is none, run "", seed 0, and the module of what
    has none named by its parameter."""
    rows = log[log[metric].notna()] if metric in log else log[:0]
    if rows.empty:
        raise NothingToDraw(f"the spectral log has no values of {metric}")
    projection = rows["projection"].fillna(rows["parameter"])
    rows = rows.assign(projection=projection, module=rows["module"].fillna(projection))
    whole = {name: rows[name].fillna(-1).astype(int) for name in ("layer", "expert")}
    rows = rows.assign(**whole, step=rows["step"].astype(int))
    return rows if "run" in rows else rows.assign(run="", seed=0)


def _over_steps(log: pd.DataFrame) -> pd.DataFrame:
    if log["step"].nunique() == 1:
        raise NothingToDraw(f"the spectral log has one step, {log['step'].iloc[0]}")
    return log


def _band(rows: pd.DataFrame) -> str:
    """What the band of a line spans."""
    return "seed" if rows["seed"].nunique() > 1 else "expert"


def _by_step(rows: pd.DataFrame, column: str, metric: str) -> pd.DataFrame:
    """Means (steps, values of `column`); seeds that were logged at other steps are interpolated."""
    by = [column] if column == "seed" else [column, "seed"]
    table = rows.pivot_table(index="step", columns=by, values=metric, aggfunc="mean")
    table = table.astype(float).interpolate(method="index", limit_area="inside")
    return table.T.groupby(level=column).mean().T


def _line_and_band(axes: Axes, table: pd.DataFrame, color: tuple, **style: object) -> None:
    """The mean of the columns over the index, and their range."""
    axes.plot(table.index, table.mean(axis=1), color=color, **{"linewidth": 1.4} | style)
    if table.shape[1] > 1:
        axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=color, alpha=0.12, lw=0)


def _from_zero(figure: Figure) -> None:
    """Scales from zero on, once everything is drawn: from then on they do not follow what is drawn."""
    for axes in figure.axes:
        axes.set_ylim(bottom=0)


def _spectrum_line(axes: Axes, rows: pd.DataFrame, **style: object) -> None:
    """Mean spectrum over i / r in (0, 1], with the range of the seeds."""
    _line_and_band(axes, _mean_spectra(rows, "seed"), **style)


def _mean_spectra(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean spectra (places, values of `column`); those of narrower layers interpolated at the places of the widest."""
    places = _places(max(map(len, rows["singular_values"])))
    at_places = lambda spectrum: np.interp(places, _places(len(spectrum)), spectrum)
    means = {
        value: np.mean([at_places(spectrum) for spectrum in group["singular_values"]], axis=0)
        for value, group in rows.groupby(column)
    }
    return pd.DataFrame(means, index=places)


def _places(count: int) -> np.ndarray:
    return np.arange(1, count + 1) / count


def _subspace_dimension(rows: pd.DataFrame) -> int:
    """k, which the log holds as the chance level k / out."""
    return round(float(rows["update_energy_chance"].iloc[0]) * int(rows["rows"].iloc[0]))


def _thin(values: Sequence[int], n: int) -> list[int]:
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int))]
