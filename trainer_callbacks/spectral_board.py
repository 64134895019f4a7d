"""What of the spectral log TensorBoard shows: scalars, histograms of spectra, layer x step heatmaps, chart layout."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from blueberry.errors import UsageError
from blueberry.spectral.log import SpectralLog
from blueberry.spectral.metrics import Row
from blueberry.spectral.names import matrix_name

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
    """Writes the logs of one run through a SummaryWriter. Experts of a layer are averaged.

    Tags are `<metric>/<module.projection>/layer_<nn>`; the custom scalars tab has one chart per metric and projection
    with the first, middle and last layer. Heatmaps are drawn again whenever the number of logs has doubled, and at
    the end: a figure costs as much as the metrics of a small model.
    """

    def __init__(self, writer: SummaryWriter, parameters: Iterable[str]):
        self.writer = writer
        names = [matrix_name(parameter) for parameter in parameters]
        self.layers = _first_middle_last(sorted({name.layer for name in names if name.layer is not None}))
        self.projections = sorted({f"{name.module}.{name.projection}" for name in names})
        self._logs = 0
        writer.add_custom_scalars(self._layout())

    def write(self, step: int, rows: Sequence[Row], log: SpectralLog) -> None:
        """Show the rows of one step."""
        places: dict[Place, list[Row]] = defaultdict(list)
        for row in rows:
            places[f"{row['module']}.{row['projection']}", row["layer"]].append(row)
        for place, experts in places.items():
            for metric in SCALARS:
                values = [row[metric] for row in experts if row.get(metric) is not None]
                if values:
                    self.writer.add_scalar(_tag(metric, place), fmean(values), step)
            self._histogram(step, place, experts)
        self._logs += 1
        if self._logs > 1 and self._logs & (self._logs - 1) == 0:
            self._heatmaps(step, log)
        self._last_step = step

    def finish(self, log: SpectralLog) -> None:
        """Draw the final heatmaps and flush."""
        self._heatmaps(self._last_step, log)
        self.writer.flush()

    def _histogram(self, step: int, place: Place, experts: list[Row]) -> None:
        spectra = [row["singular_values"] for row in experts if row.get("singular_values")]
        if spectra and place[1] in self.layers:
            self.writer.add_histogram(_tag("singular_values", place), np.mean(spectra, axis=0), step)

    def _heatmaps(self, step: int, log: SpectralLog) -> None:
        from blueberry.spectral.plots import layer_heatmap, pixels

        frame = log.read()
        for metric in HEATMAPS:
            try:
                self.writer.add_image(
                    f"heatmap/{metric}", pixels(layer_heatmap(frame, metric)), step, dataformats="HWC"
                )
            except UsageError:  # this metric is not logged
                continue

    def _layout(self) -> dict[str, dict[str, list]]:
        """Few lines per chart: TensorBoard draws all lines of a run in one colour."""
        return {
            metric: {
                projection: ["Multiline", [f"^{_tag(metric, (projection, layer))}$" for layer in self.layers]]
                for projection in self.projections
            }
            for metric in SCALARS
        }


def _first_middle_last(layers: list[int]) -> list[int | None]:
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]}) if layers else [None]


def _tag(metric: str, place: Place) -> str:
    projection, layer = place
    return f"{metric}/{projection}" if layer is None else f"{metric}/{projection}/layer_{layer:02d}"
