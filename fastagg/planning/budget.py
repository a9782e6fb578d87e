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
]

# Slabs of the clients that are being folded into sums at a time.
CHUNK_BYTES = 12 << 20

_WORK_BYTES = 96 << 20
_WORK_BYTES_A_THREAD = 12 << 20


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


def work_bytes() -> int:
    """Bytes that handing out some modules at a time may take by default.

    Enough modules to keep every core busy, little enough to be a rounding error beside the
    accumulator of a model that is worth the cores.
    """
    return max(_WORK_BYTES, _WORK_BYTES_A_THREAD * torch.get_num_threads())


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
    """The largest anonymous memory seen at the moments that :meth:`sample` was called.

    Where the system does not tell it apart, the peak of all resident memory, mapped files included.
    """

    def __init__(self) -> None:
        self.measure = "RssAnon" if anonymous_bytes() is not None else "ru_maxrss"
        self.bytes = 0
        self.sample()

    def sample(self) -> None:
        """Looks at the memory now."""
        found = anonymous_bytes()
        if found is None:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.bytes = max(self.bytes, found)
