"""How plots look: one size, one font, colours that all readers can tell apart, on light or dark.

Figures are made by matplotlib's objects and never through pyplot, whose state is global.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Two such figures stand beside one another on a page or a screen: 9 pt text stays readable there.
WIDTH = 4.8  # inches
DOTS_PER_INCH = 200


@dataclass(frozen=True)
class Theme:
    """Colours; `series` is after the palette for the colour-blind of Okabe and Ito (2008), its
    too pale ones darkened."""

    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2430",
    faint="#8a93a0",
    grid="#e3e6ea",
    series=("#0072b2", "#d55e00", "#009e73", "#b0578d", "#4aa3df", "#d99a00", "#5c5c5c"),
)
DARK = Theme(
    paper="#171b21",
    ink="#e6e9ee",
    faint="#8d96a3",
    grid="#2c323b",
    series=("#4ba6e3", "#f58a4b", "#2cc495", "#e59bc8", "#a3d8f7", "#f0bc4e", "#b8bec7"),
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LineStyle = Literal["-", "--", ":", "-."]
LINES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")


def panels(theme: Theme, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels, one below the other, over one horizontal axis.

    Args:
        height: inches.
    """
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
    figure.set_facecolor(theme.paper)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    made: list[Axes] = []
    for row in range(rows):
        axes = figure.add_subplot(rows, 1, row + 1, sharex=made[0] if made else None)
        dress(axes, theme)
        axes.tick_params(labelbottom=row == rows - 1)
        made.append(axes)
    return figure, made


def dress(axes: Axes, theme: Theme) -> None:
    """Colours and grid of a panel."""
    axes.set_facecolor(theme.paper)
    axes.set_axisbelow(True)
    axes.grid(True, color=theme.grid, linewidth=0.7)
    axes.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=8.5, which="both")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set_color(theme.faint)
        spine.set_visible(side in ("left", "bottom"))


def title(axes: Axes, text: str, theme: Theme) -> None:
    """A title at the left, of what is shown."""
    axes.set_title(text, loc="left", fontsize=10, color=theme.ink, fontweight="bold")


def whole_rounds(axes: Axes) -> None:
    """Rounds on the horizontal axis: whole numbers."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def bytes_axis(axes: Axes, largest: float) -> None:
    """Bytes on the vertical axis, in the unit in which the largest is at least 1."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while largest >= 1024 ** (power + 1) and power + 1 < len(units):
        power += 1
    axes.set_ylabel(f"{units[power]} a round")
    # Ticks at round numbers of the unit, not of bytes.
    axes.yaxis.set_major_locator(_Multiples(1024**power))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024**power:g}"))


class _Multiples(MaxNLocator):
    """Good ticks for values / unit."""

    def __init__(self, unit: float) -> None:
        super().__init__(nbins=5, steps=[1, 2, 2.5, 5, 10])
        self._unit = unit

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return [tick * self._unit for tick in super().tick_values(vmin / self._unit, vmax / self._unit)]


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], theme: Theme) -> None:
    """Below the axes, where it covers no data."""
    shown = [plain(label) for label in labels]
    longest = max(map(len, shown), default=0)
    made = figure.legend(
        list(handles),
        shown,
        loc="outside lower center",
        ncols=max(1, min(len(shown), 4, 64 // (longest + 6))),
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.ink,
        handlelength=1.8,
        columnspacing=1.4,
    )
    made.set_in_layout(True)


def plain(name: str, longest: int = 28) -> str:
    """A name from outside as text of a plot: one line, cut in its middle, no formulas, never hidden."""
    text = "".join(each if each.isprintable() else " " for each in name)
    text = " ".join(text.split()) or "?"
    if len(text) > longest:
        half = (longest - 1) // 2
        text = f"{text[: longest - 1 - half]}…{text[-half:]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # a legend leaves out what starts so


def png(figure: Figure) -> bytes:
    """The picture; equal figures give equal bytes."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return file.getvalue()
