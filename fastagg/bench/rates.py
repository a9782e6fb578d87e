"""What the limits of a record reached: bytes and flops a second of its machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from fastagg.bench.limits import MEMORY_COPY
from fastagg.bench.record import Record, Row

__all__ = ["Rates", "is_of_the_machine", "rates"]


@dataclass(frozen=True)
class Rates:
    """Medians over a record's limits; None where it has no such limit."""

    copied: float | None
    """Bytes a second of the memory copy, read and written."""
    product: float | None
    """Flops a second of the matrix product: float32 on a CPU, the factors' dtype on a GPU."""
    wide_product: float | None
    """Flops a second of the float64 product."""


def rates(record: Record) -> Rates:
    """The rates of a record's limits."""
    limits = [row for row in record.rows if row.kind == "limit"]
    return Rates(
        copied=_median(row.bytes / row.seconds for row in limits if row.contender == MEMORY_COPY),
        product=_median(row.flops / row.seconds for row in limits),
        wide_product=_median(row.wide_flops / row.seconds for row in limits),
    )


def is_of_the_machine(row: Row) -> bool:
    """Whether a limit is a copy or a product of torch's, which no change of FastAgg can move; the
    end-to-end limit is a sum that has FastAgg's own kernels in it."""
    computes = row.flops > 0 or row.wide_flops > 0
    return row.kind == "limit" and (row.contender == MEMORY_COPY or computes)


def _median(values: Iterable[float]) -> float | None:
    reached = [value for value in values if value > 0]
    return statistics.median(reached) if reached else None
