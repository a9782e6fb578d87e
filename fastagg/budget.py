"""Memory: how a budget is written, what the work on a bucket needs, what the process holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from fastagg.errors import InvalidInput, MemoryBudgetExceeded

__all__ = [
    "CHUNK_BYTES",
    "PeakMemory",
    "format_bytes",
    "parse_bytes",
    "require",
    "slab_bytes",
    "work_bytes",
]

# Slabs of the clients that are being folded into sums at a time.
CHUNK_BYTES = 12 << 20

_WORK_BYTES = 96 << 20
_WORK_BYTES_A_THREAD = 12 << 20


_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": 1 << 10,
    "m": 10**6, "mb": 10**6, "mib": 1 << 20,
    "g": 10**9, "gb": 10**9, "gib": 1 << 30,
    "t": 10**12, "tb": 10**12, "tib": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: int | str | None) -> int | None:
    """Reads a budget: an int of bytes, or a text such as "8GiB", "500MB", "1.5g".

    Raises:
        InvalidInput: not such a value, or not above zero.
    """
    if value is None:
        return None
    found: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str):
        match = _AMOUNT.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match and unit:
            found = int(float(match[1]) * unit)
    if found is None or found <= 0:
        raise InvalidInput(
            "not an amount of memory",
            field="max_memory",
            expected="a positive number of bytes, or a text such as '8GiB' or '500MB'",
            got=repr(value),
        )
    return found


def format_bytes(count: float) -> str:
    """A number of bytes for people: "1.5 GiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


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
