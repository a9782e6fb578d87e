"""The losses of runs, one over another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastagg.federated.report.recorded_run import RecordedRun
from fastagg.federated.report.run_summary import quartiles
from fastagg.plot_style import (
    LIGHT,
    LINES,
    MARKERS,
    LineStyle,
    Theme,
    legend,
    panels,
    title,
    whole_rounds,
)

# Bands of more runs lie one over another until no colour is left; their bars stand side by side.
_BANDS = 3


def loss_figure(runs: Sequence[RecordedRun], theme: Theme = LIGHT) -> Figure | None:
    """Held-out loss by round: a line a run, a colour a method, a band the middle half of clients, or a
    bar where there are many runs."""
    shown = [run for run in runs if any(row.loss is not None for row in run.rounds)]
    if not shown:
        return None
    figure, (axes,) = panels(theme, 3.5)
    handles: list[Artist] = []
    spread = False
    methods = list(dict.fromkeys(run.method for run in shown))
    drawn = dict.fromkeys(methods, 0)
    banded = len(shown) <= _BANDS
    for number, run in enumerate(shown):
        place = methods.index(run.method)
        colour = theme.series[place % len(theme.series)]
        marker = MARKERS[place % len(MARKERS)]
        line = LINES[drawn[run.method] % len(LINES)]
        drawn[run.method] += 1
        spread |= (
            _band(axes, run, colour) if banded else _bars(axes, run, colour, number, len(shown))
        )
        _global_loss(axes, run, colour, marker, line)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, linestyle=line))
    labels = methods if len(methods) == len(shown) else [_named(run) for run in shown]
    if spread and banded:
        handles += [
            Line2D([], [], color=theme.faint, linestyle=(0, (4, 2)), linewidth=1),
            Patch(facecolor=theme.faint, alpha=0.3),
        ]
        labels = [*labels, "median client", "middle half of clients"]
    elif spread:
        handles.append(Line2D([], [], color=theme.faint, marker="|", markersize=9, linestyle="none"))
        labels = [*labels, "middle half of clients"]
    # Also where only a loss that is no number stands.
    last = max(row.round for run in shown for row in run.rounds)
    axes.set_xlim(-0.04 * max(last, 1), 1.04 * max(last, 1))
    whole_rounds(axes)
    axes.set_ylabel("held-out loss (nats a token)")
    title(axes, "Loss by round", theme)
    legend(figure, handles, labels, theme)
    return figure


def _named(run: RecordedRun) -> str:
    return run.label if run.method in run.label else f"{run.label} ({run.method})"


def _global_loss(axes: Axes, run: RecordedRun, colour: str, marker: str, line: LineStyle) -> None:
    rows = [(row.round, row.loss) for row in run.rounds if row.loss is not None]
    finite = [(number, loss if math.isfinite(loss) else math.nan) for number, loss in rows]
    every = max(1, len(finite) // 15)
    axes.plot(
        *_columns(finite), color=colour, marker=marker, markersize=4, markevery=every, linestyle=line
    )
    diverged = [number for number, loss in rows if not math.isfinite(loss)]
    if diverged:
        axes.text(diverged[0], 0.985, "NaN", color=colour, fontsize=8, ha="center", va="top",
                  fontweight="bold", transform=axes.get_xaxis_transform())  # fmt: skip


def _band(axes: Axes, run: RecordedRun, colour: str) -> bool:
    """The spread over clients; whether there is any."""
    losses = run.held_out_losses()
    if max(map(len, losses.values()), default=0) < 2:
        return False
    rounds = list(losses)
    low, middle, high = np.array([quartiles(values) for values in losses.values()]).T
    if len(rounds) == 1:  # a band has no width there
        axes.errorbar(rounds, middle, yerr=[middle - low, high - middle], color=colour,
                      alpha=0.5, capsize=5, fmt="_")  # fmt: skip
        return True
    axes.fill_between(rounds, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(rounds, middle, color=colour, linestyle=(0, (4, 2)), linewidth=1, alpha=0.8)
    return True


def _bars(axes: Axes, run: RecordedRun, colour: str, number: int, runs: int) -> bool:
    """The spread over clients as one of ``runs`` bars beside each other; whether there is any."""
    losses = run.held_out_losses()
    if max(map(len, losses.values()), default=0) < 2:
        return False
    every = math.ceil(len(losses) / 10)  # of more rounds the bars would touch
    rounds = list(losses)[::-1][::every]
    low, _, high = np.array([quartiles(losses[each]) for each in rounds]).T
    beside = 0.5 * every * ((number + 0.5) / runs - 0.5)
    axes.vlines(np.array(rounds) + beside, low, high, color=colour, linewidth=1.6, alpha=0.45)
    return True


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
