"""The benchmarks' tables: a table an operation and case, with each row's error beside its time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fastagg.bench.cases import CASES
from fastagg.bench.durations import format_seconds
from fastagg.bench.growth import headline
from fastagg.bench.noise import noise_of, noise_of_pair
from fastagg.bench.record import Record, Row
from fastagg.byte_sizes import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["case_table", "machine_lines", "print_table"]


def machine_lines(record: Record) -> list[str]:
    """Where and how it is measured, in two lines."""
    machine, settings = record.machine, record.settings
    where = machine.gpu or f"{machine.cpu}, {machine.capability}, {settings.threads} threads"
    how = (
        f"factors {settings.dtype}, {settings.factors}, seed {settings.seed}; {settings.effort} effort; "
        f"torch {machine.torch}, fastagg {machine.fastagg}"
    )
    return [where, f"{how}{f' ({machine.commit})' if machine.commit else ''}", ""]


def case_table() -> Table:
    """What there is to measure."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("case", "what it is"):
        table.add_column(name, no_wrap=name == "case")
    for name in ("clients", "R", "modules"):
        table.add_column(name, justify="right")
    for case in CASES.values():
        table.add_row(case.name, case.about, str(case.clients), str(case.rows), str(case.modules))
    return table


def print_table(record: Record, case: str, op: str, screen: Console) -> None:
    """One operation in one case: FastAgg, the baselines, the limits."""
    rows = record.of(case, op)
    if rows:
        screen.print(_title(rows[0]), markup=False, style="bold")
        screen.print(_table(record, rows))
    for left in record.left_out:
        if (left.case, left.op) == (case, op):
            screen.print(f"left out: {left.contender}: {left.reason}", markup=False)
    if any(row.scaled for row in rows):
        screen.print("* timed on fewer modules and scaled by the counted work", markup=False)
    screen.print()


def _title(row: Row) -> str:
    clients = "client" if row.clients == 1 else "clients"
    modules = "module" if row.modules == 1 else "modules"
    return f"{row.op}, {row.case}: {row.clients} {clients}, R = {row.rows}, {row.modules} {modules}"


def _table(record: Record, rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    rates = ("of limit", "GB/s", "GFLOP/s")
    for name in ("median", "IQR", "noise", "times slower", *rates, "memory", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    vectors = any(row.orthogonality is not None for row in rows)
    if vectors:
        table.add_column("orth.", justify="right", no_wrap=True)
    own = headline(rows)
    for row in rows:
        flops = row.flops + row.wide_flops
        cells: list[Text | str] = [
            Text(row.contender + ("*" if row.scaled else "")),
            format_seconds(row.seconds),
            f"{100 * (row.high - row.low) / row.seconds:.0f}%" if row.turns > 1 else "once",
            "" if row.noise is None else f"{100 * row.noise:.0f}%",
            _times(record, row, own),
            "" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f}%",
            f"{row.bytes / row.seconds / 1e9:.3g}" if row.bytes else "",
            f"{flops / row.seconds / 1e9:.3g}" if flops else "",
            "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            "" if row.error is None else f"{row.error:.0e}",
        ]
        if vectors:
            cells.append("" if row.orthogonality is None else f"{row.orthogonality:.0e}")
        style = {"fastagg": "bold", "limit": "dim"}.get(row.kind, "")
        table.add_row(*cells, style=style)
    return table


def _times(record: Record, row: Row, own: Row | None) -> str:
    """How many times slower than FastAgg's first row; within the noise of both it is as fast."""
    if own is None or row is own or row.kind == "limit":
        return ""
    ratio = row.seconds / own.seconds
    noise = noise_of_pair(noise_of(row, record), noise_of(own, record))
    return "as fast" if 1 / (1 + noise) <= ratio <= 1 + noise else f"{ratio:.3g}"
