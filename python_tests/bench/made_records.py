"""Records with made-up figures: what a test says, and the rest of a plausible measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastagg.bench.cases import SERIES
from fastagg.bench.record import Machine, Record, Row, Settings

MACHINE = Machine(
    date="2026-01-31",
    system="Linux x86_64",
    cpu="A made-up CPU",
    capability="AVX512",
    cores=2,
    memory_bytes=16 << 30,
    python="3.11.0",
    torch="2.13.0",
    fastagg="0.1.0",
    commit="0123456789ab",
)
SETTINGS = Settings(
    device="cpu", threads=2, effort="quick", dtype="bfloat16", factors="random", seed=0
)


def row(contender: str = "fastagg auto", seconds: float = 1e-3, **given: Any) -> Row:
    """A row whose quartiles lie 1% about its median."""
    kind = "fastagg" if contender.startswith("fastagg") else "baseline"
    fields: dict[str, Any] = {
        "case": "tinyllama-qv-10",
        "op": "svd",
        "contender": contender,
        "kind": kind,
        "seconds": seconds,
        "low": 0.99 * seconds,
        "high": 1.01 * seconds,
        "turns": 6,
        "noise": 0.05,
        "modules": 44,
        "timed_modules": 44,
        "clients": 10,
        "rows": 220,
        "bytes_in": 4.5e7,
        "bytes": 8e7,
        "flops": 1e9,
        "wide_flops": 0.0,
        "share_of_limit": 0.5,
        "peak_bytes": 1 << 20,
        "error": 1e-7,
        "orthogonality": None,
    }
    return Row(**{**fields, **given})


def limit(contender: str = "memory copy", seconds: float = 1e-4, **given: Any) -> Row:
    """A row of what the machine can do; a copy unless flops are given."""
    fields: dict[str, Any] = {"flops": 0.0, "error": None, "share_of_limit": None}
    return row(contender, seconds, kind="limit", **{**fields, **given})


def record(rows: Sequence[Row], *, complete: bool = True, **changed: Any) -> Record:
    """Of rows; `changed` are fields of the machine or of the settings."""
    machine = {name: value for name, value in changed.items() if name in Machine.model_fields}
    settings = {name: value for name, value in changed.items() if name in Settings.model_fields}
    assert len(machine) + len(settings) == len(changed)
    return Record(
        complete=complete,
        machine=MACHINE.model_copy(update=machine),
        settings=SETTINGS.model_copy(update=settings),
        rows=list(rows),
    )


def series_rows(
    series: str,
    seconds: Callable[[float], float],
    peak_bytes: Callable[[float], int | None] = lambda given: 1 << 20,
    *,
    count: int | None = None,
    contender: str = "fastagg auto",
    **given: Any,
) -> list[Row]:
    """A contender at the first `count` values of a series, its costs functions of the bytes given."""
    rows = []
    for case in SERIES[series].cases[:count]:
        bytes_in = float(2 * case.elements_per_layer)
        rows.append(
            row(
                contender,
                seconds(bytes_in),
                case=case.name,
                bytes_in=bytes_in,
                bytes=2 * bytes_in,
                peak_bytes=peak_bytes(bytes_in),
                modules=1,
                timed_modules=1,
                **given,
            )
        )
    return rows
