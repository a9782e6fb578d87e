"""The peak of anonymous memory of `fastagg aggregate`, watched from outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.adapters import FLORA_RANKS, write_clients


def run(workspace: Path, *, layers: int = 8, size: int = 4096) -> dict[str, Any]:
    """Ten and a hundred clients; the interpreter, torch and the libraries are in the peak."""
    idle = _peak([sys.executable, "-c", "import fastagg.linalg, fastagg.aggregation"])
    rows = []
    for clients in (10, 100):
        ranks = tuple(FLORA_RANKS[k % len(FLORA_RANKS)] for k in range(clients))
        folders = write_clients(
            workspace / f"memory-{clients}", ranks, layers=layers, size=size, seed=clients
        )
        out = workspace / f"memory-out-{clients}"
        command = [sys.executable, "-m", "fastagg", "aggregate", *map(str, folders)]
        peak = _peak([*command, "--method", "flexlora", "--out", str(out), "--json"])
        held = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
        shutil.rmtree(out)
        row = {"clients": clients, "accumulator": held, "peak": peak, "beyond": peak - held}
        rows.append(row)
    return {"case": "peak anonymous memory of fastagg aggregate", "idle": idle, "rows": rows}


def _peak(command: list[str]) -> int:
    """The largest RssAnon (bytes) of a process, sampled every millisecond until it ends."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        peak = 0
        while process.poll() is None:
            lines = status.read_text().splitlines()
            anonymous = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
            peak = max(peak, 1024 * int(anonymous[0]) if anonymous else 0)
            time.sleep(0.001)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} .. failed with {process.returncode}")
    return peak


def table(record: dict[str, Any]) -> str:
    """The record for people, in MB."""
    lines = [
        f"{record['case']} (an idle process with torch: {record['idle'] / 1e6:.0f} MB)",
        f"  {'clients':>8s}{'accumulator':>14s}{'peak':>10s}{'beyond':>10s}  MB",
    ]
    for row in record["rows"]:
        lines.append(
            f"  {row['clients']:8d}{row['accumulator'] / 1e6:14.0f}{row['peak'] / 1e6:10.0f}"
            f"{row['beyond'] / 1e6:10.0f}"
        )
    return "\n".join(lines)
