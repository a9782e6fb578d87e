"""`torchrun -m fastagg aggregate`: what it writes, and what is left when it loses a rank: nothing."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from commands import (
    COMMITTING,
    DIES,
    HANGS,
    IS_SLOW,
    WRITING,
    end,
    interrupted,
    left_in,
    ranks_by_hand,
    torchrun,
)
from equations import mixed_round
from sharded_jobs import DTYPES, files, same_but_for_times

from fastagg.folders.rounds import aggregate_folders

LONGEST = 90


@pytest.fixture
def folders(seed: int, tmp_path: Path) -> list[str]:
    for each in mixed_round(seed, DTYPES):
        each.adapter.save(tmp_path / "clients" / each.name)
    return sorted(str(path) for path in (tmp_path / "clients").iterdir())


def test_torchrun_writes_what_one_process_does(folders: list[str], tmp_path: Path) -> None:
    arguments = ["aggregate", *folders, "-m", "flexlora", "--out", str(tmp_path / "two"), "--json"]
    job = torchrun(2, ["-m", "fastagg", *arguments])
    try:
        out, err = job.communicate(timeout=LONGEST)
    finally:
        end([job])
    assert job.returncode == 0, err
    assert "fastagg:" not in err and "Warning" not in err
    report = json.loads(out)  # one document: one rank prints
    assert report["out"] == str(tmp_path / "two")
    aggregate_folders(folders, tmp_path / "one", method="flexlora")
    assert same_but_for_times(files(tmp_path / "one"), files(tmp_path / "two"))
    assert left_in(tmp_path) == {"clients", "one", "two"}


def test_an_error_of_all_is_said_once(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "clients" / "c2" / "adapter_config.json").unlink()
    arguments = ["aggregate", *folders, "-m", "flora", "--out", str(tmp_path / "out")]
    jobs = ranks_by_hand(arguments, 2, 0, "raise AssertionError")
    try:
        said = [job.communicate(timeout=LONGEST)[1] for job in jobs]
    finally:
        end(jobs)
    assert [job.returncode for job in jobs] == [1, 1]
    assert said[0].count("client 'c2'") == 1 and "adapter_config.json" in said[0]
    assert said[1] == ""
    assert left_in(tmp_path) == {"clients"}


@pytest.mark.parametrize(("dead", "size", "when"), [(1, 3, WRITING), (0, 2, COMMITTING)])
def test_survivors_name_the_rank_that_was_killed(
    folders: list[str], tmp_path: Path, dead: int, size: int, when: str
) -> None:
    out = str(tmp_path / "out")
    arguments = ["aggregate", *folders, "-m", "zeropad", "--out", out, "--timeout", "30"]
    began = time.monotonic()
    jobs = ranks_by_hand(arguments, size, dead, DIES, when)
    try:
        said = [job.communicate(timeout=LONGEST)[1] for job in jobs]
    finally:
        end(jobs)
    assert time.monotonic() - began < LONGEST
    assert jobs[dead].returncode == -signal.SIGKILL
    for rank, job in enumerate(jobs):
        if rank != dead:
            assert job.returncode == 1, said[rank]
            assert f"rank {dead} did not come" in said[rank]
            assert "Nothing was written" in said[rank]
    assert left_in(tmp_path) == {"clients"}


@pytest.mark.parametrize(("what", "known"), [(HANGS, "no sign of life"), (IS_SLOW, "it lives")])
def test_a_rank_that_hangs_is_named_when_the_time_is_up(
    folders: list[str], tmp_path: Path, what: str, known: str
) -> None:
    arguments = ["aggregate", *folders, "-m", "flora", "--out", str(tmp_path / "out"), "--timeout", "4"]
    jobs = ranks_by_hand(arguments, 2, 1, what)
    try:
        said = jobs[0].communicate(timeout=LONGEST)[1]
    finally:
        end(jobs)
    assert jobs[0].returncode == 1
    assert f"rank 1 did not come: {known}" in said
    assert left_in(tmp_path) == {"clients"}


def test_torchrun_ends_when_a_rank_is_killed(folders: list[str], tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(interrupted(1, DIES))
    arguments = ["aggregate", *folders, "-m", "flora", "--out", str(tmp_path / "out")]
    job = torchrun(2, [str(script), *arguments])
    try:
        _, err = job.communicate(timeout=LONGEST)
    finally:
        end([job])
    assert job.returncode == 1
    assert "rank      : 1" in err and "-9" in err  # torchrun's own word for who failed first
    assert left_in(tmp_path) == {"clients", "job.py"}


def test_ctrl_c_leaves_nothing(folders: list[str], tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(interrupted(0, IS_SLOW))
    arguments = ["aggregate", *folders, "-m", "flora", "--out", str(tmp_path / "out")]
    job = torchrun(2, [str(script), *arguments])
    try:
        until = time.monotonic() + LONGEST
        while left_in(tmp_path) == {"clients", "job.py"} and time.monotonic() < until:
            time.sleep(0.1)
        assert left_in(tmp_path) > {"clients", "job.py"}  # the folder is begun
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=LONGEST)
    finally:
        end([job])
    assert job.returncode != 0
    assert left_in(tmp_path) == {"clients", "job.py"}
