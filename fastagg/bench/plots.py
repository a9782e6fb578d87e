"""The plots of a record: which there are, and their files.

    speed-up-CASE.png      how many times faster FastAgg is than each baseline, op by op
    time-SERIES-OP.png     time along a series, with the fitted exponent
    memory-SERIES-OP.png   memory likewise
    roofline.png           rates beside what copies and products reach
    error-time-CASE.png    svd: the error of each contender against its time
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from fastagg.bench.growth import growth
from fastagg.bench.plotting.error_time import error_time_figure
from fastagg.bench.plotting.growth_lines import memory_figure, time_figure
from fastagg.bench.plotting.roofline import roofline_figure
from fastagg.bench.plotting.speed_up import speed_up_figure
from fastagg.bench.record import Record
from fastagg.plot_style import png
from fastagg.whole_file import whole_file

__all__ = ["draw"]


def draw(record: Record, out: Path) -> list[Path]:
    """Draws all that the record has rows for into `out`, a PNG each, written whole or not at all.

    Returns:
        The files, in the order of drawing.

    Raises:
        OSError: one cannot be written.
    """
    written = []
    for name, figure in _figures(record):
        if figure is not None:
            path = out / f"{_file_name(name)}.png"
            with whole_file(path) as made:
                made.write_bytes(png(figure))
            written.append(path)
    return written


def _figures(record: Record) -> Iterator[tuple[str, Figure | None]]:
    grown = growth(record)
    in_series = {case.name for each in grown for case in each.series.cases}
    # A case of a series stands for itself where too little of its series was measured.
    cases = [case for case in dict.fromkeys(row.case for row in record.rows) if case not in in_series]
    for case in cases:
        yield f"speed-up-{case}", speed_up_figure(record, case)
    for each in grown:
        yield f"time-{each.series.name}-{each.op}", time_figure(record, each)
        yield f"memory-{each.series.name}-{each.op}", memory_figure(record, each)
    yield "roofline", roofline_figure(record)
    for case in cases:
        yield f"error-time-{case}", error_time_figure(record, case)


def _file_name(name: str) -> str:
    """Names of cases and ops come from a file: none may lead out of the folder."""
    return re.sub(r"[^\w.-]", "-", name)
