"""How time and memory grow along a series, read off a record.

The cases of a series differ in one quantity. What an op costs there is taken for a power of the bytes
that it is given, seconds ~ bytes_in ^ exponent: 1 is linear in the input. Small inputs cost mostly
overhead, so the exponent of the larger half of the points is given beside that of all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastagg.bench.cases import SERIES, Series
from fastagg.bench.record import Record, Row

__all__ = ["LEAST_POINTS", "Curve", "Exponents", "Growth", "Point", "growth", "headline"]

LEAST_POINTS = 3
"""Through two points any line fits."""


@dataclass(frozen=True)
class Point:
    """What a contender took at one value of a series."""

    value: int
    """The series' quantity: m = n, R or the number of clients."""
    bytes_in: float
    seconds: float
    low: float
    high: float
    """The quartiles of the seconds."""
    noise: float | None
    peak_bytes: int | None
    scaled: bool
    """Timed on fewer modules than the case has."""


@dataclass(frozen=True)
class Exponents:
    """Of the bytes given, by least squares of the logarithms. None: fewer than three points, inputs of
    one size, or a value that is missing or 0."""

    seconds: float | None
    seconds_at_large_end: float | None
    """Of the larger half of the points, at least two."""
    peak_bytes: float | None
    peak_bytes_at_large_end: float | None


@dataclass(frozen=True)
class Curve:
    """A contender along a series, from the smallest value to the largest."""

    contender: str
    points: tuple[Point, ...]
    exponents: Exponents


@dataclass(frozen=True)
class Growth:
    """An op along a series."""

    series: Series
    op: str
    headline: Curve
    """Of FastAgg's first row in each case."""
    routes: tuple[Curve, ...]
    """Of FastAgg's other rows."""
    baselines: tuple[Curve, ...]


def headline(rows: Sequence[Row]) -> Row | None:
    """The row that stands for FastAgg among the rows of one case and op: its first."""
    return next((row for row in rows if row.kind == "fastagg"), None)


def growth(record: Record) -> list[Growth]:
    """Every series and op that the record has at three of the series' values or more."""
    ops = list(dict.fromkeys(row.op for row in record.rows))
    found = (_of(record, series, op) for series in SERIES.values() for op in ops)
    return [each for each in found if each is not None]


def _of(record: Record, series: Series, op: str) -> Growth | None:
    first: list[Point] = []
    name = ""
    routes: dict[str, list[Point]] = {}
    baselines: dict[str, list[Point]] = {}
    for value, case in sorted(zip(series.values, series.cases, strict=True), key=lambda pair: pair[0]):
        rows = record.of(case.name, op)
        own = headline(rows)
        for row in rows:
            if row is own:
                first.append(_point(value, row))
                name = name or row.contender
            elif row.kind != "limit":
                curves = routes if row.kind == "fastagg" else baselines
                curves.setdefault(row.contender, []).append(_point(value, row))
    if len(first) < LEAST_POINTS:
        return None
    return Growth(
        series,
        op,
        _curve(name, first),
        tuple(_curve(contender, points) for contender, points in routes.items()),
        tuple(_curve(contender, points) for contender, points in baselines.items()),
    )


def _point(value: int, row: Row) -> Point:
    return Point(
        value,
        row.bytes_in,
        row.seconds,
        row.low,
        row.high,
        row.noise,
        row.peak_bytes,
        row.scaled,
    )


def _curve(contender: str, points: Sequence[Point]) -> Curve:
    seconds = [(point.bytes_in, point.seconds) for point in points]
    memory = [(point.bytes_in, point.peak_bytes) for point in points]
    exponents = Exponents(
        _exponent(seconds), _at_large_end(seconds), _exponent(memory), _at_large_end(memory)
    )
    return Curve(contender, tuple(points), exponents)


def _exponent(points: Sequence[tuple[float, float | None]]) -> float | None:
    return _slope(points) if len(points) >= LEAST_POINTS else None


def _at_large_end(points: Sequence[tuple[float, float | None]]) -> float | None:
    return _slope(points[len(points) // 2 :]) if len(points) >= LEAST_POINTS else None


def _slope(points: Sequence[tuple[float, float | None]]) -> float | None:
    """Least squares in the logarithms of both."""
    known = [(x, y) for x, y in points if y is not None and x > 0 and y > 0]
    if len(known) < len(points) or len({x for x, _ in known}) < 2:
        return None
    x, y = zip(*((math.log(given), math.log(taken)) for given, taken in known), strict=True)
    return statistics.linear_regression(x, y).slope
