"""What the benchmarks measure with."""

import pytest
from conftest import ROOT


def test_the_peak_memory_of_a_new_process_is_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmarks.common import in_fresh_process, resident_peak

    held = b"x" * (800 * 2**20)  # more than the new process has when it has imported torch
    assert resident_peak() > len(held) > 2 * in_fresh_process(resident_peak)
