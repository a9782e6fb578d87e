"""What all plots of a record share: the size, the heading with the machine, the scales, the legend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from fastagg.bench.durations import format_seconds
from fastagg.bench.record import Record
from fastagg.plot_style import Theme, panels, plain

__all__ = [
    "TIME_PER_RUN",
    "bytes_scale",
    "figure",
    "heading",
    "legend",
    "log_scale",
    "power_of_ten",
    "seconds_scale",
    "times",
]

WIDTH = 6.0  # inches: names of baselines are long
TIME_PER_RUN = "median time of a run"

_SMALL, _LETTERS_A_LINE = 6.5, 118  # points, and how many letters of that size fit into the width
_LEFT = 0.1  # inches

_BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def figure(theme: Theme, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel. `height` in inches."""
    made, (axes,) = panels(theme, height)
    made.set_size_inches(WIDTH, height)
    return made, axes


def heading(
    made: Figure, text: str, record: Record, theme: Theme, notes: Sequence[str] = ()
) -> None:
    """At the top, over the whole width: the title, what is to be known of the plot, and small where and
    how it was measured. The panel gets what is left."""
    measured = textwrap.wrap(_measured(record), _LETTERS_A_LINE)
    lines = [
        (text, 10.0, theme.ink, "bold"),
        *((note, 8.0, theme.ink, "normal") for note in notes),
        *((_one_line(line), _SMALL, theme.faint, "normal") for line in measured),
    ]
    width, height = made.get_size_inches()
    top = height - 0.08
    for line, points, colour, weight in lines:
        made.text(
            _LEFT / width,
            top / height,
            line,
            fontsize=points,
            color=colour,
            fontweight=weight,
            va="top",
            in_layout=False,
        )
        top -= points / 72 * 1.5
    engine = made.get_layout_engine()
    engine.set(rect=(0, 0, 1, top / height - 0.005))  # type: ignore[union-attr, call-arg]


def _measured(record: Record) -> str:
    machine, settings = record.machine, record.settings
    threads = "thread" if settings.threads == 1 else "threads"
    where = machine.gpu or f"{machine.cpu} ({machine.capability}), {settings.threads} {threads}"
    whole = "" if record.complete else "; an incomplete record"
    return (
        f"{where}; torch {machine.torch}; factors {settings.dtype}, {settings.factors}; "
        f"{settings.effort} effort; {machine.date}{whole}"
    )


def _one_line(text: str) -> str:
    """A line from a record, whole."""
    return plain(text, longest=10 * _LETTERS_A_LINE)


def log_scale(axis: Axis, name: Callable[[float], str], base: float = 10.0) -> None:
    """A logarithmic axis, its ticks named by `name`. A short axis gets ticks between the powers."""
    upright = isinstance(axis, YAxis)  # labels above one another need less room
    set_scale = axis.axes.set_yscale if upright else axis.axes.set_xscale
    set_scale("log", base=base)
    low, high = sorted(axis.get_view_interval())
    between: tuple[float, ...] = (1.0,)
    if base == 10 and high < 4 * low:
        between = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    elif base == 10 and high < (1000 if upright else 200) * low:
        between = (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=base, subs=between, numticks=9 if upright else 6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def seconds_scale(axis: Axis) -> None:
    """Seconds, logarithmic."""
    log_scale(axis, format_seconds)


def bytes_scale(axis: Axis) -> None:
    """Bytes, logarithmic, in powers of 2."""
    log_scale(axis, _binary, base=2.0)


def _binary(count: float) -> str:
    for size, unit in _BINARY:
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def power_of_ten(value: float) -> str:
    """A tick of a wide scale without a unit: small ones as they are, others as powers."""
    if 0.01 <= value < 10_000:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    front = value / 10.0**power
    return rf"$10^{{{power}}}$" if abs(front - 1) < 1e-6 else rf"${front:g}\cdot10^{{{power}}}$"


def times(ratio: float) -> str:
    """A ratio for people, to two or three digits: "4.5×"."""
    if ratio != 1 and abs(ratio - 1) < 0.1:
        return f"{ratio:.2f}×"
    if ratio < 100:
        return f"{ratio:.2g}×" if ratio < 99.5 else "100×"
    digits = math.floor(math.log10(ratio))
    return f"{round(ratio, 2 - digits):,.0f}×"


def legend(
    made: Figure,
    handles: Sequence[Artist],
    labels: Sequence[str],
    theme: Theme,
    caption: str | None = None,
) -> None:
    """Below the axes; names of contenders are not cut, but where they are longer than any of ours."""
    shown = [plain(label, longest=44) for label in labels]
    box = made.legend(
        list(handles),
        shown,
        loc="outside lower center",
        ncols=_columns([len(label) for label in shown]),
        frameon=False,
        fontsize=8,
        labelcolor=theme.ink,
        handlelength=2.4,
        columnspacing=1.4,
        title=caption,
        title_fontsize=8,
    )
    box.get_title().set_color(theme.ink)
    box.set_in_layout(True)


def _columns(lengths: Sequence[int]) -> int:
    """As many as fit beside each other; a column is as wide as its longest label and a handle."""
    for columns in range(len(lengths), 1, -1):
        # As matplotlib fills them: one below the other, the first columns one longer.
        least, longer = divmod(len(lengths), columns)
        rows = [least + (place < longer) for place in range(columns)]
        ends = [sum(rows[: place + 1]) for place in range(columns)]
        widths = [max(lengths[end - count : end]) + 7 for end, count in zip(ends, rows, strict=True)]
        if sum(widths) <= 100:
            return columns
    return 1
