"""The log keeps what was appended, through kills, truncation and compaction."""

import signal
import subprocess
import sys
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest

from blueberry.errors import UsageError
from blueberry.spectral.log import SCHEMA, SpectralLog
from blueberry.spectral.names import METRICS


def rows(step: int, n: int = 2) -> list[dict]:
    return [
        {
            "step": step,
            "layer": i,
            "parameter": f"layers.{i}.w",
            "spectral_norm": step + 0.5,
            "singular_values": [2.0, 1.0],
        }
        for i in range(n)
    ]


def filled(path, steps) -> SpectralLog:
    log = SpectralLog(path / "spectral_log")
    for step in steps:
        log.append(rows(step))
    return log


def test_what_is_appended_is_read_back_in_order_with_nulls_for_absent_columns(tmp_path):
    frame = filled(tmp_path, [0, 5, 3]).read()
    assert list(frame["step"]) == [0, 0, 5, 5, 3, 3]
    assert list(frame["layer"]) == [0, 1] * 3
    assert list(frame["singular_values"].iloc[0]) == [2, 1]
    assert frame["update_alignment"].isna().all() and frame["expert"].isna().all()
    assert str(frame["layer"].dtype) == "Int32"


def test_the_schema_holds_every_metric():
    assert set(METRICS) < set(SCHEMA.names)


def test_pandas_and_datasets_read_the_folder_in_one_line(tmp_path):
    from datasets import load_dataset

    log = filled(tmp_path, [0, 1])
    assert len(pd.read_parquet(log.path)) == 4
    dataset = load_dataset(
        "parquet", data_files=str(log.path / "part-*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset["step"][:] == [0, 0, 1, 1]


def test_truncation_drops_exactly_the_later_steps_even_within_a_part(tmp_path):
    log = filled(tmp_path, [0, 1])
    log.append(rows(2, 1) + rows(3, 1))
    log.append(rows(4))
    log.truncate(after_step=2)
    assert list(log.read()["step"]) == [0, 0, 1, 1, 2]
    log.append(rows(3))
    assert list(log.read()["step"]) == [0, 0, 1, 1, 2, 3, 3]


def test_compaction_keeps_the_rows_in_one_part_and_appending_goes_on(tmp_path):
    log = filled(tmp_path, [0, 1, 2])
    before = log.read()
    log.compact()
    assert len(list(log.path.iterdir())) == 1
    pd.testing.assert_frame_equal(log.read(), before)
    log.append(rows(3))
    log.compact()
    assert list(log.read()["step"]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(pd.read_parquet(log.path)) == 8


def test_a_compaction_killed_before_its_clean_up_repeats_nothing(tmp_path, monkeypatch):
    log = filled(tmp_path, [0, 1, 2])
    monkeypatch.setattr(SpectralLog, "_remove_superseded", lambda self: None)  # killed here
    log.compact()
    monkeypatch.undo()
    assert len(list(log.path.iterdir())) == 4
    reopened = SpectralLog(log.path)
    assert list(reopened.read()["step"]) == [0, 0, 1, 1, 2, 2]
    reopened.append(rows(3))
    reopened.compact()
    assert len(list(log.path.iterdir())) == 1
    assert list(pd.read_parquet(log.path)["step"]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_killed_writer_loses_no_log_that_it_completed(tmp_path):
    """kill -9 at a random moment of continuous appending: every step that was reported is there, once."""
    script = (
        "import sys; from blueberry.spectral.log import SpectralLog\n"
        "log = SpectralLog(sys.argv[1])\n"
        "for step in range(100000):\n"
        "    log.append([{'step': step, 'parameter': 'w', 'singular_values': [1.0] * 2000}] * 20)\n"
        "    print(step, flush=True)\n"
    )
    path = tmp_path / "spectral_log"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    reported = [0, *(int(line) for line in process.stdout.read().split("\n")[:-1])]
    process.wait()
    steps = SpectralLog(path).read()["step"]
    assert len(reported) > 3
    assert list(steps[::20][: len(reported)]) == reported
    assert len(steps) in (20 * len(reported), 20 * len(reported) + 20)  # at most one more than was reported
    assert len(pd.read_parquet(path)) == len(steps)


def test_a_file_half_written_is_not_part_of_the_log(tmp_path):
    log = filled(tmp_path, [0])
    (log.path / ".part-00000001.parquet").write_bytes(b"PAR1 torn")
    assert list(log.read()["step"]) == [0, 0]
    assert len(pd.read_parquet(log.path)) == 2


def test_there_being_no_log_is_an_error_that_says_where(tmp_path):
    with pytest.raises(UsageError, match=r"no spectral log in .*nowhere"):
        SpectralLog(tmp_path / "nowhere").read()


def test_a_log_of_another_version_is_refused(tmp_path):
    log = filled(tmp_path, [0])
    part = log.parts()[0]
    pq.write_table(pq.ParquetFile(part).read().replace_schema_metadata({"spectral_log_version": "0"}), part)
    with pytest.raises(UsageError, match="version 0"):
        log.read()


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no column 'spectral_nrom'"):
        SpectralLog(tmp_path).append([{"step": 0, "parameter": "w", "spectral_nrom": 1.0}])
