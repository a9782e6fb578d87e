"""How many times faster FastAgg is than each baseline, one case a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastagg.bench.durations import format_seconds
from fastagg.bench.growth import headline
from fastagg.bench.noise import noise_of, noise_of_pair
from fastagg.bench.plotting.frame import figure, heading, legend, log_scale, times
from fastagg.bench.record import Record, Row
from fastagg.plot_style import LIGHT, Theme, plain

__all__ = ["speed_up_figure"]

# Its rows are what a program starts with: none of them does another's work.
_NO_CONTEST = "import"

_FASTER, _SLOWER, _SAME = "FastAgg is faster", "FastAgg is slower", "no more than noise"
_SCALED = "baseline scaled from fewer modules"
_HATCH = "/////"


@dataclass(frozen=True)
class _Group:
    """An op: FastAgg's row and the baselines beside it."""

    own: Row
    baselines: tuple[Row, ...]


def speed_up_figure(record: Record, case: str, theme: Theme = LIGHT) -> Figure | None:
    """A group of bars an op, a bar a baseline, from 1 to the ratio of the medians."""
    groups = _groups(record, case)
    if not groups:
        return None
    lines = sum(1 + len(group.baselines) for group in groups)
    made, axes = figure(theme, 1.4 + 0.19 * lines)
    colours = {_FASTER: theme.series[0], _SLOWER: theme.series[1], _SAME: theme.faint}
    _scale(axes, [row.seconds / group.own.seconds for group in groups for row in group.baselines])
    names: list[str] = []
    seen: dict[str, None] = {}
    for group in groups:
        _headline(axes, group.own, len(names), theme)
        names.append(plain(group.own.op))
        for row in group.baselines:
            found = _verdict(record, group.own, row)
            seen |= {found: None} | ({_SCALED: None} if row.scaled else {})
            _bar(axes, len(names), row.seconds / group.own.seconds, colours[found], row.scaled, theme)
            names.append(plain(row.contender, longest=40))
    axes.axvline(1, color=theme.ink, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelsize=8)
    labels_of_axis = axes.get_yticklabels()
    for place in _places_of_heads(groups):
        labels_of_axis[place].set_fontweight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel("baseline's time over FastAgg's (medians)")
    heading(made, f"FastAgg beside its baselines: {plain(case)}", record, theme)
    handles: list[Artist] = [Patch(color=colour) for name, colour in colours.items() if name in seen]
    labels = [name for name in colours if name in seen]
    if _SCALED in seen:
        handles.append(Patch(facecolor=theme.faint, edgecolor=theme.paper, hatch=_HATCH))
        labels.append(_SCALED)
    legend(made, handles, labels, theme)
    return made


def _groups(record: Record, case: str) -> list[_Group]:
    found = []
    for op in dict.fromkeys(row.op for row in record.rows if row.case == case):
        rows = record.of(case, op)
        own = headline(rows)
        baselines = tuple(row for row in rows if row.kind == "baseline")
        if own is not None and baselines and op != _NO_CONTEST:
            found.append(_Group(own, baselines))
    return found


def _places_of_heads(groups: Sequence[_Group]) -> list[int]:
    places, place = [], 0
    for group in groups:
        places.append(place)
        place += 1 + len(group.baselines)
    return places


def _verdict(record: Record, own: Row, other: Row) -> str:
    ratio = other.seconds / own.seconds
    noise = noise_of_pair(noise_of(own, record), noise_of(other, record))
    if max(ratio, 1 / ratio) <= 1 + noise:
        return _SAME
    return _FASTER if ratio > 1 else _SLOWER


def _scale(axes: Axes, ratios: Sequence[float]) -> None:
    """From the least ratio to the greatest, with room for their labels, and 1 always in it."""
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    room = max((high / low) ** 0.14, 1.25)
    axes.set_xlim(low / (room if low < 1 else room**0.3), high * room)
    log_scale(axes.xaxis, times)


def _headline(axes: Axes, own: Row, place: int, theme: Theme) -> None:
    text = f"{plain(own.contender, longest=40)}: {format_seconds(own.seconds)}"
    axes.annotate(
        text + (" (scaled)" if own.scaled else ""),
        (1, place),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=theme.faint,
    )


def _bar(axes: Axes, place: int, ratio: float, colour: str, scaled: bool, theme: Theme) -> None:
    axes.barh(
        place,
        ratio - 1,
        left=1,
        height=0.72,
        color=colour,
        hatch=_HATCH if scaled else None,
        edgecolor=theme.paper if scaled else colour,
        linewidth=0,
    )
    axes.annotate(
        times(ratio),
        (ratio, place),
        (3 if ratio >= 1 else -3, 0),
        textcoords="offset points",
        ha="left" if ratio >= 1 else "right",
        va="center",
        fontsize=7.5,
        color=theme.ink,
    )
