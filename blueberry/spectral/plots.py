"""Figures from a spectral log, one function per figure: DataFrame in, matplotlib Figure out. Needs no torch.

Every figure has one panel per projection. Lines and bands over a MoE layer's experts are their mean and range.
Layers are coloured by depth, steps by time (viridis and plasma: sequential, readable with any colour vision).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from tqdm.auto import tqdm

from blueberry.errors import UsageError

from .chance import alignment_by_chance
from .log import FOLDER, SpectralLog

CHANCE = {"color": "0.35", "linestyle": (0, (4, 3)), "linewidth": 1.0}


def spectral_norm_evolution(log: pd.DataFrame) -> Figure:
    """Largest singular value of each layer's weights over training."""
    return _evolution(log, "spectral_norm", "Spectral norm over training", r"spectral norm $\sigma_1$")


def spectral_gap(log: pd.DataFrame) -> Figure:
    """sigma_1 / sigma_2 of each layer's weights over training."""
    return _evolution(log, "spectral_gap", "Spectral gap over training", r"spectral gap $\sigma_1/\sigma_2$")


def spectral_entropy(log: pd.DataFrame) -> Figure:
    """Normalized entropy of the squared singular values over training; 1 is a flat spectrum."""
    return _evolution(log, "spectral_entropy", "Spectral entropy over training", "spectral entropy (1 = flat)")


def update_alignment(log: pd.DataFrame) -> Figure:
    """Mean cosine between the top-k left subspaces of update and weights, with the level of random subspaces."""
    figure = _evolution(
        log, "update_alignment", "Alignment of updates with weights (dashed: chance)", "mean cosine, top-$k$ left"
    )
    for axes, rows in zip(figure.axes, _groups(log, "update_alignment"), strict=False):
        out, k = int(rows["rows"].iloc[0]), _subspace_dimension(rows)
        _chance_line(axes, alignment_by_chance(out, k))
    return figure


def update_energy_in_top_k(log: pd.DataFrame) -> Figure:
    """Share of the update's energy inside the weights' top-k left subspace, with its chance level k / out."""
    title = "Update energy in the weights' top subspace (dashed: chance)"
    figure = _evolution(log, "update_energy_in_top_k", title, r"share of $\|\Delta W\|_F^2$")
    for axes, rows in zip(figure.axes, _groups(log, "update_energy_in_top_k"), strict=False):
        _chance_line(axes, float(rows["update_energy_chance"].iloc[0]))
    return figure


def layer_heatmap(log: pd.DataFrame, metric: str = "spectral_norm") -> Figure:
    """Layer x step map of one metric, of experts their mean, all projections on one colour scale."""
    log = _with(log, metric)
    shown = log.groupby(["module", "projection", "layer", "step"])[metric].mean()
    norm = Normalize(shown.min(), shown.max())
    label = metric.replace("_", " ")
    of_experts = " (mean of experts)" if log["expert"].nunique() > 1 else ""
    figure, panels = _panels(log, f"{label.capitalize()} by layer and step{of_experts}")
    for axes, rows in panels:
        table = rows.pivot_table(index="layer", columns="step", values=metric, aggfunc="mean")
        steps, layers = np.asarray(table.columns, float), np.asarray(table.index, float)
        axes.pcolormesh(
            _edges(steps), _edges(layers), table.to_numpy(float), cmap="viridis", norm=norm, rasterized=True
        )
        if len(steps) > 1:
            axes.set_xlim(steps[0], steps[-1])  # cells reach half a step further than the run
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _count_steps(axes.xaxis)
        axes.grid(False)
    _label(figure, "step", "layer")
    _colorbar(figure, ScalarMappable(norm, "viridis"), label)
    return figure


def singular_spectrum(log: pd.DataFrame) -> Figure:
    """All singular values of each layer at the last logged step; dashed: the mean of the layers at the first."""
    log = _with(log, "singular_values")
    first, last = log["step"].min(), log["step"].max()
    figure, panels = _panels(log, f"Singular values at step {last} (dashed: step {first}, mean of layers)")
    colors = _by_depth(log)
    for axes, rows in panels:
        for layer, of_layer in rows[rows["step"] == last].groupby("layer"):
            _spectrum_line(axes, of_layer, color=colors(layer), linewidth=1.4)
        _spectrum_line(axes, rows[rows["step"] == first], **CHANCE)
        axes.set_ylim(bottom=0)
    _label(figure, "index $i$ / number of singular values", r"singular value $\sigma_i$")
    _depth_colorbar(figure, log)
    return figure


