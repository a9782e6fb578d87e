"""Plots: what they show, checked on the artists that matplotlib drew, and PNGs that can be read."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from recorded_folders import client_row, round_row, rows_of, spectra_of, whole_run, write_run

from fastagg.federated.report.loss_plot import loss_figure
from fastagg.federated.report.plots import (
    PLOTS,
    bytes_figure,
    seconds_figure,
    similarity_figure,
    spectra_figure,
    write_plots,
)
from fastagg.federated.report.recorded_run import RecordedRun, read_runs
from fastagg.plot_style import DARK, LIGHT, plain, png

HOSTILE = {"<script>x</script>": 8, "_hidden": 4, "$a^{$": 2, "a" * 70: 1, "two\nlines": 8}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run_of(folder: Path, rows: list[dict[str, Any]], **documents: Any) -> RecordedRun:
    return read_runs([write_run(folder, rows, **documents)])[0]


def line(figure: Figure | None, panel: int, place: int) -> tuple[np.ndarray, np.ndarray]:
    assert figure is not None
    drawn = figure.axes[panel].lines[place]
    return np.asarray(drawn.get_xdata(), float), np.asarray(drawn.get_ydata(), float)


def size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_every_plot_of_a_whole_run_is_a_png(tmp_path: Path) -> None:
    (run,) = read_runs([whole_run(tmp_path / "flora")])
    before = dict(matplotlib.rcParams)
    written = write_plots(run, tmp_path / "plots")
    assert list(written) == ["loss", "spectra", "similarity", "seconds", "bytes"]
    for path in written.values():
        width, height = size(path.read_bytes())
        assert width > 900 and height > 500
    assert dict(matplotlib.rcParams) == before
    again = loss_figure([run])
    assert again is not None and png(again) == written["loss"].read_bytes()


def test_the_band_is_the_quartiles_of_the_clients(tmp_path: Path) -> None:
    losses = {0: (5.0, 5.5, 6.0, 6.5, 9.0), 1: (1.0, 2.0, 3.0, 4.0, 50.0)}
    rows = []
    for number, of_clients in losses.items():
        rows.append(round_row("flora", number, 4.5 - number))
        rows += [client_row("flora", number, f"c{k}", 4, loss) for k, loss in enumerate(of_clients)]
    figure = loss_figure([run_of(tmp_path / "flora", rows)])
    assert figure is not None
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} == {(0, 5.5), (0, 6.5), (1, 2.0), (1, 4.0)}
    assert line(figure, 0, 0)[1].tolist() == [6.0, 3.0]  # medians
    assert line(figure, 0, 1)[1].tolist() == [4.5, 3.5]  # over all examples


def test_what_a_rank_keeps_is_its_share_of_the_energy(tmp_path: Path) -> None:
    spectra = {"modules": {"m.0.q_proj": [4.0, 2.0, 1.0]}}
    run = run_of(tmp_path / "run", rows_of("flora", rounds=1, ranks={"a": 2}), spectra=spectra)
    figure = spectra_figure(run)
    ranks, values = line(figure, 0, 0)
    assert ranks.tolist() == [1, 2, 3] and values.tolist() == [1.0, 0.5, 0.25]
    np.testing.assert_allclose(line(figure, 1, 0)[1], [16 / 21, 20 / 21, 1])
    assert line(figure, 1, 1)[0].tolist() == [2, 2]  # the client's rank


def test_what_a_shorter_spectrum_lacks_is_zero(tmp_path: Path) -> None:
    """The median of many modules is as long as the longest spectrum."""
    modules = {f"m.{k}.q_proj": [4.0, 2.0, 1.0] if k % 3 else [1.0] for k in range(60)}
    run = run_of(
        tmp_path / "run", rows_of("flora", rounds=1, ranks={"a": 2}), spectra={"modules": modules}
    )
    figure = spectra_figure(run)
    for axes, expected in ((0, [1.0, 0.5, 0.25]), (1, [16 / 21, 20 / 21, 1])):
        ranks, values = line(figure, axes, 60)
        assert ranks.tolist() == [1, 2, 3]
        np.testing.assert_allclose(values, expected)


def test_the_heat_map_leaves_out_the_diagonal_and_what_is_unknown(tmp_path: Path) -> None:
    similarity = {
        "clients": ["a", "b", "c"],
        "cosine": [[1, 0.2, None], [0.2, 1, -0.4], [None, -0.4, 1]],
    }
    run = run_of(
        tmp_path / "run", rows_of("flora", rounds=1, ranks={"a": 2, "b": 2}), similarity=similarity
    )
    figure = similarity_figure(run)
    assert figure is not None
    (image,) = figure.axes[0].images
    shown = np.ma.filled(image.get_array().astype(float), math.nan)
    nan = math.nan
    np.testing.assert_array_equal(shown, [[nan, 0.2, nan], [0.2, nan, -0.4], [nan, -0.4, nan]])
    assert image.get_clim() == (-0.4, 0.4)


def test_shares_are_of_the_seconds_of_each_round(tmp_path: Path) -> None:
    seconds = {"train": 6.0, "aggregate": 1.0, "evaluate": 2.0, "other": 1.0}
    rows = [round_row("flora", 0, 5.0), round_row("flora", 1, 4.0, seconds=seconds)]
    figure = seconds_figure(run_of(tmp_path / "run", rows))
    assert line(figure, 1, 0)[0].tolist() == [1] and line(figure, 1, 0)[1].tolist() == [0.1]
    assert figure is not None
    assert [bar.get_height() for bar in figure.axes[0].patches] == [6, 1, 2, 1]


@pytest.mark.parametrize("rounds", [3, 60])
def test_bytes_of_each_round_in_a_readable_unit(tmp_path: Path, rounds: int) -> None:
    rows = [round_row("flora", 0, 5.0)]
    rows += [
        round_row("flora", n, 4.0, bytes_up=3 << 20, bytes_down=5 << 20) for n in range(1, rounds + 1)
    ]
    figure = bytes_figure(run_of(tmp_path / "run", rows))
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_ylabel() == "MiB a round"
    png(figure)
    assert [label.get_text() for label in axes.get_yticklabels()][:4] == list("0246")
    if rounds <= 40:
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [3 << 20] * rounds + [5 << 20] * rounds
    else:
        assert [set(drawn.get_ydata()) for drawn in axes.lines] == [{3 << 20}, {5 << 20}]


def test_a_run_with_hardly_anything_draws_what_it_has(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [round_row("flora", 0, None)])
    assert [plot.name for plot in PLOTS if plot.draw(run, LIGHT) is not None] == []
    assert write_plots(run, tmp_path / "plots") == {}


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_hostile_names_one_round_and_odd_spectra(tmp_path: Path, theme: Any) -> None:
    names = list(HOSTILE)
    spectra = {"modules": {"a.q_proj": [1.0], "b.k_proj": [2.0, 0.0], "empty": [], "zero": [0.0]}}
    cosine = np.full((5, 5), 0.5).tolist()
    rows = rows_of("$m_", rounds=1, ranks=HOSTILE)
    run = run_of(
        tmp_path / "_$run",
        rows,
        spectra=spectra,
        similarity={"clients": names, "cosine": cosine},
    )
    for plot in PLOTS:
        figure = plot.draw(run, theme)
        assert figure is not None, plot.name
        size(png(figure))


def test_losses_that_are_no_numbers_are_marked_and_left_out(tmp_path: Path) -> None:
    rows = rows_of("fedit", rounds=4, ranks={"a": 4, "b": 4})
    for row in rows:
        if row["round"] >= 3:
            row["loss" if row["kind"] == "round" else "held_out_loss"] = math.nan
    figure = loss_figure([run_of(tmp_path / "run", rows)])
    assert figure is not None
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["NaN"]
    assert axes.texts[0].get_position()[0] == 3 and axes.get_xlim()[1] > 4
    png(figure)


def test_several_runs_have_a_colour_a_method_and_a_line_a_repeat(tmp_path: Path) -> None:
    for seed in range(2):
        for method in ("flora", "flexlora"):
            rows = rows_of(method, rounds=2, ranks={"a": 4, "b": 4}, seed=seed)
            write_run(tmp_path / f"seed{seed}" / method, rows)
    figure = loss_figure(read_runs([tmp_path / "seed0", tmp_path / "seed1"]))
    assert figure is not None
    lines = figure.legends[0].get_lines()[:4]
    colours = [drawn.get_color() for drawn in lines]
    assert colours[:2] == colours[2:] and colours[0] != colours[1]
    assert [drawn.get_linestyle() for drawn in lines] == ["-", "-", "--", "--"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[:4] == ["seed0/flexlora", "seed0/flora", "seed1/flexlora", "seed1/flora"]


def test_legends_lie_outside_the_axes(tmp_path: Path) -> None:
    (run,) = read_runs([whole_run(tmp_path / "flora", rounds=3)])
    for plot in PLOTS:
        figure = plot.draw(run, LIGHT)
        assert figure is not None
        figure.savefig(io.BytesIO())
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, plot.name
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), plot.name


def test_many_modules_get_a_median_a_kind(tmp_path: Path) -> None:
    rows = rows_of("flora", rounds=1, ranks={"a": 4})
    run = run_of(tmp_path / "run", rows, spectra=spectra_of(layers=24, kinds=("q_proj", "v_proj")))
    figure = spectra_figure(run)
    assert figure is not None
    bold = [drawn for drawn in figure.axes[1].lines if drawn.get_linewidth() > 1.5]
    assert len(bold) == 2 and len(figure.axes[1].lines) == 2 * 24 + 2 + 1


def test_names_become_one_short_line() -> None:
    assert plain("two\nlines\x00") == "two lines"
    assert plain("$x$") == r"\$x\$"
    assert plain("") == "?"
    assert len(plain("a" * 99)) == 28
