"""Error against time: whether speed was bought with accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastagg.bench.plotting.frame import (
    TIME_PER_RUN,
    figure,
    heading,
    legend,
    log_scale,
    power_of_ten,
    seconds_scale,
)
from fastagg.bench.record import Record, Row
from fastagg.plot_style import LIGHT, Theme, plain

__all__ = ["error_time_figure"]

FLOOR = 1e-15
"""Errors below are rounding: a logarithm needs an end."""

_GAP = 0.062  # between labels, of the axes' height


def error_time_figure(record: Record, case: str, theme: Theme = LIGHT) -> Figure | None:
    """A point a contender of `svd`, named at the side; hollow where it was scaled from fewer modules."""
    rows = [row for row in record.of(case, "svd") if _known(row)]
    if not rows:
        return None
    made, axes = figure(theme, 4.0)
    errors = [max(row.error or 0.0, FLOOR) for row in rows]
    colours = _colours(rows, theme)
    seconds = [row.seconds for row in rows]
    axes.set_xlim(min(seconds) / 1.8, max(seconds) * 1.8)
    low, high = min(errors) / 4, max(errors) * 4
    axes.set_ylim(low, high)
    seconds_scale(axes.xaxis)
    log_scale(axes.yaxis, lambda value: ("≤ " if value <= FLOOR else "") + power_of_ten(value))
    heights = [math.log(error / low) / math.log(high / low) for error in errors]
    for row, error, place, colour in zip(rows, errors, _apart(heights), colours, strict=True):
        axes.plot(
            row.seconds,
            error,
            marker="o" if row.kind == "fastagg" else "s",
            markersize=7 if row.kind == "fastagg" else 6,
            color=colour,
            markerfacecolor=theme.paper if row.scaled else colour,
            markeredgewidth=1.5,
            linestyle="none",
            zorder=3,
        )
        axes.annotate(
            plain(row.contender, longest=34),
            (row.seconds, error),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=colour,
            fontweight="bold" if row.kind == "fastagg" else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.55,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    axes.set_xlabel(f"{TIME_PER_RUN}, of all modules")
    axes.set_ylabel("(error − least possible error) / |dW|")
    heading(made, f"Error and time of svd: {plain(case)}", record, theme)
    kinds = [("FastAgg", "o", True), ("baseline", "s", True)]
    if any(row.scaled for row in rows):
        kinds.append(("scaled from fewer modules", "o", False))
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            color=theme.faint,
            markerfacecolor=theme.faint if filled else theme.paper,
        )
        for _, marker, filled in kinds
    ]
    legend(made, handles, [name for name, _, _ in kinds], theme)
    return made


def _known(row: Row) -> bool:
    return row.kind != "limit" and row.error is not None and math.isfinite(row.error)


def _colours(rows: Sequence[Row], theme: Theme) -> list[str]:
    """One for FastAgg, one each for the baselines."""
    own, *others = theme.series
    baselines = [row for row in rows if row.kind != "fastagg"]
    return [own if row.kind == "fastagg" else others[baselines.index(row) % len(others)] for row in rows]


def _apart(heights: Sequence[float]) -> list[float]:
    """Places of labels in the order of their points, none nearer to the next than the gap: pushed up
    from the lowest, then down again from the top."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + _GAP)
    top = 1.0
    for place in reversed(order):
        placed[place] = min(placed[place], top)
        top = placed[place] - _GAP
    return placed
