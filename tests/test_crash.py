"""Killed at random moments, training ends as if nothing had happened. `scripts/crash_test.py --kills 50` does more."""

import sys
from collections import Counter

from conftest import ROOT


def test_ten_kills_lose_nothing_and_change_nothing(tmp_path, monkeypatch):
    """Nor is a damaged checkpoint taken. Half of the kills hit one that is being written."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import crash_test

    counts = Counter()
    differences = list(crash_test.crash_test(10, 0, tmp_path, counts))
    assert differences == []
    assert counts["kills"] == 10 and counts["while_saving"] > 0
    assert not counts["damaged_accepted"] and not counts["lost"]
    del sys.modules["crash_test"]
