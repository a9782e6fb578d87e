"""Fair timing: candidates take turns, so that a drift of the machine's speed meets all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fastagg


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: the median and the quartiles of its repetitions."""

    median: float
    low: float
    high: float
    repetitions: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, Timing]:
    """Times each candidate `repetitions` times, in turn, after one warm-up of all."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            del result
            if repetition:
                seconds[name].append(elapsed)
    return {name: summary(values) for name, values in seconds.items()}


def summary(values: list[float]) -> Timing:
    """The median and the quartiles of some seconds."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high, len(values))


def machine() -> dict[str, Any]:
    """What a reader must know of where a record was made."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        cpu = next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), cpu)
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastagg": fastagg.__version__,
    }
