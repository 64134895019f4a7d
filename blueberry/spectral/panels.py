"""The grid that every figure is drawn on: one panel per projection, runs side by side, colours by depth."""

from collections.abc import Callable, Iterator, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

CHANCE = {"color": "0.35", "linestyle": (0, (4, 3)), "linewidth": 1.0}
LONGEST_NAME = 30  # characters of a run's name above its column

Panel = tuple[Axes, pd.DataFrame]  # a panel and the rows that it shows


def panels(log: pd.DataFrame, title: str) -> tuple[Figure, Iterator[Panel]]:
    """A figure with one panel per projection, in the order of the model, and run; and (panel, its rows).

    Panels of one projection share their scales. Sizes in inches, not constrained layout: solving for a layout takes
    longer than everything else here.
    """
    runs = list(dict.fromkeys(log["run"]))
    projections = list(log.groupby(["module", "projection"], sort=False))
    columns = _columns(len(projections), len(runs))
    lines = -(-len(projections) * len(runs) // columns)
    heading = 0.15 if len(runs) > 1 else 0.0
    width, height = 0.85 + 2.65 * columns + 0.6, 0.7 + heading + 2.05 * lines + 0.1
    figure = Figure(figsize=(width, height))
    figure.suptitle(title, fontsize=12, y=1 - 0.12 / height, va="top")
    grid = figure.add_gridspec(lines, columns, left=0.85 / width, right=1 - 1.0 / width, wspace=0.28,
                               bottom=0.6 / height, top=1 - (0.65 + heading) / height, hspace=0.48)  # fmt: skip
    found = []
    for i, (_, rows) in enumerate(projections):
        first = None
        for r, run in enumerate(runs):
            axes = first = figure.add_subplot(grid[i * len(runs) + r], sharex=first, sharey=first)
            above = _shortened(run) + "\n" if len(runs) > 1 and i < columns // len(runs) else ""
            found.append((axes, rows[rows["run"] == run], above))
    return figure, _prepared(found)


def _columns(projections: int, runs: int) -> int:
    if runs > 1:
        return runs * (2 if projections > 3 and runs == 2 else 1)
    return min(projections, 4 if projections in (4, 7, 8) or projections > 9 else 3)


def _shortened(name: str) -> str:
    half = LONGEST_NAME // 2 - 1
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _prepared(found: Sequence[tuple[Axes, pd.DataFrame, str]]) -> Iterator[Panel]:
    for axes, rows, above in found:
        axes.set_title(above + (_name(rows) if len(rows) else "not in this run"), fontsize=9.5)
        axes.grid(True, color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, color="0.5", labelbottom=True)
        axes.yaxis.get_offset_text().set_fontsize(7)  # "1e-6+1.2", where values barely change: beside the title
        axes.margins(x=0.02)
        if len(rows):
            yield axes, rows


def _name(rows: pd.DataFrame) -> str:
    module, projection = rows[["module", "projection"]].iloc[0]
    experts = rows["expert"].nunique()
    name = projection if module in (projection, "self_attn", "mlp") else f"{module}.{projection}"
    return f"{name} ({experts} experts)" if experts > 1 else name


def count_steps(axis: Axis) -> None:
    """Whole steps with short labels: 800, 25k, 1.5M."""
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(EngFormatter(sep=""))


def label(figure: Figure, x: str, y: str) -> None:
    """Names of the axes that all panels have."""
    width, height = figure.get_size_inches()
    figure.supxlabel(x, fontsize=10, y=0.1 / height, va="bottom")
    figure.supylabel(y, fontsize=10, x=0.12 / width, ha="left")


def by_depth(log: pd.DataFrame) -> Callable[[int], tuple]:
    """The colour of a layer."""
    cmap, layers = _depth_map(log)
    return lambda layer: cmap(int(np.searchsorted(layers, layer)))


def depth_colorbar(figure: Figure, log: pd.DataFrame) -> None:
    """The colours of the layers, where there are several."""
    cmap, layers = _depth_map(log)
    if len(layers) > 1:
        norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
        places = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 8)).round().astype(int))
        bar = colorbar(figure, ScalarMappable(norm, cmap), "layer")
        bar.set_ticks(places, labels=[str(layers[i]) for i in places], minor=False)
        bar.ax.minorticks_off()


def colorbar(figure: Figure, mappable: ScalarMappable, text: str) -> Colorbar:
    """A colour bar in the right margin."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 0.85 / width, 0.75 / height, 0.13 / width, 1 - 1.55 / height))
    bar = figure.colorbar(mappable, cax=axes)
    bar.set_label(text, fontsize=9.5)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.get_offset_text().set(fontsize=7, ha="center")
    bar.ax.yaxis.OFFSETTEXTPAD = 8  # points: above the topmost label
    bar.outline.set_visible(False)
    return bar


def edges(centers: np.ndarray) -> np.ndarray:
    """Cell edges halfway between centres, so that steps logged unevenly keep their place on the axis."""
    if len(centers) == 1:
        return centers[0] + np.array([-0.5, 0.5])
    middle = (centers[1:] + centers[:-1]) / 2
    return np.concatenate([[2 * centers[0] - middle[0]], middle, [2 * centers[-1] - middle[-1]]])


def _depth_map(log: pd.DataFrame) -> tuple[Colormap, np.ndarray]:
    """One viridis colour per layer (without the yellow end, too light for lines) and the layers."""
    layers = np.sort(log["layer"].unique())
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(layers)))), layers
