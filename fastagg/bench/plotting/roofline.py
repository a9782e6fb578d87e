"""The roofline: rates that were reached, against what the machine's copies and products allow.

After Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures" (2009). Flops and bytes are counted from the algorithms, and the roofs are medians over
limits of many sizes: what fits into a cache may lie above them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastagg.bench.plotting.frame import figure, heading, legend, log_scale, power_of_ten
from fastagg.bench.rates import Rate, Rates, rates
from fastagg.bench.record import Record, Row
from fastagg.plot_style import LIGHT, LineStyle, Theme

__all__ = ["roofline_figure"]

_MANY = 60  # points that are opaque hide each other


def roofline_figure(record: Record, theme: Theme = LIGHT) -> Figure | None:
    """A point a row with flops, of the ops in which FastAgg's rows have them: elsewhere only files and
    copies are the limit."""
    ops = dict.fromkeys(row.op for row in record.rows if row.kind == "fastagg" and _flops(row))
    rows = [row for row in record.rows if row.op in ops and row.kind != "limit"]
    rows = [row for row in rows if _flops(row) and row.bytes > 0]
    if not rows:
        return None
    made, axes = figure(theme, 4.3)
    handles: list[Artist] = []
    for place, op in enumerate(ops):
        colour = theme.series[place % len(theme.series)]
        _points(axes, [row for row in rows if row.op == op], colour, len(rows), theme)
        handles.append(Patch(color=colour))
    labels = list(ops)
    for label, marker, face in (("FastAgg", "o", theme.ink), ("baseline", "s", theme.paper)):
        handles.append(
            Line2D([], [], linestyle="none", marker=marker, color=theme.ink, markerfacecolor=face)
        )
        labels.append(label)
    roofs = _roofs(axes, record, [_intensity(row) for row in rows], theme)
    for line, label in roofs:
        handles.append(line)
        labels.append(label)
    axes.set_xlabel("arithmetic intensity (flops a byte, both counted)")
    axes.set_ylabel("GFLOP/s reached")
    axes.margins(0.06)
    for axis in (axes.xaxis, axes.yaxis):
        log_scale(axis, power_of_ten)
    note = "lines: medians over the limits of all cases; band: up to the fastest"
    heading(made, "Roofline of all cases", record, theme, [note] if roofs else [])
    legend(made, handles, labels, theme)
    return made


def _flops(row: Row) -> float:
    return row.flops + row.wide_flops


def _intensity(row: Row) -> float:
    return _flops(row) / row.bytes


def _points(axes: Axes, rows: Sequence[Row], colour: str, count: int, theme: Theme) -> None:
    opacity = 0.95 if count <= _MANY else 0.6
    for kind, marker in (("baseline", "s"), ("fastagg", "o")):
        shown = [row for row in rows if row.kind == kind]
        axes.plot(
            [_intensity(row) for row in shown],
            [_flops(row) / row.seconds / 1e9 for row in shown],
            linestyle="none",
            marker=marker,
            markersize=4.5,
            alpha=opacity,
            color=colour,
            markeredgewidth=0.9,
            markerfacecolor=colour if kind == "fastagg" else theme.paper,
            zorder=4 if kind == "fastagg" else 3,
        )


def _roofs(
    axes: Axes, record: Record, intensities: Sequence[float], theme: Theme
) -> list[tuple[Artist, str]]:
    """Draws the limits that the record has; their lines and names for the legend."""
    reached = rates(record)
    low, high = min(intensities) / 2, max(intensities) * 2
    drawn: list[tuple[Artist, str]] = []
    products = [rate.median for rate in (reached.product, reached.wide_product) if rate]
    if reached.copied is not None:
        ridge = max(products) / reached.copied.median if products else high
        # Where all points lie right of the ridge, a piece of the slope still shows where it is.
        low = min(low, ridge / 4)
        x = np.array([low, min(ridge, high)])
        line = _limit(axes, x, x * reached.copied.median, ":", theme)
        drawn.append((line, f"memory copy, {_named(reached.copied, 'B/s')}"))
    narrow = "float32" if record.settings.device == "cpu" else record.settings.dtype
    named: tuple[tuple[str, LineStyle, Rate | None], ...] = (
        (narrow, "-", reached.product),
        ("float64", "--", reached.wide_product),
    )
    for dtype, dashes, rate in named:
        if rate is not None:
            start = rate.median / reached.copied.median if reached.copied else low
            line = _limit(axes, [min(start, high / 2), high], [rate.median] * 2, dashes, theme)
            drawn.append((line, f"{dtype} product, {_named(rate, 'FLOP/s')}"))
    _band(axes, np.geomspace(low, high, 200), reached, theme)
    return drawn


def _limit(
    axes: Axes,
    intensities: Sequence[float] | np.ndarray,
    rate: Sequence[float] | np.ndarray,
    dashes: LineStyle,
    theme: Theme,
) -> Artist:
    (line,) = axes.plot(
        intensities, np.asarray(rate) / 1e9, linestyle=dashes, color=theme.ink, linewidth=1.1, zorder=2
    )
    return line


def _band(axes: Axes, intensities: np.ndarray, reached: Rates, theme: Theme) -> None:
    """From the medians of copy and product to the fastest."""
    if reached.copied is None or reached.product is None:
        return
    middle = np.minimum(intensities * reached.copied.median, reached.product.median)
    fastest = np.minimum(intensities * reached.copied.fastest, reached.product.fastest)
    axes.fill_between(
        intensities, middle / 1e9, fastest / 1e9, color=theme.faint, alpha=0.15, linewidth=0, zorder=1
    )


def _named(rate: Rate, unit: str) -> str:
    size, prefix = (1e12, "T") if rate.median >= 1e12 else (1e9, "G")
    return f"{rate.median / size:.3g} (up to {rate.fastest / size:.3g}) {prefix}{unit}"
