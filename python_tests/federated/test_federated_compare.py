"""Reading run folders, and several runs side by side."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

from recorded_folders import client_row, round_row, rows_of, spectra_of, whole_run, write_run
from rich.console import Console
from typer.testing import CliRunner, Result

from fastagg.cli.app import app
from fastagg.cli.comparison_tables import print_comparison
from fastagg.errors import InvalidInput
from fastagg.federated.report.compare import compare
from fastagg.federated.report.metrics import read_metrics
from fastagg.federated.report.recorded_run import read_runs
from fastagg.federated.report.run_summary import summarise

RANKS = {"a": 8, "b": 4}


def fastagg(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def small(folder: Path, method: str = "flora", **fields: float) -> Path:
    return write_run(folder, rows_of(method, rounds=2, ranks=RANKS, **fields))  # type: ignore[arg-type]


def test_figures_of_a_run(tmp_path: Path) -> None:
    seconds = {"train": 7.0, "aggregate": 1.0, "evaluate": 1.5, "other": 0.5}
    first = {"seconds": seconds, "bytes_up": 10, "bytes_down": 20, "failures": {"c": "timeout"}}
    rows = [
        round_row("flora", 0, 5.0),
        *(client_row("flora", 0, name, 4, loss) for name, loss in (("a", 4.0), ("b", 6.0))),
        round_row("flora", 1, 2.0, **first, rouge_l=0.25),
        client_row("flora", 1, "a", 4, 1.0, distance=0.2),
        client_row("flora", 1, "b", 4, 3.0, distance=0.4),
        round_row("flora", 2, None, **first),
        round_row("flora", 3, 3.0, **first),
    ]
    found = summarise(read_runs([write_run(tmp_path / "flora", rows)])[0])
    assert (found.first_loss, found.loss, found.best_loss) == (5.0, 3.0, 2.0)
    assert found.quartiles == (1.5, 2.0, 2.5)
    assert found.perplexity == pytest.approx(math.exp(3.0))
    assert (found.rounds, found.clients, found.failures) == (3, 2, 3)
    assert (found.bytes_up, found.bytes_down, found.seconds) == (30, 60, 30.0)
    assert found.aggregation_share == pytest.approx(0.1)
    assert found.distance == pytest.approx(0.3)
    assert found.rouge_l == 0.25 and found.exact_match is None


def test_a_line_cut_by_a_kill_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = small(tmp_path / "flora")
    file = folder / "metrics.jsonl"
    whole = file.read_bytes()
    cut = whole[: whole.rstrip().rfind(b"\n") + 1]
    last = json.dumps(client_row("flora", 2, "ü", 4, 1.0), ensure_ascii=False).encode()
    for end in range(1, len(last)):
        file.write_bytes(cut + last[:end])
        read = read_metrics(file)
        assert len(read.rounds) + len(read.clients) == cut.count(b"\n")
        assert read.notes == (
            f"line {cut.count(bytes([10])) + 1} of metrics.jsonl is incomplete and was left out",
        )
    file.write_bytes(cut + last)  # whole, but for its line's end
    assert read_metrics(file).notes == ()
    assert len(read_metrics(file).clients) == len(read_runs([folder])[0].clients)


def test_another_line_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "flora")
    file = folder / "metrics.jsonl"
    good = file.read_text()
    file.write_text('{"kind": "rou\n' + good)
    with pytest.raises(InvalidInput, match=r"line 1 of .* is no JSON"):
        read_runs([folder])
    file.write_text(good + '{"kind": "step"}\n')
    with pytest.raises(InvalidInput, match="'round' or 'client'"):
        read_runs([folder])
    file.write_text(good + '{"kind": "round", "method": "flora", "round": "two"}\n')
    with pytest.raises(InvalidInput, match="field 'round'"):
        read_runs([folder])
    file.write_text(good + json.dumps(round_row("fedit", 3, 1.0)) + "\n")
    with pytest.raises(InvalidInput, match="rows of one method"):
        read_runs([folder])
    file.write_text("")
    with pytest.raises(InvalidInput, match="no row"):
        read_runs([folder])


def test_fields_of_a_later_version_do_no_harm(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "flora", [round_row("flora", 0, 5.0, energy=3.0)])
    assert read_runs([folder])[0].rounds[0].loss == 5.0


def test_spectra_are_of_the_last_complete_round(tmp_path: Path) -> None:
    rows = rows_of("flora", rounds=3, ranks=RANKS)
    folder = write_run(tmp_path / "flora", rows, spectra=spectra_of(layers=1))
    earlier = folder / "rounds" / "0002"
    (earlier / "spectra.json").write_text(json.dumps({"modules": {"m": [1.0]}}))
    assert read_runs([folder])[0].spectra[0] == 3  # type: ignore[index]
    (folder / "rounds" / "0003" / "COMPLETE").unlink()
    run = read_runs([folder])[0]
    assert run.spectra is not None and run.spectra[0] == 2 and run.spectra[1].modules == {"m": (1.0,)}
    (earlier / "spectra.json").write_text('{"modules": {"m": [1.')
    run = read_runs([folder])[0]
    assert run.spectra is None and "cannot be read" in run.notes[0]


def test_a_similarity_that_is_not_square_is_left_out(tmp_path: Path) -> None:
    odd = {"clients": ["a", "b"], "cosine": [[1.0, 0.1]]}
    folder = write_run(tmp_path / "flora", rows_of("flora", rounds=1, ranks=RANKS), similarity=odd)
    run = read_runs([folder])[0]
    assert run.similarity is None and "similarity.json cannot be read" in run.notes[0]


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    folders = [small(tmp_path / seed / "flora") for seed in ("one", "two")]
    assert [run.label for run in read_runs(folders)] == ["one/flora", "two/flora"]
    assert [run.label for run in read_runs(folders[:1])] == ["flora"]
    assert [run.label for run in read_runs([folders[0], folders[0], tmp_path / "one"])] == ["flora"]


def test_settings_that_differ(tmp_path: Path) -> None:
    rows = rows_of("flora", rounds=1, ranks=RANKS)
    config = 'seed = {}\n[output]\nfolder = "{}"\n[lora]\nr = 4\n{}'
    write_run(tmp_path / "runs" / "x", rows, config=config.format(0, "x", ""))
    write_run(tmp_path / "runs" / "y", rows, config=config.format(1, "y", "dropout = 0.1\n"))
    write_run(tmp_path / "runs" / "z", rows, config="not TOML")
    found = compare([tmp_path / "runs"]).differing_settings()
    assert found == {
        "seed": ("0", "1", "–"),
        "lora.dropout": ("–", "0.1", "–"),
        "lora.r": ("4", "4", "–"),
    }


def test_the_best_run_ends_with_the_least_loss(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, loss in (("a", 2.0), ("b", 1.5), ("c", math.nan), ("d", None)):
        write_run(runs / name, [round_row("flora", 0, loss)])
    best = compare([runs]).best
    assert best is not None and best.run == "b"
    assert compare([runs / "c", runs / "d"]).best is None


def test_the_command_prints_a_table_and_draws_a_plot(tmp_path: Path) -> None:
    small(tmp_path / "runs" / "flora", "flora", floor=1.0)
    small(tmp_path / "runs" / "zero[pad]", "zeropad", floor=2.0)
    plot, page = tmp_path / "all.png", tmp_path / "all.html"
    result = fastagg(tmp_path / "runs", "--plot", plot, "--report", page)
    assert result.exit_code == 0, result.output
    for word in ("flora", "zero[pad]", "zeropad", "perplexity", "KiB", "written: "):
        assert word in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert page.read_text().startswith("<!doctype html>")


def test_headings_stay_whole_on_a_narrow_screen(tmp_path: Path) -> None:
    found = compare([small(tmp_path / "flora"), small(tmp_path / "hetlora", "hetlora")])
    shown = {}
    for width in (80, 200):
        screen = Console(width=width, file=io.StringIO())
        print_comparison(found, screen)
        shown[width] = screen.file.getvalue()  # type: ignore[attr-defined]
        for word in ("flora", "hetlora", "middle half of clients", "distance from dW", "failures"):
            assert word in shown[width], (width, word)
    assert len(shown[80].splitlines()) > 15 > len(shown[200].splitlines())


def test_the_command_for_programs(tmp_path: Path) -> None:
    rows = rows_of("flora", rounds=1, ranks=RANKS)
    rows[-3]["loss"] = math.nan
    folder = write_run(tmp_path / "flora", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "cl')
    document = json.loads(fastagg(folder, "--json", "--plot", tmp_path / "p.png").stdout)
    assert document["runs"][0]["method"] == "flora" and document["runs"][0]["loss"] is None
    assert "incomplete" in document["notes"]["flora"][0]


def test_wrong_paths_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    plot = tmp_path / "p.png"
    for path, words in (
        (tmp_path / "empty", "is no run folder"),
        (tmp_path / "file", "is no run folder"),
        (tmp_path / "nowhere", "there is no"),
    ):
        result = fastagg(path, "--plot", plot)
        assert result.exit_code == 1
        assert words in result.stderr and "Traceback" not in result.stderr
    result = fastagg(small(tmp_path / "flora"), "--plot", tmp_path / "no" / "p.png")
    assert result.exit_code == 1 and "No such file" in result.stderr
    assert not plot.exists()


def test_reading_runs_needs_no_live_objects(tmp_path: Path) -> None:
    """A table of a thousand clients' runs should not wait for transformers."""
    import subprocess

    folder = whole_run(tmp_path / "flora", rounds=2)
    script = (
        "import sys; from pathlib import Path\n"
        "from fastagg.federated.report.html_report import write_report\n"
        f"write_report([Path({str(folder)!r})], Path({str(tmp_path / 'r.html')!r}))\n"
        "assert not {'transformers', 'peft', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))
