"""How far two medians must lie apart before one is called the faster."""

from __future__ import annotations

import statistics

from fastagg.bench.record import Record, Row

__all__ = ["LEAST", "UNKNOWN", "noise_of", "noise_of_pair"]

LEAST = 0.02
"""Two runs that agree to the digit may have done so by chance: no pair has less noise than this."""

UNKNOWN = 0.1
"""At least that of a row that was timed in one run only."""


def noise_of(row: Row, record: Record) -> float:
    """A row's own noise; where it has none, the median of its op's rows. Not the largest: one row that
    another process stalled would hide a difference of fifty times."""
    if row.noise is not None:
        return row.noise
    others = [other.noise for other in record.rows if other.op == row.op and other.noise is not None]
    return max(UNKNOWN, statistics.median(others)) if others else UNKNOWN


def noise_of_pair(one: float, other: float) -> float:
    """Of the ratio of two rows' seconds, from the noise of each."""
    return max(one, other, LEAST)
