"""The plots of a record: which are drawn, what they show, that nothing is cut off or covered."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

import matplotlib
import numpy as np
from made_records import limit, record, row, series_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typer.testing import CliRunner

from fastagg.bench.growth import growth
from fastagg.bench.plots import draw
from fastagg.bench.plotting.error_time import FLOOR, error_time_figure
from fastagg.bench.plotting.growth_lines import memory_figure, time_figure
from fastagg.bench.plotting.roofline import roofline_figure
from fastagg.bench.plotting.speed_up import speed_up_figure
from fastagg.bench.rates import rates
from fastagg.bench.record import Record, Row, write_record
from fastagg.cli.app import app

CASE = "tinyllama-qv-10"


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def model_rows(case: str = CASE) -> list[Row]:
    """Two ops of one case, with limits."""
    return [
        row("fastagg auto", 1e-3, case=case, error=1e-18, wide_flops=5e8),
        row("fastagg qr", 2e-3, case=case, error=1e-14),
        row("dense", 20e-3, case=case, error=1e-4, timed_modules=4),
        row("cat", 0.5e-3, case=case, error=2e-12),
        row("mul", 1.01e-3, case=case, error=3e-12),
        limit(case=case, bytes=8e6, seconds=1e-3),
        limit("matrix product", 1e-3, case=case, flops=2e8),
        limit("float64 product", 1e-3, case=case, wide_flops=1e8),
        row("fastagg stack_", 1e-3, case=case, op="stack", flops=0.0),
        row("cat, then multiply", 3e-3, case=case, op="stack", flops=0.0),
    ]


def along(series: str, op: str = "svd") -> list[Row]:
    """Three contenders of which one is linear."""
    powers = {"fastagg auto": 1.0, "fastagg qr": 1.5, "dense": 2.0}
    return [
        each
        for contender, power in powers.items()
        for each in series_rows(
            series,
            lambda given, power=power: 1e-3 * (given / 1e5) ** power,  # type: ignore[misc]
            lambda given, power=power: round(1e5 * (given / 1e5) ** power),  # type: ignore[misc]
            contender=contender,
            op=op,
        )
    ]


def whole_record() -> Record:
    rows = model_rows() + [
        each for series in ("square", "ranks", "clients") for each in along(series)
    ]
    return record(rows)


def figures(made: Record, case: str = CASE) -> list[Figure]:
    drawn = [speed_up_figure(made, case), roofline_figure(made), error_time_figure(made, case)]
    for each in growth(made):
        drawn += [time_figure(made, each), memory_figure(made, each)]
    return [each for each in drawn if each is not None]


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_all_that_a_record_has_is_drawn(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    written = draw(whole_record(), tmp_path / "new" / "plots")
    names = [path.name for path in written]
    assert names == [
        f"speed-up-{CASE}.png",
        *(f"{what}-{s}-svd.png" for s in ("square", "ranks", "clients") for what in ("time", "memory")),
        "roofline.png",
        f"error-time-{CASE}.png",
    ]
    assert {path.name for path in (tmp_path / "new" / "plots").iterdir()} == set(names)
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 1000 and height >= 300
    assert dict(matplotlib.rcParams) == before
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in draw(whole_record(), tmp_path / "new" / "plots")] == first


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], []),
        ([limit()], []),
        ([row(flops=0.0, error=None)], []),
        ([row(flops=0.0), row("dense", flops=0.0, error=None)], ["speed-up", "error-time"]),
        ([row(op="merge"), limit(op="merge")], ["roofline"]),
        # A program's start is no work that another does.
        ([row("import fastagg", op="import", flops=0.0), row("import torch", op="import")], []),
        (series_rows("square", lambda given: given, lambda given: None, flops=0.0), ["time"]),
    ],
)
def test_nothing_is_drawn_of_what_a_record_lacks(
    tmp_path: Path, rows: list[Row], names: list[str]
) -> None:
    written = draw(record(rows), tmp_path / "plots")
    drawn = [path.name.removesuffix(".png") for path in written]
    assert len(drawn) == len(names)
    assert all(each.startswith(name) for each, name in zip(drawn, names, strict=True))


def test_a_case_of_a_series_that_was_not_measured_stands_for_itself(tmp_path: Path) -> None:
    written = draw(record(model_rows("square-1024")), tmp_path)
    assert [path.name for path in written] == [
        "speed-up-square-1024.png", "roofline.png", "error-time-square-1024.png",
    ]  # fmt: skip


def test_bars_are_the_ratios_of_the_medians() -> None:
    figure = speed_up_figure(record(model_rows()), CASE)
    assert figure is not None
    (axes,) = figure.axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([20, 0.5, 1.01, 3])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["svd", "dense", "cat", "mul", "stack", "cat, then multiply"]
    assert [bar.get_hatch() is not None for bar in axes.patches] == [True, False, False, False]
    faster, slower, same, again = (bar.get_facecolor() for bar in axes.patches)
    assert faster == again and len({faster, slower, same}) == 3
    assert legend_of(figure) == [
        "FastAgg is faster", "FastAgg is slower", "no more than noise",
        "baseline scaled from fewer modules",
    ]  # fmt: skip
    assert any(set(drawn.get_xdata()) == {1} for drawn in axes.lines)


def test_lines_of_a_series_have_their_exponents() -> None:
    rows = along("square")
    # The largest was too slow for all modules of the case.
    rows[-1] = rows[-1].model_copy(update={"modules": 8})
    made = record(rows)
    (found,) = growth(made)
    for figure, what in ((time_figure(made, found), "time"), (memory_figure(made, found), "memory")):
        assert figure is not None
        (axes,) = figure.axes
        assert axes.get_xscale() == axes.get_yscale() == "log"
        own = axes.lines[0]
        assert list(own.get_xdata()) == [256, 512, 1024, 2048, 4096, 8192]
        bytes_in = np.array([point.bytes_in for point in found.headline.points])
        np.testing.assert_allclose(own.get_ydata(), (1e-3 if what == "time" else 1e5) * bytes_in / 1e5)
        assert [line.get_linestyle() for line in axes.lines[:3]] == ["-", "-", "--"]
        labels = legend_of(figure)
        assert labels[:3] == ["fastagg auto (1.00)", "fastagg qr (1.50)", "dense (2.00)"]
        assert "scaled from fewer modules" in labels
        assert any(f"{what} $\\propto$" in text.get_text() for text in figure.texts)
    bars = time_figure(made, found).axes[0].collections[0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars] == [(p.low, p.high) for p in found.headline.points]


def test_a_peak_of_nothing_is_a_gap() -> None:
    rows = series_rows("ranks", lambda given: given, lambda given: int(given))
    rows[1] = rows[1].model_copy(update={"peak_bytes": 0})
    rows[2] = rows[2].model_copy(update={"peak_bytes": None})
    made = record(rows)
    figure = memory_figure(made, growth(made)[0])
    assert figure is not None
    heights = np.asarray(figure.axes[0].lines[0].get_ydata(), float)
    assert np.isnan(heights).tolist() == [False, True, True, False, False, False]


def test_the_roofs_are_the_rates_of_the_limits() -> None:
    rows = [*model_rows(), limit(bytes=2.4e7, seconds=1e-3), limit(bytes=9e9, seconds=1e-3)]
    # A sum of parts moves bytes, but is no copy.
    rows.append(limit("read, kernels, write: the sum", 1.0, bytes=1e3))
    made = record(rows)
    found = rates(made)
    assert found.copied is not None and found.product is not None and found.wide_product is not None
    assert (found.copied.median, found.copied.fastest) == pytest.approx((2.4e10, 9e12))
    assert found.product.median == pytest.approx(2e11)
    assert found.wide_product.median == pytest.approx(1e11)
    figure = roofline_figure(made)
    assert figure is not None
    labels = legend_of(figure)
    assert "memory copy, 24 (up to 9e+03) GB/s" in labels
    assert "float32 product, 200 (up to 200) GFLOP/s" in labels
    assert "stack" not in labels  # without flops
    (axes,) = figure.axes
    baselines, own, *_ = axes.lines
    assert list(own.get_xdata()) == pytest.approx([1.5e9 / 8e7, 1e9 / 8e7])
    assert list(own.get_ydata()) == pytest.approx([1.5e9 / 1e-3 / 1e9, 1e9 / 2e-3 / 1e9])
    assert len(baselines.get_xdata()) == 3


def test_errors_stand_above_the_floor_with_their_names() -> None:
    rows = [*model_rows(), row("negative", error=-1e-9), row("lost", error=float("nan"))]
    figure = error_time_figure(record(rows), CASE)
    assert figure is not None
    (axes,) = figure.axes
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert points[0] == (1e-3, FLOOR) and points[2] == (20e-3, 1e-4) and points[-1][1] == FLOOR
    assert [text.get_text() for text in axes.texts] == [
        "fastagg auto", "fastagg qr", "dense", "cat", "mul", "negative",
    ]  # fmt: skip
    hollow = [line.get_markerfacecolor() == "#ffffff" for line in axes.lines]
    assert hollow == [False, False, True, False, False, False]


def crowded_record() -> Record:
    """Names as long as ours, errors and times close together, a machine with a long name."""
    rows = along("clients", op="reconstruct")
    names = ["fastagg stack_, reconstruct", "fastagg reconstruct, of the stack",
             "PEFT add_weighted_adapter, svd", "mul and cast by client, cat",
             "dense, torch.compile(max-autotune)"]  # fmt: skip
    for op in ("stack", "reconstruct", "merge", "svd", "redistribute", "update_gram", "end-to-end"):
        for place, name in enumerate(names):
            seconds = 1e-3 * (1 + place) ** (5 if op == "merge" else 0.01)
            rows.append(row(name, seconds, op=op, error=1e-12 * (1 + place)))
    rows += [limit(), limit("matrix product", flops=2e12, seconds=1e-2)]
    gpu = "A Graphics Card of 80 GB with a Name that is Longer than Most, and a Part of it only"
    return record(rows, complete=False, device="cuda", gpu=gpu)


@pytest.mark.parametrize("made", [whole_record(), crowded_record()], ids=["whole", "crowded"])
def test_nothing_is_cut_off_or_covered(made: Record) -> None:
    drawn = figures(made)
    assert len(drawn) > 4
    for figure in drawn:
        surface = FigureCanvasAgg(figure)
        surface.draw()
        canvas, renderer = figure.bbox, surface.get_renderer()
        panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
        (legend,) = figure.legends
        heads = [text.get_window_extent(renderer) for text in figure.texts]
        for box in (*panels, *heads, legend.get_window_extent()):
            assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1, figure.texts[0]
            assert canvas.y0 <= box.y0 and box.y1 <= canvas.y1, figure.texts[0]
        for panel in panels:
            for box in (*heads, legend.get_window_extent()):
                assert not panel.overlaps(box), figure.texts[0]


def test_labels_of_errors_lie_apart() -> None:
    rows = [row(f"contender {place}", 1e-3, error=1e-10) for place in range(12)]
    figure = error_time_figure(record(rows), CASE)
    assert figure is not None
    places = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    assert min(np.diff(places)) > 0.05 and places[0] >= 0 and places[-1] <= 1


def test_hostile_names_stay_in_the_folder_and_are_drawn(tmp_path: Path) -> None:
    case, contender = "../../$a^{$/\n_x", "$\\frac{$_<b>\x00" + "y" * 90
    rows = [row(case=case, op="svd"), row(contender, 2e-3, case=case, op="svd")]
    rows += [row(f"fastagg {contender}", case=case, op="../$up$")]
    rows += [row("dense", case=case, op="../$up$")]
    written = draw(record(rows), tmp_path / "plots")
    assert len(written) == 3
    assert {path.parent for path in written} == {tmp_path / "plots"}
    assert list(tmp_path.iterdir()) == [tmp_path / "plots"]


def test_the_command_draws_a_record(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", record(model_rows()))
    arguments = ["bench", "plot", str(tmp_path / "record.json"), "--out", str(tmp_path / "plots")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = [line.removeprefix("written: ") for line in result.stdout.splitlines()]
    assert len(written) == 3 and all(Path(path).stat().st_size for path in written)
    result = CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "nowhere.json")])
    assert result.exit_code == 1 and "nowhere.json" in result.stderr
