"""Numbers of a run's spectral log: one for a run, or one for each matrix."""

from collections.abc import Callable

import numpy as np
import pandas as pd

DEPTHS = 3  # parts of the depth: the first third of the layers, the middle, the last


def hidden(log: pd.DataFrame) -> pd.DataFrame:
    """Without routers, which are no hidden matrices; with the number of layers, and a name for each matrix."""
    rows = log[log.projection != "gate"].copy()
    rows["layers"] = rows.layer.max() + 1
    rows["matrix"] = rows.parameter + ":" + rows.expert.astype("string").fillna("")
    return rows


def of_last_step(log: pd.DataFrame, metric: str) -> float:
    """Mean over matrices of a metric of the final weights."""
    rows = hidden(log)
    return float(rows[rows.step == rows.step.max()][metric].mean())


def change(log: pd.DataFrame, metric: str) -> float:
    """Mean over matrices: final minus initial weights."""
    return float(_ends(hidden(log), metric).pipe(lambda ends: ends["last"] - ends["first"]).mean())


def of_updates(log: pd.DataFrame, metric: str) -> float:
    """Mean over matrices and over the logs of the second half of the run."""
    rows = hidden(log)
    return float(rows[rows.step >= rows.step.max() / 2][metric].mean())


def flatness(log: pd.DataFrame) -> float:
    """Nuclear norm over sqrt(rank) Frobenius norm of the final weights: 1 where all singular values are equal."""
    rows = hidden(log)
    rows = rows[rows.step == rows.step.max()]
    rank = rows[["rows", "columns"]].min(axis=1).astype(float)
    return float((rows.nuclear_norm / (np.sqrt(rank) * rows.frobenius_norm)).mean())


def norm_growth(log: pd.DataFrame, chosen: Callable[[pd.DataFrame], pd.Series] | None = None) -> float:
    """Final over initial spectral norm, minus 1; mean over the matrices that `chosen` marks."""
    rows = hidden(log)
    rows = rows if chosen is None else rows[chosen(rows)]
    ends = _ends(rows, "spectral_norm")
    return float((ends["last"] / ends["first"] - 1).mean())


def gap_change(log: pd.DataFrame) -> float:
    """Final minus initial ratio of the two largest singular values, in the last third of the layers."""
    rows = hidden(log)
    ends = _ends(rows[is_deep(rows)], "spectral_gap")
    return float((ends["last"] - ends["first"]).mean())


def is_deep(rows: pd.DataFrame) -> pd.Series:
    """The last third of the layers, as many as `is_shallow` has: at least one."""
    return rows.layer >= rows.layers - _third(rows)


def is_shallow(rows: pd.DataFrame) -> pd.Series:
    """The first third of the layers, rounded down, but at least one."""
    return rows.layer < _third(rows)


def _third(rows: pd.DataFrame) -> pd.Series:
    return (rows.layers // DEPTHS).clip(lower=1)


def is_projection(name: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda rows: rows.projection == name


def growth_over_bound(log: pd.DataFrame) -> tuple[float, float]:
    """Growth of the spectral norm over the sum of the updates' norms: of the whole run, and second half over first.

    The sum, which bounds the growth, is integrated by trapezoids over the logged steps; before the first logged update
    all are taken to be as large as that one. Means over matrices.
    """
    rows = hidden(log)
    shares, halves = [], []
    for _, matrix in rows.groupby("matrix"):
        matrix = matrix.sort_values("step")
        steps, norms = matrix.step.to_numpy(float), matrix.spectral_norm.to_numpy()
        updates = np.array(matrix.update_spectral_norm, float)
        updates[0] = updates[1]  # the initial weights have none
        bound = np.concatenate([[0.0], np.cumsum(np.diff(steps) * (updates[1:] + updates[:-1]) / 2)])
        middle = np.searchsorted(steps, steps[-1] / 2)
        first = (norms[middle] - norms[0]) / bound[middle]
        second = (norms[-1] - norms[middle]) / (bound[-1] - bound[middle])
        shares.append((norms[-1] - norms[0]) / bound[-1])
        halves.append(second - first)
    return float(np.mean(shares)), float(np.mean(halves))


def collapse_step(log: pd.DataFrame, drop: float = 0.01) -> dict[str, int | None]:
    """For each layer, the first logged step at which the mean entropy has fallen by `drop` below its initial value."""
    rows = hidden(log)
    found: dict[str, int | None] = {}
    for layer, some in rows.groupby("layer"):
        entropy = some.groupby("step").spectral_entropy.mean()
        below = entropy.index[entropy < entropy.iloc[0] - drop]
        found[str(layer)] = int(below[0]) if len(below) else None
    return found


def _ends(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Columns `first` and `last`: the metric of each matrix at the first and the last logged step."""
    table = rows.pivot(index="matrix", columns="step", values=metric)
    return pd.DataFrame({"first": table.iloc[:, 0], "last": table.iloc[:, -1]})
