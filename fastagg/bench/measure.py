"""How an operation is measured in a case.

Two runs, each with fresh inputs in fresh memory; in a run the contenders take turns, so that a drift of
the machine's speed meets all alike, in an order that turns around from turn to turn. How far the medians
of the two runs lie apart is the noise: a difference within it is not called one. What is too slow to be
timed on all modules is timed on fewer and scaled by the counted work, and marked; what would be too slow
for a single module is left out, and named.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from fastagg.bench.cases import Case
from fastagg.bench.clock import Clock
from fastagg.bench.contender import Operation
from fastagg.bench.examination import RUNS, Effort, Entry, Examination
from fastagg.bench.memory import available_bytes
from fastagg.bench.record import LeftOut, Row
from fastagg.bench.rows import rows_of
from fastagg.bench.workload import FactorKind, Workload, draw

__all__ = ["Measurement", "measure"]


@dataclass
class Measurement:
    """The rows of one operation in one case."""

    rows: list[Row]
    left_out: list[LeftOut]


def measure(
    operation: Operation,
    case: Case,
    *,
    clock: Clock,
    effort: Effort,
    dtype: torch.dtype,
    factors: FactorKind,
    seed: int,
    flops_per_second: float,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measures all contenders of an operation. `flops_per_second` predicts what would be too slow."""
    layers = _layers(operation, case, dtype, effort, clock)

    def inputs(run: int) -> list[Workload]:
        return [
            draw(
                case,
                layers=layers,
                dtype=dtype,
                factors=factors,
                seed=seed + run * clock.inputs + turn,
                device=clock.device,
            )
            for turn in range(clock.inputs)
        ]

    entries: list[Entry] = []
    left_out: list[LeftOut] = []
    for run in range(RUNS):
        workloads = inputs(run)
        if run == 0:
            examine = Examination(operation, case, clock, effort, flops_per_second, say)
            entries, left_out = examine.all(workloads[0])
        with _prepared(entries, workloads):
            _take_turns(entries, clock, partial(_say_turn, say, run))
        del workloads
        gc.collect()
    return Measurement(rows_of(operation, case, entries, dtype), left_out)


def _layers(operation: Operation, case: Case, dtype: torch.dtype, effort: Effort, clock: Clock) -> int:
    allowed = min(effort.held_bytes, available_bytes(clock.device) // 2)
    held = operation.bytes_per_layer(case, dtype.itemsize) * clock.inputs
    return max(1, min(case.layers, int(allowed // held)))


@contextmanager
def _prepared(entries: list[Entry], workloads: list[Workload]) -> Iterator[None]:
    """Every contender with memory of its own for each of the inputs."""
    for entry in entries:
        entry.seconds.append([])
        if entry.turns:
            chosen = (entry.part(workload) for workload in workloads)
            entry.prepared = [entry.contender.prepare(part) for part in chosen]
    try:
        yield
    finally:
        for entry in entries:
            entry.prepared = []


def _say_turn(say: Callable[[str], None], run: int, name: str) -> None:
    say(f"{name}, run {run + 1} of {RUNS}")


def _take_turns(entries: list[Entry], clock: Clock, say: Callable[[str], None]) -> None:
    most = max((entry.turns for entry in entries), default=0)
    for turn in range(most):
        for entry in entries if turn % 2 == 0 else reversed(entries):
            if turn >= entry.turns:
                continue
            say(entry.contender.name)
            prepared = entry.prepared[turn % len(entry.prepared)]
            entry.seconds[-1].append(clock.turn(prepared.run))
            prepared.clean()
