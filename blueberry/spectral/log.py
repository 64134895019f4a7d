"""The spectral log of a run: a folder of parquet parts, one per flush, columnar and append-safe.

A part is written under a name that starts with a dot, synced, and renamed: readers see whole parts only, and a killed
process loses nothing that `append` returned from. Read it in one line, without this module:

    pandas.read_parquet("RUN/spectral_log")
    datasets.load_dataset("parquet", data_files="RUN/spectral_log/part-*.parquet")

Columns (every one of them may be null but `step` and `parameter`):

| column | type | meaning |
|---|---|---|
| step | int64 | optimizer steps taken; 0: initial weights |
| tokens | int64 | input tokens seen, all ranks; null when the Trainer does not count them |
| layer, module, projection, expert | int32, string, string, int32 | parsed from the name; no layer or expert: null |
| parameter | string | name of the parameter in the model |
| rows, columns | int32 | shape (out, in) of the matrix |
| spectral_norm ... participation_ratio | double | metrics of the weight after the step |
| update_alignment ... update_to_weight_ratio | double | metrics of the change made by this step alone |
| top_singular_values, singular_values | list of float | spectrum of the weight, descending |
| weight_norm_peak, gradient_norm_peak | double | largest Frobenius norm at any step since the log before this one |
| power_law_exponent | double | of the tail of sigma^2; null unless it was asked for |
| reason | string | which metrics are null and why; null when none is |

Version 1 had no peaks and no power_law_exponent: they are null when such a log is read. `parameter` of one matrix of
a fused projection ends in its part (`c_attn.q`), of a LoRA adapter in `lora` (the product BA).
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blueberry.errors import UsageError

from .names import PEAK_METRICS, POWER_LAW, SPECTRA, UPDATE_METRICS, WEIGHT_METRICS

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "spectral_log"  # name of the log inside a run folder
VERSION = "2"
_READABLE = ("1", VERSION)

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        ("tokens", pa.int64()),
        ("layer", pa.int32()),
        ("module", pa.string()),
        ("projection", pa.string()),
        ("expert", pa.int32()),
        pa.field("parameter", pa.string(), nullable=False),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        *((name, pa.float64()) for name in (*WEIGHT_METRICS, *UPDATE_METRICS, *PEAK_METRICS, POWER_LAW)),
        *((name, pa.list_(pa.float32())) for name in SPECTRA),
        ("reason", pa.string()),
    ],
    metadata={"spectral_log_version": VERSION},
)
# Half the size of parquet's defaults: numbers hardly repeat, but their upper bytes do.
_ENCODING = {
    "compression": "zstd",
    "use_dictionary": ["module", "projection", "parameter", "reason"],
    "use_byte_stream_split": [
        *(field.name for field in SCHEMA if pa.types.is_floating(field.type)),
        *(f"{name}.list.element" for name in SPECTRA),
    ],
}
_PART = re.compile(r"part-(\d{8})(?:-(\d{8}))?\.parquet")


class SpectralLog:
    """Append to, read, truncate and compact the log in folder `path` (made when first appended to). One writer."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows (dicts of columns; absent ones are null) as one part; on return they survive a kill."""
        rows = list(rows)
        unknown = {name for row in rows for name in row} - set(SCHEMA.names)
        if unknown:
            raise UsageError(
                f"the spectral log has no column {sorted(unknown)[0]!r}; it has {', '.join(SCHEMA.names)}"
            )
        if rows:
            self.path.mkdir(parents=True, exist_ok=True)
            number = max((last for _, last, _ in self._ranges()), default=-1) + 1
            self._write(pa.Table.from_pylist(rows, schema=SCHEMA), f"part-{number:08d}.parquet")

    def read(self) -> "pd.DataFrame":
        """The whole log, ordered as written. UsageError when there is none, or one of another version."""
        table = self.table()
        return table.to_pandas(types_mapper=_nullable().get)

    def table(self) -> pa.Table:
        """The whole log as an arrow table."""
        parts = self.parts()
        if not parts:
            raise UsageError(f"no spectral log in {self.path}; train with --track_manifold true to get one")
        return pa.concat_tables(_read_part(part) for part in parts)

    def truncate(self, after_step: int) -> None:
        """Drop the rows of steps later than `after_step`, as a run resumed from a checkpoint of that step must."""
        for part in self.parts():
            table = _read_part(part)
            kept = table.filter(pc.less_equal(table["step"], after_step))
            if len(kept) == 0:
                part.unlink()
            elif len(kept) < len(table) or _version(pq.read_schema(part)) != VERSION:
                self._write(kept, part.name)

    def clear(self) -> None:
        """Drop every row, as a run that starts over must."""
        for pattern in ("part-*.parquet", ".peaks-*.json"):
            for path in self.path.glob(pattern):
                path.unlink()

    def compact(self) -> None:
        """Merge the parts into one. A kill in between leaves superseded parts, which every method here ignores."""
        ranges = self._ranges()
        if len(ranges) > 1:
            self._write(self.table(), f"part-{ranges[0][0]:08d}-{ranges[-1][1]:08d}.parquet")
            self._remove_superseded()

    def parts(self) -> list[Path]:
        """The files that make up the log, in order."""
        return [path for _, _, path in self._ranges()]

    def _ranges(self) -> list[tuple[int, int, Path]]:
        """(first, last, file) of each part, without those that a compacted one covers."""
        matches = ((_PART.fullmatch(path.name), path) for path in self.path.glob("part-*.parquet"))
        ranges = [(int(m[1]), int(m[2] or m[1]), path) for m, path in matches if m]
        ranges.sort(key=lambda r: (r[0], -r[1]))
        kept: list[tuple[int, int, Path]] = []
        for part in ranges:
            if not kept or part[0] > kept[-1][1]:
                kept.append(part)
        return kept

    def _remove_superseded(self) -> None:
        for path in set(self.path.glob("part-*.parquet")) - set(self.parts()):
            path.unlink()

    def _write(self, table: pa.Table, name: str) -> None:
        hidden = self.path / f".{name}"
        try:
            with open(hidden, "wb") as file:
                pq.write_table(table, file, **_ENCODING)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            hidden.unlink(missing_ok=True)  # half a part would keep a full disk full
            raise
        os.replace(hidden, self.path / name)


def _read_part(path: Path) -> pa.Table:
    table = pq.ParquetFile(path).read()
    version = _version(table.schema)
    if version not in _READABLE:
        raise UsageError(f"{path} is a spectral log of version {version}, this is version {VERSION}; record it again")
    for field in SCHEMA:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(SCHEMA.names).cast(SCHEMA)


def _version(schema: pa.Schema) -> str:
    return (schema.metadata or {}).get(b"spectral_log_version", b"none").decode()


def _nullable() -> dict[pa.DataType, Any]:
    """Pandas types that keep integers with nulls integers."""
    import pandas as pd

    return {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
