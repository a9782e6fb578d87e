"""The most memory that a run takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_bytes", "peak_bytes", "sampled_peak_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int:
    """Memory that a measurement may think of using."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 << 30  # a small laptop's


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> tuple[int | None, Any]:
    """Peak bytes of a run beyond those held before it, and what it returned.

    On a GPU: torch's allocator. On Linux: the high-water mark of resident memory, which the kernel keeps
    exactly; memory that the C library holds back for reuse is handed to the system first, or a run that
    finds it there would seem to need none. Elsewhere None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - held, result
    try:
        _give_back()
        _CLEAR.write_text("5")  # VmHWM starts anew
        held = _kilobytes("VmRSS")
    except OSError:
        return None, run()
    result = run()
    return max(0, _kilobytes("VmHWM") - held) * 1024, result


def sampled_peak_bytes(device: torch.device, run: Callable[[], Any]) -> tuple[int | None, Any]:
    """The same of anonymous memory alone, looked at every millisecond: mapped files, which the
    high-water mark counts, are the page cache's."""
    if device.type == "cuda":
        return peak_bytes(device, run)
    try:
        _give_back()
        held = peak = _kilobytes("RssAnon")
    except OSError:
        return None, run()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _kilobytes("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return (max(peak, _kilobytes("RssAnon")) - held) * 1024, result


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")


def _give_back() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
