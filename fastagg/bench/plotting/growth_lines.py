"""Time and memory along a series: how they grow with the size, the ranks or the clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fastagg.bench.growth import Curve, Exponents, Growth, Point
from fastagg.bench.plotting.frame import (
    TIME_PER_RUN,
    bytes_scale,
    figure,
    heading,
    legend,
    seconds_scale,
)
from fastagg.bench.record import Record
from fastagg.plot_style import LIGHT, MARKERS, LineStyle, Theme, plain

__all__ = ["memory_figure", "time_figure"]

_AXES = {
    "square": "m = n of the one module",
    "ranks": "R, the ranks of all ten clients together",
    "clients": "number of clients",
}

Style = tuple[str, str, float]
"""Colour, marker and width of a line."""


@dataclass(frozen=True)
class _Quantity:
    """What is drawn against the values of a series."""

    name: str
    label: str
    scale: Callable[[Axis], None]
    of: Callable[[Point], float]
    exponents: Callable[[Exponents], tuple[float | None, float | None]]
    """Over all points, and over the larger half."""


_TIME = _Quantity(
    "time",
    TIME_PER_RUN,
    seconds_scale,
    lambda point: point.seconds,
    lambda exponents: (exponents.seconds, exponents.seconds_at_large_end),
)
_MEMORY = _Quantity(
    "memory",
    "peak memory beyond inputs",
    bytes_scale,
    lambda point: point.peak_bytes or math.nan,
    lambda exponents: (exponents.peak_bytes, exponents.peak_bytes_at_large_end),
)


def time_figure(record: Record, growth: Growth, theme: Theme = LIGHT) -> Figure:
    """Medians and quartiles of a run's time; dashed where a point was scaled from fewer modules."""
    return _figure(record, growth, _TIME, theme)


def memory_figure(record: Record, growth: Growth, theme: Theme = LIGHT) -> Figure | None:
    """Peaks of memory beyond the inputs, beside the inputs themselves; None where no peak is known."""
    curves = (growth.headline, *growth.routes, *growth.baselines)
    if not any(point.peak_bytes for curve in curves for point in curve.points):
        return None
    return _figure(record, growth, _MEMORY, theme)


def _figure(record: Record, growth: Growth, quantity: _Quantity, theme: Theme) -> Figure:
    curves = list(_styled(growth, theme))
    made, axes = figure(theme, 3.7 + 0.16 * ((len(curves) + 2) // 2))
    handles: list[Artist] = []
    labels: list[str] = []
    # FastAgg's headline lies on top of what it is compared with.
    for order, (curve, style) in enumerate(curves):
        handles.append(_line(axes, curve, style, quantity, 20 - order))
        _, large_end = quantity.exponents(curve.exponents)
        name = plain(curve.contender, longest=34)
        labels.append(name if large_end is None else f"{name} ({_exponent(large_end)})")
    if quantity is _TIME:
        handles.append(Line2D([], [], color=theme.faint, marker="|", markersize=9, linestyle="none"))
        labels.append("quartiles")
    else:
        given = [(point.value, point.bytes_in) for point in growth.headline.points]
        axes.plot(*zip(*given, strict=True), color=theme.faint, linestyle=":", linewidth=1.2, zorder=1)
        handles.append(Line2D([], [], color=theme.faint, linestyle=":", linewidth=1.2))
        labels.append("the inputs themselves")
    if any(point.scaled for curve, _ in curves for point in curve.points):
        handles.append(Line2D([], [], color=theme.faint, linestyle="--"))
        labels.append("scaled from fewer modules")
    _values_axis(axes, [point.value for point in growth.headline.points])
    axes.set_xlabel(_AXES.get(growth.series.name, growth.series.axis))
    axes.set_ylabel(quantity.label)
    quantity.scale(axes.yaxis)
    heading(
        made,
        f"{quantity.name.capitalize()} of {plain(growth.op)} by {plain(growth.series.axis)}",
        record,
        theme,
        _law(growth.headline, quantity),
    )
    bracketed = any(quantity.exponents(curve.exponents)[1] is not None for curve, _ in curves)
    caption = "(in brackets: the exponent over the larger half of the points)" if bracketed else None
    legend(made, handles, labels, theme, caption)
    return made


def _law(curve: Curve, quantity: _Quantity) -> list[str]:
    """The exponents of FastAgg's line, in words."""
    whole, large_end = quantity.exponents(curve.exponents)
    parts = []
    if whole is not None:
        parts.append(rf"{quantity.name} $\propto$ (input bytes)$^{{{_exponent(whole)}}}$")
    if large_end is not None:
        parts.append(f"exponent over the larger half: {_exponent(large_end)}")
    return [f"{plain(curve.contender, longest=34)}: {', '.join(parts)}"] if parts else []


def _exponent(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # never "-0.00"


def _styled(growth: Growth, theme: Theme) -> Iterator[tuple[Curve, Style]]:
    """FastAgg's lines in one colour, told apart by their markers; a colour a baseline."""
    own, *others = theme.series
    yield growth.headline, (own, MARKERS[0], 2.4)
    for place, curve in enumerate(growth.routes, 1):
        yield curve, (own, MARKERS[place % len(MARKERS)], 0.9)
    for place, curve in enumerate(growth.baselines):
        yield curve, (others[place % len(others)], MARKERS[place % len(MARKERS)], 1.4)


def _line(axes: Axes, curve: Curve, style: Style, quantity: _Quantity, order: int) -> Artist:
    colour, marker, width = style
    dashed: LineStyle = "--" if any(point.scaled for point in curve.points) else "-"
    x = [point.value for point in curve.points]
    axes.plot(
        x,
        [quantity.of(point) for point in curve.points],
        color=colour,
        marker=marker,
        markersize=4.5,
        linestyle=dashed,
        linewidth=width,
        zorder=order,
    )
    if quantity is _TIME:
        low, high = ([getattr(point, side) for point in curve.points] for side in ("low", "high"))
        axes.vlines(x, low, high, color=colour, linewidth=width + 1.2, alpha=0.4, zorder=order)
    return Line2D(
        [], [], color=colour, marker=marker, markersize=4.5, linestyle=dashed, linewidth=width
    )


def _values_axis(axes: Axes, values: Iterable[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
