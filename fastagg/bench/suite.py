"""Which operations are measured in which cases, and all of it in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fastagg.bench.cases import CASES, SERIES, Case, select
from fastagg.bench.clock import clock_for
from fastagg.bench.contender import Operation
from fastagg.bench.examination import EFFORTS
from fastagg.bench.limits import product_rate
from fastagg.bench.machine import describe
from fastagg.bench.measure import Measurement, measure
from fastagg.bench.operations.end_to_end import END_TO_END
from fastagg.bench.operations.importing import FRESH_INTERPRETER, IMPORT
from fastagg.bench.operations.merge import MERGE
from fastagg.bench.operations.reconstruct import RECONSTRUCT
from fastagg.bench.operations.redistribute import REDISTRIBUTE
from fastagg.bench.operations.round import ROUND
from fastagg.bench.operations.stack import STACK
from fastagg.bench.operations.svd import SVD
from fastagg.bench.operations.update_gram import UPDATE_GRAM
from fastagg.bench.record import LeftOut, Record, Row, Settings
from fastagg.errors import InvalidInput
from fastagg.rounds.options import parse_device

__all__ = ["OPERATIONS", "Pair", "pairs", "run"]

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        STACK,
        RECONSTRUCT,
        MERGE,
        SVD,
        REDISTRIBUTE,
        ROUND,
        UPDATE_GRAM,
        END_TO_END,
        IMPORT,
    )
}

_DEFAULT_CASES = {
    "quick": ("square-1024",),
    "standard": ("tinyllama-qv-10", "llama7b-qv-10"),
    "full": tuple(CASES),
}
# What is read off a series: how time and memory grow.
_OF_A_SERIES = ("stack", "reconstruct", "svd", "end-to-end")


@dataclass(frozen=True)
class Pair:
    """An operation in a case."""

    operation: Operation
    case: Case


def pairs(cases: Sequence[str], operations: Sequence[str], effort: str) -> list[Pair]:
    """What is measured: all that was asked for, or what the effort has time for.

    Raises:
        InvalidInput: no such case or operation.
    """
    for name in operations:
        if name not in OPERATIONS:
            raise InvalidInput(
                "there is no such operation",
                field="--op",
                expected=f"one of {', '.join(OPERATIONS)}",
                got=repr(name),
            )
    operations = list(dict.fromkeys(operations))
    chosen = select(cases or _DEFAULT_CASES[effort])
    in_series = {case.name for series in SERIES.values() for case in series.cases}
    found = []
    for case in chosen:
        wanted: Iterable[str] = operations or OPERATIONS
        if not operations and not cases and effort == "full" and case.name in in_series:
            wanted = _OF_A_SERIES
        found += [Pair(OPERATIONS[name], case) for name in wanted if name != IMPORT.name]
    if IMPORT.name in (operations or ([] if cases else OPERATIONS)):
        found.append(Pair(IMPORT, FRESH_INTERPRETER))
    return found


def run(
    wanted: Sequence[Pair],
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda text: None,
    done: Callable[[Record, Pair], None] = lambda record, pair: None,
) -> Record:
    """Measures all pairs. `done` gets the record so far after each; in the last it is complete.

    Raises:
        InvalidInput: the device cannot be used.
    """
    device = parse_device(settings.device)
    dtype = getattr(torch, settings.dtype)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads)
    effort = EFFORTS[settings.effort]
    clock = clock_for(device, settings.threads, effort.turn_seconds)
    rate = product_rate(clock)
    machine = describe(device)
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    record = Record(complete=not wanted, machine=machine, settings=settings, rows=rows)
    for number, pair in enumerate(wanted, 1):
        where = f"[{number}/{len(wanted)}] {pair.case.name}, {pair.operation.name}"

        def saying(text: str, where: str = where) -> None:
            say(f"{where}: {text}")

        found: Measurement = measure(
            pair.operation,
            pair.case,
            clock=clock,
            effort=effort,
            dtype=dtype,
            factors=settings.factors,
            seed=settings.seed,
            flops_per_second=rate,
            say=saying,
        )
        rows, left_out = rows + found.rows, left_out + found.left_out
        record = Record(
            complete=number == len(wanted),
            machine=machine,
            settings=settings,
            rows=rows,
            left_out=left_out,
        )
        done(record, pair)
    return record