def spectral_norm_vs_depth(log: pd.DataFrame) -> Figure:
    """Spectral norm against depth, one line per logged step (thinned to nine), coloured by step."""
    log = _with(log, "spectral_norm")
    steps = _thin(sorted(log["step"].unique()), 9)
    norm, cmap = Normalize(0, max(1, steps[-1])), matplotlib.colormaps["plasma"].resampled(256)
    figure, panels = _panels(log, "Spectral norm against depth")
    for axes, rows in panels:
        for step, of_step in rows[rows["step"].isin(steps)].groupby("step"):
            mean = of_step.groupby("layer")["spectral_norm"].mean()
            axes.plot(mean.index, mean, color=cmap(0.9 * norm(step)), marker="o", markersize=3, linewidth=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(figure, "layer", r"spectral norm $\sigma_1$")
    shown = ListedColormap(cmap(np.linspace(0, 0.9, 256)))
    _count_steps(_colorbar(figure, ScalarMappable(norm, shown), "step").ax.yaxis)
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "spectral_norm_evolution": spectral_norm_evolution,
    "norm_heatmap": lambda log: layer_heatmap(log, "spectral_norm"),
    "singular_spectrum": singular_spectrum,
    "spectral_gap": spectral_gap,
    "spectral_norm_vs_depth": spectral_norm_vs_depth,
    "spectral_entropy": spectral_entropy,
    "entropy_heatmap": lambda log: layer_heatmap(log, "spectral_entropy"),
    "update_alignment": update_alignment,
    "update_energy_in_top_k": update_energy_in_top_k,
}


