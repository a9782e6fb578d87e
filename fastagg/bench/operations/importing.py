"""import: what a program pays before it calls anything, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

from fastagg.bench.cases import Case, Projection
from fastagg.bench.contender import Contender, Operation, Prepared, Work
from fastagg.bench.workload import Workload

__all__ = ["FRESH_INTERPRETER", "IMPORT"]

FRESH_INTERPRETER = Case("fresh-interpreter", "a new process", 1, (Projection("none", 8, 8, (1,)),))


def _contender(name: str, kind: str, code: str) -> Contender:
    def prepare(workload: Workload) -> Prepared:
        command = [sys.executable, "-c", code]
        return Prepared(lambda: subprocess.run(command, check=True))

    return Contender(name, kind, prepare, lambda workload: Work())  # type: ignore[arg-type]


def _contenders(workload: Workload) -> list[Contender]:
    return [
        _contender("import fastagg", "fastagg", "import fastagg"),
        _contender("import torch", "baseline", "import torch"),
        _contender("an empty program", "limit", ""),
    ]


IMPORT = Operation(
    "import",
    "the package's own start",
    "none",
    _contenders,
    lambda workload, outcome: None,
    lambda case, size: 1.0,
)
