"""The arithmetic of a record's rows: medians, quartiles, noise, ratios, shares of the limits."""

from __future__ import annotations

import statistics

import torch

from fastagg.bench.cases import Case
from fastagg.bench.contender import Operation, Work
from fastagg.bench.examination import RUNS, Entry
from fastagg.bench.record import Row

__all__ = ["rows_of"]


def rows_of(operation: Operation, case: Case, entries: list[Entry], dtype: torch.dtype) -> list[Row]:
    medians = {}
    for entry in entries:
        turns = [seconds for run in entry.seconds for seconds in run] or [entry.first_seconds]
        medians[entry.contender.name] = statistics.median(turns) * entry.scale
    rates = _limits(entries, medians)
    rows = []
    for entry in entries:
        contender = entry.contender
        seconds = medians[contender.name]
        turns = [s * entry.scale for run in entry.seconds for s in run] or [seconds]
        low, high = _quartiles(turns)
        ratios = {}
        if contender.kind == "fastagg":
            ratios = {name: other / seconds for name, other in medians.items() if name != contender.name}
        share = None
        if contender.kind != "limit":
            share = _least_seconds(entry.work, rates, seconds)
        rows.append(
            Row(
                case=case.name,
                op=operation.name,
                contender=contender.name,
                kind=contender.kind,
                seconds=seconds,
                low=low,
                high=high,
                turns=len(turns),
                noise=_noise(entry.seconds),
                modules=case.modules,
                timed_modules=entry.timed_modules,
                clients=case.clients,
                rows=case.rows,
                bytes_in=float(case.elements_per_layer * case.layers * dtype.itemsize),
                bytes=entry.work.bytes,
                flops=entry.work.flops,
                wide_flops=entry.work.wide_flops,
                share_of_limit=share,
                peak_bytes=entry.peak,
                error=entry.accuracy.error if entry.accuracy else None,
                orthogonality=entry.accuracy.orthogonality if entry.accuracy else None,
                ratios=ratios,
            )
        )
    return rows


def _limits(entries: list[Entry], medians: dict[str, float]) -> Work:
    """Bytes and flops a second that the limits reached; 0 where there is no such limit."""
    rates = Work()
    for entry in entries:
        if entry.contender.kind == "limit":
            rates += entry.work.times(1 / medians[entry.contender.name])
    return rates


def _least_seconds(work: Work, rates: Work, seconds: float) -> float | None:
    """The share of `seconds` that the work would take if data moved at the copy's rate while the
    products ran at theirs. Of what has no limit there, nothing is said."""
    needed = ((work.bytes, rates.bytes), (work.flops, rates.flops), (work.wide_flops, rates.wide_flops))
    moving, product, wide = (amount / rate if rate else 0.0 for amount, rate in needed)
    if not moving + product + wide:
        return None
    return max(moving, product + wide) / seconds


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _noise(runs: list[list[float]]) -> float | None:
    if len(runs) < RUNS or not all(runs):
        return None
    medians = [statistics.median(run) for run in runs]
    return max(medians) / min(medians) - 1
