"""Memory: what a budget allows, what the work on a bucket needs, what the process holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from fastagg.byte_sizes import format_bytes
from fastagg.errors import MemoryBudgetExceeded

__all__ = [
    "CHUNK_BYTES",
    "PeakMemory",
    "require",
    "slab_bytes",
    "work_bytes",
    "workers",
]

# Slabs of the clients that are being folded into sums at a time.
CHUNK_BYTES = 12 << 20

_WORK_BYTES = 96 << 20
_WORK_BYTES_A_WORKER = {"cpu": 12 << 20, "cuda": 32 << 20}


def require(needed: int, budget: int | None, what: str, cure: str) -> None:
    """Refuses work that would need more than the budget.

    Raises:
        MemoryBudgetExceeded: it would.
    """
    if budget is not None and needed > budget:
        raise MemoryBudgetExceeded(
            f"{what} needs {format_bytes(needed)} ({needed} bytes), but max_memory is "
            f"{format_bytes(budget)} ({budget} bytes). {cure}",
            needed=needed,
            budget=budget,
        )


def workers(device: torch.device) -> int:
    """How many modules are worked on at once: one for each thread, or for each multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


def work_bytes(device: torch.device) -> int:
    """Bytes that handing out some modules at a time may take by default.

    Enough modules to keep every worker busy, little enough to be a rounding error beside the
    accumulator of a model that is worth the workers.
    """
    return max(_WORK_BYTES, _WORK_BYTES_A_WORKER[device.type] * workers(device))


def slab_bytes(rows: int, m: int, n: int, itemsize: int) -> int:
    """Bytes of one module's slabs: A (rows, n) and B transposed (rows, m)."""
    return rows * (m + n) * itemsize


def anonymous_bytes() -> int | None:
    """Resident anonymous memory of the process; mapped files are not in it. None off Linux."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


class PeakMemory:
    """The largest memory seen at the moments that :meth:`sample` was called.

    Of the process its anonymous memory, or, where the system does not tell it apart, the peak of all
    resident memory, mapped files included; of a GPU what this process has allocated there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.measure = "RssAnon" if anonymous_bytes() is not None else "ru_maxrss"
        if device.type == "cuda":
            self.measure = "memory_allocated"
        self.bytes = 0
        self.sample()

    def sample(self) -> None:
        """Looks at the memory now."""
        if self._device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.memory_allocated(self._device))
            return
        found = anonymous_bytes()
        if found is None:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.bytes = max(self.bytes, found)