def draw_run(run_dir: str | Path, output_dir: str | Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Draw every figure that the log of a run has data for; returns the files written, `<figure>.<format>`.

    UsageError when the run has no spectral log.
    """
    log = SpectralLog(Path(run_dir) / FOLDER).read()
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in tqdm(FIGURES.items(), desc="Drawing", unit="figure", delay=2):
        try:
            figure = draw(log)
        except NothingToDraw:
            continue
        for suffix in formats:
            written.append(output_dir / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=160)
    return written


class NothingToDraw(UsageError):
    """The log holds no value of the metric that a figure shows."""


def _evolution(log: pd.DataFrame, metric: str, title: str, ylabel: str) -> Figure:
    """One line per layer over steps; the band spans the layer's experts."""
    log = _with(log, metric)
    figure, panels = _panels(log, title)
    colors = _by_depth(log)
    for axes, rows in panels:
        for layer, of_layer in rows.groupby("layer"):
            by_step = of_layer.groupby("step")[metric].agg(["mean", "min", "max"]).astype(float)
            axes.plot(by_step.index, by_step["mean"], color=colors(layer), linewidth=1.4)
            if of_layer["expert"].nunique() > 1:
                axes.fill_between(by_step.index, by_step["min"], by_step["max"], color=colors(layer), alpha=0.12, lw=0)
        _count_steps(axes.xaxis)
    _label(figure, "step", ylabel)
    _depth_colorbar(figure, log)
    return figure


def _with(log: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows that have the metric: layer -1 outside numbered layers, what has no module named by its parameter."""
    rows = log[log[metric].notna()] if metric in log else log[:0]
    if rows.empty:
        raise NothingToDraw(f"the spectral log has no values of {metric}")
    projection = rows["projection"].fillna(rows["parameter"])
    rows = rows.assign(projection=projection, module=rows["module"].fillna(projection))
    return rows.assign(layer=rows["layer"].fillna(-1).astype(int), step=rows["step"].astype(int))


def _groups(log: pd.DataFrame, metric: str) -> Iterator[pd.DataFrame]:
    return (rows for _, rows in _with(log, metric).groupby(["module", "projection"], sort=False))


def _panels(log: pd.DataFrame, title: str) -> tuple[Figure, Iterator[tuple[Axes, pd.DataFrame]]]:
    """A figure with one panel per projection, in the order of the model, and (panel, its rows).

    Sizes in inches, not constrained layout: solving for a layout takes longer than everything else here.
    """
    groups = list(log.groupby(["module", "projection"], sort=False))
    columns = min(len(groups), 4 if len(groups) in (4, 7, 8) or len(groups) > 9 else 3)
    lines = -(-len(groups) // columns)
    width, height = 0.85 + 2.65 * columns + 0.6, 0.7 + 2.05 * lines + 0.1
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, fontsize=12, y=1 - 0.12 / height, va="top")
    grid = figure.add_gridspec(lines, columns, left=0.85 / width, right=1 - 1.0 / width, wspace=0.28,
                               bottom=0.6 / height, top=1 - 0.65 / height, hspace=0.48)  # fmt: skip
    for i in range(len(groups)):
        figure.add_subplot(grid[i])
    return figure, _titled(figure.axes, groups)


def _titled(panels: Sequence[Axes], groups: Sequence[tuple]) -> Iterator[tuple[Axes, pd.DataFrame]]:
    for axes, ((module, projection), rows) in zip(panels, groups, strict=True):
        experts = rows["expert"].nunique()
        name = projection if module in (projection, "self_attn", "mlp") else f"{module}.{projection}"
        axes.set_title(f"{name} ({experts} experts)" if experts > 1 else name, fontsize=9.5)
        axes.grid(True, color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, color="0.5", labelbottom=True)
        axes.yaxis.get_offset_text().set_fontsize(7)  # "1e-6+1.2", where values barely change: beside the title
        axes.margins(x=0.02)
        yield axes, rows


def _count_steps(axis: Axis) -> None:
    """Whole steps with short labels: 800, 25k, 1.5M."""
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(EngFormatter(sep=""))


def _label(figure: Figure, x: str, y: str) -> None:
    width, height = figure.get_size_inches()
    figure.supxlabel(x, fontsize=10, y=0.1 / height, va="bottom")
    figure.supylabel(y, fontsize=10, x=0.12 / width, ha="left")


def _chance_line(axes: Axes, level: float) -> None:
    axes.axhline(level, **CHANCE)
    axes.set_ylim(bottom=0)


def _spectrum_line(axes: Axes, rows: pd.DataFrame, **style: object) -> None:
    """Mean spectrum over i / r in (0, 1]; where layers differ in width, interpolated at the places of the widest."""
    places = _places(max(map(len, rows["singular_values"])))
    spectra = [np.interp(places, _places(len(spectrum)), spectrum) for spectrum in rows["singular_values"]]
    axes.plot(places, np.mean(spectra, axis=0), **style)


def _places(count: int) -> np.ndarray:
    return np.arange(1, count + 1) / count


def _subspace_dimension(rows: pd.DataFrame) -> int:
    """k, which the log holds as the chance level k / out."""
    return round(float(rows["update_energy_chance"].iloc[0]) * int(rows["rows"].iloc[0]))


def _depth_map(log: pd.DataFrame) -> tuple[Colormap, np.ndarray]:
    """One viridis colour per layer (without the yellow end, too light for lines) and the layers."""
    layers = np.sort(log["layer"].unique())
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(layers)))), layers


def _by_depth(log: pd.DataFrame) -> Callable[[int], tuple]:
    cmap, layers = _depth_map(log)
    return lambda layer: cmap(int(np.searchsorted(layers, layer)))


def _depth_colorbar(figure: Figure, log: pd.DataFrame) -> None:
    cmap, layers = _depth_map(log)
    if len(layers) > 1:
        norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
        places = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 8)).round().astype(int))
        bar = _colorbar(figure, ScalarMappable(norm, cmap), "layer")
        bar.set_ticks(places, labels=[str(layers[i]) for i in places], minor=False)
        bar.ax.minorticks_off()


def _colorbar(figure: Figure, mappable: ScalarMappable, label: str) -> Colorbar:
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 0.85 / width, 0.75 / height, 0.13 / width, 1 - 1.55 / height))
    bar = figure.colorbar(mappable, cax=axes)
    bar.set_label(label, fontsize=9.5)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.get_offset_text().set(fontsize=7, ha="center")
    bar.ax.yaxis.OFFSETTEXTPAD = 8  # points: above the topmost label
    bar.outline.set_visible(False)
    return bar


def _edges(centers: np.ndarray) -> np.ndarray:
    """Cell edges halfway between centres, so that steps logged unevenly keep their place on the axis."""
    if len(centers) == 1:
        return centers[0] + np.array([-0.5, 0.5])
    middle = (centers[1:] + centers[:-1]) / 2
    return np.concatenate([[2 * centers[0] - middle[0]], middle, [2 * centers[-1] - middle[-1]]])


def _thin(values: Sequence[int], n: int) -> list[int]:
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int))]
