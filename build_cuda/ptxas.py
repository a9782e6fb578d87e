"""What ptxas says of every kernel, and which of it fails the build.

Registers that do not fit are spilled to local memory, and arrays that are indexed at run time live in
a stack frame there: both turn register traffic into memory traffic, silently.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Kernels that may use local memory, each with the reason why that costs nothing: function -> reason.
COLD: Mapping[str, str] = {}

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FUNCTION = re.compile(r"Function properties for (\w+)")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class LocalMemory:
    """Bytes of local memory of a kernel, or of a function that it calls, on one architecture."""

    function: str
    architecture: str
    stack: int
    spill_stores: int
    spill_loads: int

    def __str__(self) -> str:
        return (
            f"{self.function} for sm_{self.architecture}: {self.stack} bytes stack frame, "
            f"{self.spill_stores} bytes spill stores, {self.spill_loads} bytes spill loads"
        )


def read_report(report: str) -> list[LocalMemory]:
    """Every function of a report of `nvcc -Xptxas -v`."""
    found = []
    architecture = function = "unknown"
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            function, architecture = entry.groups()
        elif called := _FUNCTION.search(line):
            function = called[1]
        elif memory := _MEMORY.search(line):
            found.append(LocalMemory(function, architecture, *map(int, memory.groups())))
    return found


def offenders(reports: Iterable[Path]) -> list[str]:
    """A line for each kernel that uses local memory and is not among the cold ones."""
    used = [
        memory
        for report in reports
        for memory in read_report(report.read_text())
        if memory.stack or memory.spill_stores or memory.spill_loads
    ]
    cold = re.compile(rf"::({'|'.join(COLD)})[<(]") if COLD else None
    lines = _demangled([str(memory) for memory in used])
    return [line for line in lines if cold is None or not cold.search(line)]


def _demangled(lines: list[str]) -> list[str]:
    cxxfilt = shutil.which("c++filt")
    if cxxfilt is None or not lines:
        return lines
    done = subprocess.run([cxxfilt], input="\n".join(lines), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
