"""How far two medians must lie apart before one is called the faster."""

from __future__ import annotations

from fastagg.bench.record import Record, Row

__all__ = ["LEAST", "UNKNOWN", "noise_of", "noise_of_pair"]

LEAST = 0.02
"""Two runs that agree to the digit may have done so by chance: no pair has less noise than this."""

UNKNOWN = 0.1
"""Of a row that was timed in one run only, in a record where nothing of its op was timed in two."""


def noise_of(row: Row, record: Record) -> float:
    """A row's own noise; where it has none, the largest of its op's rows: better too wide than a
    difference that is none."""
    if row.noise is not None:
        return row.noise
    others = (other.noise for other in record.rows if other.op == row.op)
    return max((noise for noise in others if noise is not None), default=UNKNOWN)


def noise_of_pair(one: float, other: float) -> float:
    """Of the ratio of two rows' seconds, from the noise of each."""
    return max(one, other, LEAST)
