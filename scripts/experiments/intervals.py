"""Statistics over seeds."""

from collections.abc import Sequence

from benchmarks.common import Record
from scipy import stats


def paired(values: Sequence[float], others: Sequence[float]) -> Record:
    """Mean difference `values - others` over seeds, its 95% interval and p-value by a paired t-test."""
    test = stats.ttest_rel(values, others)
    interval = test.confidence_interval(0.95)
    difference = sum(a - b for a, b in zip(values, others, strict=True)) / len(values)
    return {"difference": difference, "interval": [float(interval.low), float(interval.high)],
            "p": float(test.pvalue), "n": len(values)}  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
