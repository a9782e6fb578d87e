"""The peak of anonymous memory of `fastagg aggregate`, watched from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.adapters import FLORA_RANKS, write_clients


def run(workspace: Path, *, layers: int = 8, size: int = 2048) -> dict[str, Any]:
    """Ten and a hundred clients: the peak beyond an idle process that has imported the package."""
    idle = _peak([sys.executable, "-c", "import fastagg.linalg, fastagg.aggregate; input()"])
    rows = []
    for clients in (10, 100):
        ranks = tuple(FLORA_RANKS[k % len(FLORA_RANKS)] for k in range(clients))
        folders = write_clients(
            workspace / f"memory-{clients}", ranks, layers=layers, size=size, seed=clients
        )
        out = workspace / f"memory-out-{clients}"
        peak = _peak(
            [
                sys.executable, "-m", "fastagg", "aggregate", *map(str, folders),
                "--method", "flexlora", "--accumulator", "stack", "--out", str(out), "--json",
            ]
        )
        accumulator = sum((f / "adapter_model.safetensors").stat().st_size for f in folders)
        rows.append(
            {
                "clients": clients,
                "accumulator": accumulator,
                "peak": peak,
                "idle": idle,
                "above_accumulator": peak - idle - accumulator,
            }
        )
    return {"case": "peak anonymous memory of fastagg aggregate", "rows": rows}


def _peak(command: list[str]) -> int:
    """The largest RssAnon (bytes) of a process, sampled every two milliseconds until it ends."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    status = Path(f"/proc/{process.pid}/status")
    peak, began, idle = 0, time.monotonic(), "-c" in command
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        anonymous = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
        peak = max(peak, 1024 * int(anonymous[0]) if anonymous else 0)
        if idle and time.monotonic() - began > 6:
            process.communicate(b"\n")
        time.sleep(0.002)
    _, errors = process.communicate() if process.stdin and not process.stdin.closed else (b"", b"")
    if process.returncode:
        raise RuntimeError(f"{command[:4]} failed: {errors.decode()}")
    return peak


def table(record: dict[str, Any]) -> str:
    """The record for people, in MB."""
    lines = [record["case"], f"  {'clients':>8s}{'accumulator':>14s}{'peak':>10s}{'beyond':>10s}  MB"]
    for row in record["rows"]:
        lines.append(
            f"  {row['clients']:8d}{row['accumulator'] / 1e6:14.0f}{row['peak'] / 1e6:10.0f}"
            f"{row['above_accumulator'] / 1e6:10.0f}  (idle process: {row['idle'] / 1e6:.0f})"
        )
    return "\n".join(lines)
