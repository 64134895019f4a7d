"""The spectral log of a run in one small table."""

from dataclasses import dataclass

import pandas as pd

from blueberry.spectral.chance import alignment_by_chance
from blueberry.spectral.log import SpectralLog

_METRICS = {"spectral_norm": ".2f", "stable_rank": ".1f", "spectral_entropy": ".3f"}


@dataclass(frozen=True)
class Spectra:
    """Rows of text: matrices, then each metric at the first and the last log, then the alignment of the last update.

    Attributes:
        first, last: steps of these logs.
        experts: "" or " and experts".
    """

    first: int
    last: int
    experts: str
    rows: list[list[str]]


def spectra_of(log: SpectralLog | None) -> Spectra | None:
    """None without a log."""
    if log is None:
        return None
    rows = log.read()
    rows = rows[rows["spectral_norm"].notna()]
    if rows.empty:
        return None
    first, last = int(rows["step"].min()), int(rows["step"].max())
    table = [
        [f"{module}.{projection}" if module != projection else module, *_row(part, first, last)]
        for (module, projection), part in rows.groupby(["module", "projection"], sort=False)
    ]
    experts = " and experts" if rows["expert"].notna().any() else ""
    return Spectra(first, last, experts, table)


def _cell(value: float, spec: str) -> str:
    """A matrix of zeros, as an adapter starts from, has no spectrum."""
    return "–" if pd.isna(value) else f"{value:{spec}}"


def _row(rows: pd.DataFrame, first: int, last: int) -> list[str]:
    means = {step: rows[rows["step"] == step].mean(numeric_only=True) for step in (first, last)}
    cells = [" → ".join(_cell(means[step][name], spec) for step in (first, last)) for name, spec in _METRICS.items()]
    if pd.isna(means[last]["update_alignment"]):
        return [*cells, ""]
    n = int(rows["rows"].iloc[-1])
    k = round(means[last]["update_energy_chance"] * n)
    return [*cells, f"{means[last]['update_alignment']:.2f} ({alignment_by_chance(n, k):.2f}, k = {k})"]
