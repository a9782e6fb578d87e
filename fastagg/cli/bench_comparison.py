"""Two records of the benchmarks beside each other, as `fastagg bench compare` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastagg.bench.durations import format_seconds

if TYPE_CHECKING:
    from fastagg.bench.compare import Comparison, Matched
    from fastagg.bench.record import Record, Row

__all__ = ["print_comparison"]

_WORSE_FIRST = ("slower", "less accurate", "faster", "more accurate")


def print_comparison(comparison: Comparison, screen: Console) -> None:
    """What changed, worst first; what did not, only counted; the notes on both records."""
    for name, record in (("old", comparison.old), ("new", comparison.new)):
        screen.print(f"{name}: {_origin(record)}", markup=False)
    changed = [pair for pair in comparison.matched if pair.changed]
    if changed:
        screen.print(_table(changed))
        if any(pair.rescaled for pair in changed):
            screen.print("* other numbers of modules were timed, and scaled by the counted work")
    screen.print(_verdict(comparison, changed), markup=False)
    for words, rows in (("Only in the old record", comparison.missing), ("New", comparison.added)):
        if rows:
            screen.print(f"{words}: {_grouped(rows)}.", markup=False)
    for note in comparison.notes:
        screen.print(note, markup=False)


def _origin(record: Record) -> str:
    machine = record.machine
    commit = f" ({machine.commit})" if machine.commit else ""
    return f"fastagg {machine.fastagg}{commit}, {machine.date}, {machine.gpu or machine.cpu}"


def _table(changed: Sequence[Matched]) -> Table:
    made = Table(title="What changed", title_justify="left", title_style="bold", box=None)
    for name in ("case", "op", "contender", "change"):
        made.add_column(name, overflow="fold")
    vectors = any(pair.new.orthogonality is not None for pair in changed)
    for name in ("old", "new", "noise", "error", *(("orth.",) if vectors else ())):
        made.add_column(name, justify="right", no_wrap=True)
    for pair in sorted(changed, key=_worst_first):
        cells = [
            escape(pair.new.case),
            escape(pair.new.op),
            escape(pair.new.contender) + ("*" if pair.rescaled else ""),
            _change(pair),
            format_seconds(pair.old.seconds),
            format_seconds(pair.new.seconds),
            f"{100 * pair.noise:.0f}%",
            _error(pair, pair.old.error, pair.new.error),
        ]
        if vectors:
            cells.append(_error(pair, pair.old.orthogonality, pair.new.orthogonality))
        made.add_row(*cells, style={"fastagg": "bold", "limit": "dim"}.get(pair.new.kind, ""))
    return made


def _worst_first(pair: Matched) -> tuple[int, bool, float]:
    """Changes of one sort together; in each, FastAgg's rows first, then by how much."""
    changes: tuple[str, ...] = (pair.speed, pair.accuracy)
    place = min(_WORSE_FIRST.index(change) for change in changes if change != "same")
    return (place, pair.new.kind != "fastagg", -max(pair.ratio, 1 / pair.ratio))


def _change(pair: Matched) -> str:
    parts = []
    if pair.speed != "same":
        times = max(pair.ratio, 1 / pair.ratio)
        colour = "red" if pair.speed == "slower" else "green"
        parts.append(f"[{colour}]{times:.2f} times {pair.speed}[/]")
    if pair.accuracy != "same":
        colour = "red" if pair.accuracy == "less accurate" else "green"
        parts.append(f"[{colour}]{pair.accuracy}[/]")
    return ", ".join(parts)


def _error(pair: Matched, old: float | None, new: float | None) -> str:
    """Both where the accuracy changed; else the new one alone."""
    shown = [old, new] if pair.accuracy != "same" and old != new else [new]
    return " to ".join("-" if value is None else f"{value:.0e}" for value in shown)


def _verdict(comparison: Comparison, changed: Sequence[Matched]) -> str:
    count = len(comparison.matched)
    if not count:
        return "The records have no row in common."
    same = count - len(changed)
    if not changed:
        return f"Nothing changed beyond the noise, in {_rows(count)}."
    own = sum(pair.worse for pair in changed if pair.new.kind == "fastagg")
    verdict = f"{_rows(own)} of FastAgg got worse" if own else "No row of FastAgg got worse"
    return f"{verdict}; {_rows(same)} of {count} did not change beyond the noise."


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _grouped(rows: Sequence[Row]) -> str:
    """Rows counted by case and op: a record of other cases has hundreds."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        ops = counts.setdefault(row.case, {})
        ops[row.op] = ops.get(row.op, 0) + 1
    return "; ".join(
        f"{case}: {', '.join(f'{op} ({_rows(count)})' for op, count in ops.items())}"
        for case, ops in counts.items()
    )
