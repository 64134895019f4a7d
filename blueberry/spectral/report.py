"""report.html: one self-contained, interactive page about a run or a comparison. Needs plotly, but no torch."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blueberry.errors import UsageError

from .names import UPDATE_METRICS, WEIGHT_METRICS

TEMPLATE = Path(__file__).with_name("report.html")
NUMBERS = 250_000  # metric values on the page, about 8 bytes each
POINTS = 400_000  # of spectra, 5.3 bytes each; with plotly's 4.8 MB the page stays below 10 MB
MOST_STEPS, LEADING = 60, 10  # steps to choose from; singular values that are kept before the rest is thinned
METRICS = tuple(name for name in (*WEIGHT_METRICS, *UPDATE_METRICS) if name != "update_energy_chance")


def write_report(log: pd.DataFrame, title: str, path: Path) -> Path:
    """Write the page about a log (of several runs and seeds: see `plots.combined`); it needs no network.

    Experts of a layer and seeds of a run are averaged; long runs and large spectra are thinned.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("report.html needs the plotly package: pip install plotly") from None
    data = json.dumps(payload(log), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    # data last: what it says is not searched for placeholders
    for name, text in {"title": html.escape(title), "plotly": get_plotlyjs(), "data": data}.items():
        page = page.replace("{{" + name + "}}", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def payload(log: pd.DataFrame) -> dict[str, Any]:
    """What the page shows: metrics by run, projection and layer over steps, and spectra."""
    if "run" not in log:
        log = log.assign(run="run", seed=0)
    projection = log["projection"].fillna(log["parameter"])
    place = log["module"].fillna("") + "." + projection
    log = log.assign(layer=log["layer"].fillna(-1).astype(int), place=place.str.removeprefix("."))
    metrics = [name for name in METRICS if log[name].notna().any()]
    cells = log.groupby(["run", "place", "layer"]).ngroups
    steps = int(np.clip(NUMBERS // (cells * len(metrics)), 2, MOST_STEPS))
    log = log[log["step"].isin(_thinned(sorted(log["step"].unique()), steps))]
    points = max(2, POINTS // (cells * log["step"].nunique()) - LEADING)
    return {
        "metrics": metrics,
        "steps": [int(step) for step in sorted(log["step"].unique())],
        "projections": list(dict.fromkeys(log["place"])),
        "runs": [_run(name, rows, metrics, points) for name, rows in log.groupby("run", sort=False)],
    }


def _run(name: str, rows: pd.DataFrame, metrics: list[str], points: int) -> dict[str, Any]:
    steps = sorted(rows["step"].unique())
    layers: dict[str, dict[int, Any]] = {}
    for (place, layer), of_cell in rows.groupby(["place", "layer"], sort=False):
        means = of_cell.groupby("step")[metrics].mean().reindex(steps).astype(float)
        cell: dict[str, Any] = {"values": {metric: _rounded(means[metric]) for metric in metrics}}
        spectra = of_cell[of_cell["singular_values"].notna()].groupby("step")["singular_values"]
        if len(spectra):
            shown = _shown(len(spectra.first().iloc[0]), points)
            cell["places"] = [int(i) + 1 for i in shown]
            cell["spectra"] = _packed({step: np.stack(list(s)).mean(0)[shown] for step, s in spectra}, steps)
        layers.setdefault(place, {})[int(layer)] = cell
    return {"name": name, "steps": [int(step) for step in steps], "layers": layers}


def _rounded(values: pd.Series) -> list[float | None]:
    """Five significant digits; null where there is no number."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _shown(length: int, points: int) -> np.ndarray:
    """Indices of the leading singular values, and of `points` evenly spaced ones."""
    even = np.linspace(0, length - 1, min(points, length)).round().astype(int)
    return np.unique(np.concatenate([np.arange(min(LEADING, length)), even]))


def _packed(spectra: dict[int, np.ndarray], steps: list[int]) -> str:
    """base64 of float32 (steps, points), NaN where a step has none."""
    empty = np.full(len(next(iter(spectra.values()))), np.nan)
    rows = np.stack([spectra.get(step, empty) for step in steps])
    return base64.b64encode(rows.astype("<f4").tobytes()).decode()


def _thinned(values: list[int], n: int) -> list[int]:
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int))]
