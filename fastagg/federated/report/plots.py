"""What a run looks like: one figure a function, from what its folder holds.

A function gives None where the run has nothing of what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from fastagg.federated.report.loss_plot import loss_figure
from fastagg.federated.report.metrics import Seconds
from fastagg.federated.report.recorded_run import RecordedRun
from fastagg.plot_style import (
    LIGHT,
    LINES,
    LineStyle,
    Theme,
    bytes_axis,
    dress,
    legend,
    panels,
    plain,
    png,
    title,
    whole_rounds,
)

# Of more rounds than these, bars are too thin to see.
_BARS = 40


@dataclass(frozen=True)
class Plot:
    """A figure of a run: its file name, what it shows, and how it is drawn."""

    name: str
    caption: str
    draw: Callable[[RecordedRun, Theme], Figure | None]


def spectra_figure(run: RecordedRun, theme: Theme = LIGHT) -> Figure | None:
    """Singular values of each module's dW, and the share of |dW|^2 that each rank keeps."""
    if run.spectra is None:
        return None
    number, spectra = run.spectra
    kinds: dict[str, list[np.ndarray]] = {}
    for module, values in spectra.modules.items():
        spectrum = np.asarray(values, dtype=np.float64)
        if spectrum.size and np.isfinite(spectrum).all() and spectrum[0] > 0:
            kinds.setdefault(module.rpartition(".")[2], []).append(spectrum)
    if not kinds:
        return None
    figure, (values_axes, kept_axes) = panels(theme, 4.6, rows=2)
    handles: list[Artist] = []
    lowest = 1.0
    opacity = max(0.15, min(0.8, 20 / sum(map(len, kinds.values()))))
    for place, members in enumerate(kinds.values()):
        colour = theme.series[place % len(theme.series)]
        line = LINES[place // len(theme.series) % len(LINES)]
        for spectrum in members:
            relative = spectrum / spectrum[0]
            ranks = np.arange(1, len(relative) + 1)
            kept = np.cumsum(relative**2) / np.sum(relative**2)
            positive = np.where(relative > 0, relative, np.nan)
            marker = "o" if len(ranks) == 1 else ""
            for axes, heights in ((values_axes, positive), (kept_axes, kept)):
                axes.plot(ranks, heights, color=colour, linestyle=line, marker=marker,
                          markersize=4, linewidth=1.0, alpha=opacity)  # fmt: skip
            lowest = min(lowest, float(relative[relative > 1e-7].min()))
        if opacity < 0.5:  # too many lines to follow one
            _median_of_kind((values_axes, kept_axes), members, colour, line)
        handles.append(Line2D([], [], color=colour, linestyle=line))
    _ranks_of_clients(run, (values_axes, kept_axes), theme)
    values_axes.set_yscale("log")
    values_axes.set_ylim(lowest / 1.5, 1.6)  # rounding dust far below says nothing
    values_axes.set_ylabel("singular value / largest")
    kept_axes.set_ylabel("share of |dW|² kept")
    kept_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    kept_axes.set_ylim(None, 1.03)
    kept_axes.set_xscale("log", base=2)
    kept_axes.xaxis.set_major_locator(LogLocator(base=2, numticks=14))
    kept_axes.xaxis.set_minor_locator(NullLocator())
    kept_axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    kept_axes.set_xlabel("rank (dotted: ranks of clients)")
    title(values_axes, f"Spectra of dW by module, round {number}", theme)
    legend(figure, handles, list(kinds), theme)
    return figure


def _median_of_kind(
    all_axes: Sequence[Axes], members: Sequence[np.ndarray], colour: str, line: LineStyle
) -> None:
    """The median over the modules of a kind, above their own lines."""
    length = max(map(len, members))
    # What follows a module's last singular value are zeros.
    whole = [np.pad(spectrum / spectrum[0], (0, length - len(spectrum))) for spectrum in members]
    energies = [np.cumsum(spectrum**2) / np.sum(spectrum**2) for spectrum in whole]
    for axes, curves in zip(all_axes, (whole, energies), strict=True):
        middle = np.median(curves, axis=0)
        axes.plot(
            np.arange(1, length + 1),
            np.where(middle > 0, middle, np.nan),
            color=colour,
            linestyle=line,
            linewidth=1.6,
            zorder=3,
        )


def _ranks_of_clients(run: RecordedRun, all_axes: Sequence[Axes], theme: Theme) -> None:
    ranks = sorted({row.rank for row in run.clients if row.rank is not None and row.rank > 0})
    for axes in all_axes:
        for rank in ranks:
            axes.axvline(rank, color=theme.ink, linestyle=":", linewidth=0.9, alpha=0.6, zorder=0.5)


def similarity_figure(run: RecordedRun, theme: Theme = LIGHT) -> Figure | None:
    """Cosines between the clients' updates; the diagonal, which is 1, is left blank."""
    if run.similarity is None or len(run.similarity[1].clients) < 2:
        return None
    number, similarity = run.similarity
    cosine = np.array(similarity.cosine, dtype=np.float64)  # None becomes NaN
    cosine[~np.isfinite(cosine)] = np.nan
    np.fill_diagonal(cosine, np.nan)
    count = len(cosine)
    known = np.abs(cosine[np.isfinite(cosine)])
    # A scale of its own: the clients differ among themselves by far less than 1.
    limit = float(known.max()) if known.size and known.max() > 0 else 1.0
    figure, (axes,) = panels(theme, 4.1)
    dress(axes, theme)
    axes.grid(False)
    axes.set_facecolor(theme.grid)
    image = axes.imshow(cosine, cmap=matplotlib.colormaps["PuOr_r"], vmin=-limit, vmax=limit)
    step = max(1, math.ceil(count / 24))
    ticks = range(0, count, step)
    names = [plain(similarity.clients[tick], longest=18) for tick in ticks]
    size = 8.5 if count <= 12 else 6.5
    axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    if count <= 10:
        for row, column in np.argwhere(np.isfinite(cosine)):
            value = cosine[row, column]
            ink = "#ffffff" if abs(value) > 0.65 * limit else "#1c2430"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    dress(bar.ax, theme)
    bar.ax.grid(False)
    bar.set_label("cosine of updates", color=theme.ink, fontsize=9)
    bar.outline.set_visible(False)
    title(axes, f"Similarity of clients, round {number}", theme)
    return figure


def seconds_figure(run: RecordedRun, theme: Theme = LIGHT) -> Figure | None:
    """Where the seconds of each round go, and the share that aggregation takes of them."""
    rows = [row for row in run.trained if row.seconds.total > 0]
    if not rows:
        return None
    figure, (bars, share) = panels(theme, 4.3, rows=2)
    rounds = [row.round for row in rows]
    bottom = np.zeros(len(rows))
    handles: list[Artist] = []
    phases = tuple(Seconds.model_fields)
    colours = dict(zip(("train", "aggregate", "evaluate", "other"), theme.series, strict=False))
    colours["other"] = theme.faint
    width = 0.75 if len(rows) <= _BARS else 1.0
    for phase in phases:
        seconds = np.array([getattr(row.seconds, phase) for row in rows])
        made = bars.bar(rounds, seconds, bottom=bottom, width=width, color=colours[phase])
        handles.append(made.patches[0])
        bottom += seconds
    bars.set_ylabel("seconds a round")
    shares = [row.seconds.aggregate / row.seconds.total for row in rows]
    middle = float(np.median(shares))
    marker = "o" if len(rows) <= _BARS else ""
    share.plot(rounds, shares, color=colours["aggregate"], marker=marker, markersize=3.5)
    share.axhline(middle, color=theme.faint, linestyle="--", linewidth=1)
    share.set_ylim(0, max(max(shares) * 1.25, 1e-6))
    share.yaxis.set_major_locator(MaxNLocator(4))
    share.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    share.set_ylabel("share of aggregation")
    whole_rounds(share)
    _room_for_few(share, rounds)
    title(bars, f"Time by phase (aggregation: {100 * middle:.2g}%)", theme)
    legend(figure, handles, phases, theme)
    return figure


def bytes_figure(run: RecordedRun, theme: Theme = LIGHT) -> Figure | None:
    """Bytes from and to all clients, by round."""
    rows = [row for row in run.rounds if row.bytes_up or row.bytes_down]
    if not rows:
        return None
    figure, (axes,) = panels(theme, 3.2)
    rounds = np.array([row.round for row in rows], dtype=np.float64)
    up, down = [row.bytes_up for row in rows], [row.bytes_down for row in rows]
    handles: list[Artist] = []
    for side, heights, colour in ((-0.2, up, theme.series[0]), (0.2, down, theme.series[1])):
        if len(rows) <= _BARS:
            axes.bar(rounds + side, heights, width=0.38, color=colour)
        else:
            line: LineStyle = "-" if side < 0 else "--"  # both are seen where they coincide
            axes.step(rounds, heights, where="mid", color=colour, linestyle=line)
        handles.append(Patch(color=colour))
    axes.set_ylim(0, None)
    bytes_axis(axes, max(*up, *down))
    whole_rounds(axes)
    title(axes, "Bytes moved by round, all clients together", theme)
    _room_for_few(axes, rounds)
    labels = ("up: clients to server", "down: server to clients")
    legend(figure, handles, labels, theme)
    return figure


def _room_for_few(axes: Axes, rounds: Sequence[float] | np.ndarray) -> None:
    """Keeps the bars of one round or two from filling the figure."""
    middle, half = (rounds[0] + rounds[-1]) / 2, max((rounds[-1] - rounds[0]) / 2 + 0.6, 2.0)
    axes.set_xlim(middle - half, middle + half)
    if len(rounds) < 4:
        axes.set_xticks(rounds)


PLOTS = (
    Plot(
        "loss",
        "Held-out loss by round, over all held-out examples; the band: the middle half of the clients.",
        lambda run, theme: loss_figure([run], theme),
    ),
    Plot(
        "spectra",
        "Singular values of each module's dW over its largest, and the share of |dW|² that its best "
        "approximation of each rank keeps; a line a module, a colour a kind, of many also their median.",
        spectra_figure,
    ),
    Plot(
        "similarity",
        "Cosines between the clients' updates over all modules; grey: the diagonal, or no update.",
        similarity_figure,
    ),
    Plot("seconds", "Seconds of each round by phase, and the share of aggregation.", seconds_figure),
    Plot("bytes", "Bytes that all clients sent and received.", bytes_figure),
)


class Gallery:
    """Pictures of runs, each drawn once however many pages show it."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[Path, str, Theme], bytes | None] = {}

    def picture(self, plot: Plot, run: RecordedRun, theme: Theme) -> bytes | None:
        """A PNG; None where the run has nothing of what the plot shows."""
        key = (run.folder, plot.name, theme)
        if key not in self._drawn:
            figure = plot.draw(run, theme)
            self._drawn[key] = None if figure is None else png(figure)
        return self._drawn[key]


def write_plots(run: RecordedRun, folder: Path, gallery: Gallery | None = None) -> Mapping[str, Path]:
    """Draws all that the run has into `folder`, a PNG each; plot name -> file.

    Raises:
        OSError: cannot be written.
    """
    gallery = gallery or Gallery()
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for plot in PLOTS:
        picture = gallery.picture(plot, run, LIGHT)
        if picture is not None:
            written[plot.name] = folder / f"{plot.name}.png"
            written[plot.name].write_bytes(picture)
    return written
