"""What the limits of a record reached: bytes and flops a second of its machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from fastagg.bench.limits import MEMORY_COPY
from fastagg.bench.record import Record, Row

__all__ = ["Rate", "Rates", "is_of_the_machine", "rates"]


@dataclass(frozen=True)
class Rate:
    """What one kind of limit reached, in all cases and ops: small shapes are mostly overhead, and what
    fits into a cache is faster than memory."""

    median: float
    fastest: float


@dataclass(frozen=True)
class Rates:
    """None where a record has no such limit."""

    copied: Rate | None
    """Bytes a second of the memory copy, read and written."""
    product: Rate | None
    """Flops a second of the matrix product: float32 on a CPU, the factors' dtype on a GPU."""
    wide_product: Rate | None
    """Flops a second of the float64 product."""


def rates(record: Record) -> Rates:
    """The rates of a record's limits."""
    limits = [row for row in record.rows if row.kind == "limit"]
    return Rates(
        copied=_rate(row.bytes / row.seconds for row in limits if row.contender == MEMORY_COPY),
        product=_rate(row.flops / row.seconds for row in limits),
        wide_product=_rate(row.wide_flops / row.seconds for row in limits),
    )


def is_of_the_machine(row: Row) -> bool:
    """Whether a limit is a copy or a product of torch's, which no change of FastAgg can move; the
    end-to-end limit is a sum that has FastAgg's own kernels in it."""
    computes = row.flops > 0 or row.wide_flops > 0
    return row.kind == "limit" and (row.contender == MEMORY_COPY or computes)


def _rate(values: Iterable[float]) -> Rate | None:
    reached = [value for value in values if value > 0]
    return Rate(statistics.median(reached), max(reached)) if reached else None
