"""A run's folder: whole files or none, rounds that count only when complete, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from fastagg.errors import InvalidInput
from fastagg.federated.simulation.config import RunConfig
from fastagg.federated.simulation.run_folder import RunFolder
from fastagg.whole_file import write_whole

CONFIG = RunConfig()


def line(number: int) -> dict[str, object]:
    return {"kind": "round", "round": number}


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_rounds_after_the_last_complete_one_are_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.open(CONFIG, resume=False) == 0
    folder.complete_round(0, [line(0)])
    for number in (1, 2, 3):
        (folder.begin_round(number) / "state.safetensors").write_bytes(b"state")
        folder.complete_round(number, [line(number)])
    assert folder.last_complete() == 3
    (folder.round(2) / "COMPLETE").unlink()
    again = RunFolder(tmp_path / "run")
    assert again.open(CONFIG, resume=True) == 1
    assert again.metrics() == [line(0), line(1)]
    assert not again.round(2).exists()
    assert not again.round(3).exists()


def test_without_a_complete_round_a_run_begins_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(CONFIG, resume=True)
    folder.complete_round(0, [line(0)])
    folder.begin_round(1)
    assert folder.open(CONFIG, resume=True) == 0
    assert folder.metrics() == []


def test_a_round_begun_again_is_empty(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.begin_round(1) / "left").write_text("over")
    assert not list(folder.begin_round(1).iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(InvalidInput, match="no run"):
            RunFolder(tmp_path).open(CONFIG, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_only_rounds_and_output_may_change(tmp_path: Path) -> None:
    RunFolder(tmp_path).open(CONFIG, resume=False)
    more = RunConfig.of({"federation": {"rounds": 9}, "output": {"keep": "all"}})
    assert RunFolder(tmp_path).open(more, resume=True) == 0
    assert RunConfig.read(tmp_path / "config.toml") == more
    with pytest.raises(InvalidInput, match=r"lora\.dropout"):
        RunFolder(tmp_path).open(RunConfig.of({"lora": {"dropout": 0.5}}), resume=True)
