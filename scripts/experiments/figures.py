"""Figures of experiments, from their records."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from benchmarks.common import Record
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from .measures import loss_curves

matplotlib.use("agg")


def save(figure: Figure, path: Path, is_map: bool = False) -> Path:
    """As PNG without the time and the version that equal figures differ in.

    Lines come in 256 colours, a third of the bytes. A map keeps all of its colours: its colour bar is read by them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = BytesIO()
    figure.savefig(pixels, dpi=100)
    plt.close(figure)
    image = Image.open(pixels).convert("RGB")
    image = image if is_map else image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    image.save(path, optimize=True)
    return path


def losses(arms: Mapping[str, Sequence[Record]], title: str) -> Figure:
    """Validation loss against tokens: mean over seeds, with their range as a band."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, records in arms.items():
        tokens, values = loss_curves(records)
        (line,) = axes.plot(tokens, values.mean(0), marker="o", markersize=3, label=arm)
        axes.fill_between(tokens, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel="training tokens", ylabel="validation loss, nats")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def learning_rates(tried: Mapping[str, Mapping[float, float]], title: str) -> Figure:
    """Validation loss against the learning rate, one line for each arm."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for arm, loss_by_rate in tried.items():
        rates = sorted(loss_by_rate)
        axes.plot(rates, [loss_by_rate[rate] for rate in rates], marker="o", label=arm)
    axes.set(title=title, xlabel="learning rate", ylabel="validation loss, nats", xscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def step_times(rows: Sequence[Record]) -> Figure:
    """Milliseconds of a step's parts, one bar for each model and arm."""
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1), layout="constrained")
    names = [f"{row['model']}: {row['arm']}" for row in rows]
    left = np.zeros(len(rows))
    for part in ("forward", "backward", "newton_schulz", "rest of the optimizer"):
        if part == "rest of the optimizer":
            widths = np.array([row["optimizer_ms"] - row["newton_schulz_ms"] for row in rows])
        else:
            widths = np.array([row[f"{part}_ms"] for row in rows])
        axes.barh(names, widths, left=left, label=part.replace("_", "-"))
        left += widths
    axes.invert_yaxis()
    axes.set(xlabel="time of a step, ms")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def loss_heatmaps(
    grids: Mapping[str, np.ndarray], rows: Sequence, columns: Sequence, names: tuple[str, str]
) -> Figure:
    """One heatmap of losses (rows, columns) for each title, on one color scale; the numbers in the cells."""
    figure, panels = plt.subplots(1, len(grids), figsize=(4 * len(grids), 4), layout="constrained", squeeze=False)
    finite = np.concatenate([values[np.isfinite(values)] for values in grids.values()])
    top = np.quantile(finite, 0.9)  # the worst tenth would take most of the colours
    for axes, (title, values) in zip(panels[0], grids.items(), strict=True):
        image = axes.imshow(values, vmin=finite.min(), vmax=top, cmap="viridis_r", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            color = "black" if image.norm(value) < 0.4 else "white"  # small losses are bright
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color=color)
        axes.set(title=title, xlabel=names[1], ylabel=names[0])
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
    figure.colorbar(image, ax=panels[0], label=f"validation loss, nats (arrow: above {top:.2f})", extend="max")
    return figure
