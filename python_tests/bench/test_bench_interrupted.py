"""Ctrl-C in the middle of a run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from fastagg.bench.record import read_record


def test_what_was_measured_until_then_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastagg", "bench", "--quick", "--out", str(tmp_path)]
    cases = ["--case", "square-256", "--case", "square-512", "--op", "redistribute", "--op", "svd"]
    path = tmp_path / "record.json"
    with subprocess.Popen(
        [*command, *cases], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        until = time.monotonic() + 120
        while not path.exists() and time.monotonic() < until:
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"{path} has what was measured until then" in said
    assert "Traceback" not in said
    record = read_record(path)
    assert not record.complete
    assert record.rows
    assert {each.name for each in tmp_path.iterdir()} == {"record.json"}
