"""What of the spectral log TensorBoard shows: scalars, histograms of spectra, layer x step heatmaps, chart layout."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

import numpy as np

from blueberry.spectral.metrics import Row
from blueberry.spectral.names import matrix_name

from .heatmap import heatmap
from .tensorboard import Charts, RunWriter, first_middle_last

SCALARS = (
    "spectral_norm",
    "spectral_gap",
    "stable_rank",
    "spectral_entropy",
    "update_alignment",
    "update_energy_in_top_k",
    "update_to_weight_ratio",
)
HEATMAPS = ("spectral_norm", "spectral_entropy", "update_alignment")

Place = tuple[str, int | None]  # (module.projection, layer)


class SpectralBoard:
    """Writes the logs of one run. Experts of a layer are averaged.

    Tags are `<metric>/<module.projection>/layer_<nn>`; the custom scalars tab has one chart per metric and projection
    with the first, middle and last layer.
    """

    def __init__(self, writer: RunWriter, parameters: Iterable[str]):
        self.writer = writer
        names = [matrix_name(parameter) for parameter in parameters]
        self.layers = first_middle_last(name.layer for name in names if name.layer is not None) or [None]
        self.projections = list(dict.fromkeys(f"{name.module}.{name.projection}" for name in names))
        self._history: dict[tuple[str, int | None, int], dict[str, float | None]] = {}
        writer.add_charts(self._layout())

    def write(self, step: int, rows: Iterable[Row]) -> None:
        """Show the rows of one step."""
        self._show_scalars(step, self.remember(step, rows))
        self._heatmaps(step)
        self.writer.flush()

    def remember(self, step: int, rows: Iterable[Row]) -> dict[Place, list[Row]]:
        """Keep the means over experts for the heatmaps; returns the rows by place."""
        places: dict[Place, list[Row]] = defaultdict(list)
        for row in rows:
            places[f"{row['module']}.{row['projection']}", row["layer"]].append(row)
        for place, experts in places.items():
            self._history[*place, step] = {metric: _mean(experts, metric) for metric in SCALARS}
        return places

    def scalars(self, step: int) -> dict[str, float]:
        """The scalars of one step, by tag."""
        return {
            _tag(metric, (projection, layer)): value
            for (projection, layer, at), values in self._history.items()
            if at == step
            for metric, value in values.items()
            if value is not None
        }

    def _show_scalars(self, step: int, places: Mapping[Place, list[Row]]) -> None:
        for place, experts in places.items():
            for metric, value in self._history[*place, step].items():
                if value is not None:
                    self.writer.add_scalar(_tag(metric, place), value, step)
            self._histogram(step, place, experts)

    def _histogram(self, step: int, place: Place, experts: list[Row]) -> None:
        spectra = [row["singular_values"] for row in experts if row.get("singular_values")]
        if spectra and place[1] in self.layers:
            self.writer.add_histogram(_tag("singular_values", place), np.mean(spectra, axis=0), step)

    def _heatmaps(self, step: int) -> None:
        steps = sorted({s for _, _, s in self._history})
        for metric in HEATMAPS:
            blocks = {projection: self._block(metric, projection, steps) for projection in self.projections}
            known = {projection: block for projection, block in blocks.items() if not np.isnan(block).all()}
            if known and len(steps) > 1:
                image = heatmap(f"{metric.replace('_', ' ')}, layers from top to bottom", known, steps)
                self.writer.add_image(f"heatmap/{metric}", image, step, dataformats="HWC")

    def _block(self, metric: str, projection: str, steps: list[int]) -> np.ndarray:
        """Values (layers, steps) of one projection; NaN where there is none."""
        layers = sorted({layer for place, layer, _ in self._history if place == projection}, key=lambda x: x or 0)
        get = lambda layer, step: self._history.get((projection, layer, step), {}).get(metric)
        return np.array([[get(layer, step) for step in steps] for layer in layers], dtype=float)

    def _layout(self) -> Charts:
        """Few lines per chart: TensorBoard draws all lines of a run in one colour."""
        return {
            metric: {
                projection: ["Multiline", [f"^{_tag(metric, (projection, layer))}$" for layer in self.layers]]
                for projection in self.projections
            }
            for metric in SCALARS
        }


def _mean(rows: list[Row], metric: str) -> float | None:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return fmean(values) if values else None


def _tag(metric: str, place: Place) -> str:
    projection, layer = place
    return f"{metric}/{projection}" if layer is None else f"{metric}/{projection}/layer_{layer:02d}"
