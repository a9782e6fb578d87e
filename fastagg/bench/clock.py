"""Seconds of one turn: torch.utils.benchmark on a CPU, CUDA events with a cold L2 on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.benchmark import Timer

__all__ = ["Clock", "CpuClock", "CudaClock", "clock_for"]

_COLD_BYTES = 512 << 20  # several times the L2 of any GPU of today


class Clock(Protocol):
    """How runs are timed on a device."""

    @property
    def device(self) -> torch.device:
        """Where it times."""
        ...

    @property
    def inputs(self) -> int:
        """How many inputs turns rotate over: none may find its own in a cache."""
        ...

    def once(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of a single run, warm or not, and what it returned."""
        ...

    def turn(self, run: Callable[[], Any]) -> float:
        """Seconds of a run, from as many as a turn needs."""
        ...


@dataclass(frozen=True)
class CpuClock:
    """torch.utils.benchmark: a run to size the block, then blocks of runs for `turn_seconds`."""

    device: torch.device
    threads: int
    turn_seconds: float
    inputs: int = 1

    def once(self, run: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result

    def turn(self, run: Callable[[], Any]) -> float:
        timer = Timer("run()", globals={"run": run}, num_threads=self.threads)
        return float(timer.blocked_autorange(min_run_time=self.turn_seconds).median)


@dataclass(frozen=True)
class CudaClock:
    """One run between two events, after the L2 was filled with something else."""

    device: torch.device
    cold: torch.Tensor
    inputs: int = 2

    def once(self, run: Callable[[], Any]) -> tuple[float, Any]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.cold.fill_(1)
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3, result

    def turn(self, run: Callable[[], Any]) -> float:
        seconds, result = self.once(run)
        del result
        return seconds


def clock_for(device: torch.device, threads: int, turn_seconds: float) -> Clock:
    """The clock of a device."""
    if device.type != "cuda":
        return CpuClock(device, threads, turn_seconds)
    return CudaClock(device, torch.empty(_COLD_BYTES, dtype=torch.uint8, device=device))
