"""How time and memory grow: exponents of power laws that are known, and what has none."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("pydantic")

from hypothesis import given
from hypothesis import strategies as st
from made_records import limit, record, row, series_rows

from fastagg.bench.cases import SERIES
from fastagg.bench.growth import growth, headline
from fastagg.bench.record import Row


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """A record's order says nothing of the values' order; FastAgg's rows of a case keep theirs."""
    cases = list(dict.fromkeys(each.case for each in rows))
    random.Random(seed).shuffle(cases)
    return [each for case in cases for each in rows if each.case == case]


@given(
    series=st.sampled_from(sorted(SERIES)),
    count=st.integers(3, 6),
    time=st.floats(-2, 4),
    memory=st.floats(0.2, 2),
    scale=st.floats(1e-12, 1e-3),
    order=st.integers(0, 1 << 30),
)
def test_an_exact_power_law_gives_its_exponent(
    series: str, count: int, time: float, memory: float, scale: float, order: int
) -> None:
    def rows(exponent: float, contender: str) -> list[Row]:
        return series_rows(
            series,
            lambda given: scale * (given / 1e6) ** exponent,
            lambda given: round(1e9 * (given / 1e6) ** memory),
            count=count,
            contender=contender,
        )

    made = record(shuffled(rows(time, "fastagg auto") + rows(1.5, "dense"), order))
    (found,) = growth(made)
    assert (found.series, found.op) == (SERIES[series], "svd")
    exponents = found.headline.exponents
    assert exponents.seconds == pytest.approx(time, abs=1e-6)
    assert exponents.seconds_at_large_end == pytest.approx(time, abs=1e-6)
    assert exponents.peak_bytes == pytest.approx(memory, abs=1e-3)
    assert exponents.peak_bytes_at_large_end == pytest.approx(memory, abs=1e-3)
    (baseline,) = found.baselines
    assert baseline.contender == "dense"
    assert baseline.exponents.seconds == pytest.approx(1.5, abs=1e-6)
    values = [point.value for point in found.headline.points]
    assert values == sorted(values) and len(values) == min(count, len(SERIES[series].values))


def test_the_large_end_is_without_the_overhead_of_small_inputs() -> None:
    made = record(series_rows("square", lambda given: max(1e-3, 1e-9 * given)))
    (found,) = growth(made)
    bytes_in = [point.bytes_in for point in found.headline.points]
    assert 1e-9 * bytes_in[2] < 1e-3 < 1e-9 * bytes_in[3]  # half of six points are overhead
    exponents = found.headline.exponents
    assert exponents.seconds_at_large_end == pytest.approx(1, abs=1e-9)
    assert exponents.seconds is not None and exponents.seconds < 0.9


@pytest.mark.parametrize(("lost", "whole", "end"), [(0, False, True), (5, False, False)])
@pytest.mark.parametrize("value", [None, 0])
def test_memory_that_is_unknown_has_no_exponent(
    lost: int, whole: bool, end: bool, value: int | None
) -> None:
    rows = series_rows("square", lambda given: given, lambda given: int(given))
    rows[lost] = rows[lost].model_copy(update={"peak_bytes": value})
    (found,) = growth(record(rows))
    exponents = found.headline.exponents
    assert (exponents.peak_bytes is not None) == whole
    assert (exponents.peak_bytes_at_large_end is not None) == end
    assert exponents.seconds == pytest.approx(1)


def test_two_points_are_no_growth() -> None:
    assert growth(record(series_rows("ranks", lambda given: given, count=2))) == []
    assert growth(record([])) == []
    # A baseline that was too slow at most values is shown, but no line is fitted to it.
    rows = series_rows("ranks", lambda given: given, count=4)
    rows += series_rows("ranks", lambda given: given**2, count=2, contender="dense")
    (found,) = growth(record(rows))
    (dense,) = found.baselines
    assert len(dense.points) == 2
    assert dense.exponents.seconds is None and dense.exponents.seconds_at_large_end is None


def test_inputs_of_one_size_have_no_exponent() -> None:
    rows = series_rows("ranks", lambda given: given)
    rows = [each.model_copy(update={"bytes_in": 1e6}) for each in rows]
    (found,) = growth(record(rows))
    assert found.headline.exponents.seconds is None


def test_the_headline_is_fastaggs_first_row() -> None:
    rows = [limit(), row("dense"), row("fastagg auto"), row("fastagg qr")]
    assert headline(rows) is rows[2]
    assert headline(rows[:2]) is None
    series = [
        each
        for contender in ("dense", "fastagg auto", "fastagg qr")
        for each in series_rows("clients", lambda given: given, contender=contender)
    ]
    (found,) = growth(record(series))
    assert found.headline.contender == "fastagg auto"
    assert [curve.contender for curve in found.routes] == ["fastagg qr"]
    assert [curve.contender for curve in found.baselines] == ["dense"]
