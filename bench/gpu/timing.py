"""Device time: events around each run, a cold L2 before it, candidates in turn."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch

from bench.measure import Timing, summary
from fastagg import _library

COLD_BYTES = 512 << 20  # several times the L2 of any GPU of today


@dataclass(frozen=True)
class Clock:
    """Times runs on `device`: by CUDA events there, by the host's clock on a CPU (to try the suite)."""

    device: torch.device

    def measure(
        self, candidates: Mapping[str, Callable[[], object]], repetitions: int
    ) -> dict[str, Timing]:
        """Seconds of each candidate, run in turn after one warm-up of all, each with a cold L2."""
        cold = torch.empty(
            COLD_BYTES if self.device.type == "cuda" else 1, dtype=torch.uint8, device=self.device
        )
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for repetition in range(repetitions + 1):
            for name, run in candidates.items():
                cold.fill_(repetition % 100)
                elapsed = self._once(run)
                if repetition:
                    seconds[name].append(elapsed)
        return {name: summary(values) for name, values in seconds.items()}

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            result = run()
            del result
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end)) / 1e3

    def noise(self, run: Callable[[], object], repetitions: int) -> float:
        """How far the medians of the same thing, measured as two candidates, lie apart (a ratio)."""
        times = self.measure({"once": run, "again": run}, repetitions)
        return abs(times["once"].median / times["again"].median - 1)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A replay of the CUDA graph of `run`, without the launches' cost on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()

    def replay() -> object:
        graph.replay()
        return held

    return replay


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know of where a record was made."""
    about: dict[str, Any] = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": _library.status()["build"],
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
        }
    return about


def row(name: str, time: Timing, rate: float | None = None, unit: str = "") -> dict[str, Any]:
    """One line of a record."""
    return {
        "name": name,
        "seconds": time.median,
        "quartiles": [time.low, time.high],
        "repetitions": time.repetitions,
        **({} if rate is None else {"rate": rate, "unit": unit}),
    }


def scaled(time: Timing, factor: float) -> Timing:
    """The time of a whole of which one part in `factor` was timed."""
    return Timing(time.median * factor, time.low * factor, time.high * factor, time.repetitions)
