"""The machine and the software of a record."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import fastagg
from fastagg.bench.record import Machine

__all__ = ["describe"]


def describe(device: torch.device) -> Machine:
    """Of this process."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        date=date.today().isoformat(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        memory_bytes=_memory(),
        python=platform.python_version(),
        torch=torch.__version__,
        fastagg=fastagg.__version__,
        commit=_commit(),
        gpu=gpu.name if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        multiprocessors=gpu.multi_processor_count if gpu else None,
        l2_bytes=gpu.L2_cache_size if gpu else None,
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _commit() -> str | None:
    """Of the checkout that this package is used from, where it is one."""
    root = Path(fastagg.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ("git", "-C", str(root))
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
