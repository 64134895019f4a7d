"""Statistics over seeds, and the verdict that an interval gives."""

import math
from collections.abc import Sequence

from benchmarks.common import Record
from scipy import stats

LEVEL = 0.95
HOLDS, FAILS, OPEN = "holds", "does_not_hold", "not_decided"
IN_WORDS = {HOLDS: "holds", FAILS: "does not hold", OPEN: "not decided"}


def verdict_of(interval: Sequence[float], needed: Sequence[float], everywhere: bool = False) -> str:
    """Whether a number whose interval this is lies between the two `needed`.

    With `everywhere` the interval is the range of all that was seen, none of which may lie outside.
    """
    low, high = interval
    if needed[0] <= low and high <= needed[1]:
        return HOLDS
    outside = high < needed[0] or low > needed[1]
    return FAILS if outside or everywhere else OPEN  # NaN keeps no bound, and decides nothing else


def paired(values: Sequence[float], others: Sequence[float]) -> Record:
    """Mean difference `values - others` over seeds, its 95% interval and p-value by a paired t-test."""
    test = stats.ttest_rel(values, others)
    interval = test.confidence_interval(LEVEL)
    difference = mean([a - b for a, b in zip(values, others, strict=True)])
    return {"difference": difference, "interval": [float(interval.low), float(interval.high)],
            "p": float(test.pvalue), "n": len(values)}  # fmt: skip


def single(values: Sequence[float]) -> Record:
    """Mean of values over seeds with its 95% interval by Student's t; NaN of one value, which says nothing of it."""
    if len(values) == 1:
        return {"mean": values[0], "interval": [math.nan, math.nan], "n": 1}
    if len(set(values)) == 1:
        return {"mean": values[0], "interval": [values[0], values[0]], "n": len(values)}
    interval = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return {"mean": mean(values), "interval": [float(interval.low), float(interval.high)], "n": len(values)}


def variance_ratio(values: Sequence[float], others: Sequence[float]) -> Record:
    """Variance of `values` over that of `others`, with its 95% interval by the F distribution."""
    ratio = stats.tvar(values) / stats.tvar(others)
    degrees = len(values) - 1, len(others) - 1
    low, high = (ratio / stats.f.ppf(p, *degrees) for p in ((1 + LEVEL) / 2, (1 - LEVEL) / 2))
    return {"ratio": float(ratio), "interval": [float(low), float(high)], "n": len(values)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
