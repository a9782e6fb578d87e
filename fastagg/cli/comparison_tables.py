"""Runs side by side, as `fastagg compare` and `fastagg simulate` print them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastagg.cli.tables import table
from fastagg.federated.report.run_summary import columns_for

if TYPE_CHECKING:
    from fastagg.federated.report.compare import Comparison

_TITLE = "Runs (held-out losses in nats a token; the least is bold)"


def print_comparison(comparison: Comparison, screen: Console) -> None:
    """A line a run, the settings in which they differ, and what is to be known of their folders."""
    wide = _run_a_line(comparison)
    room = screen.measure(wide, options=screen.options.update(width=10_000)).maximum
    screen.print(wide if room <= screen.width else _run_a_column(comparison))
    if comparison.differing_settings():
        screen.print(_settings_table(comparison))
    for run in comparison.runs:
        for note in run.notes:
            screen.print(f"{run.label}: {note}", markup=False)


def _run_a_line(comparison: Comparison) -> Table:
    columns = columns_for(comparison.summaries)
    made = table(
        _TITLE,
        *(column.heading for column in columns),
        right=[column.heading for column in columns if column.numeric],
    )
    for summary in comparison.summaries:
        best = summary is comparison.best
        made.add_row(
            *(escape(column.text(summary)) for column in columns), style="bold" if best else None
        )
    return made


def _run_a_column(comparison: Comparison) -> Table:
    """The same for a narrow screen, on which the columns' headings would be cut into pieces."""
    label, *figures = columns_for(comparison.summaries)
    made = table(_TITLE, label.heading)
    for summary in comparison.summaries:
        bold = "bold" if summary is comparison.best else ""
        made.add_column(escape(label.text(summary)), justify="right", overflow="fold", style=bold)
    for column in figures:
        made.add_row(column.heading, *(escape(column.text(each)) for each in comparison.summaries))
    return made


def _settings_table(comparison: Comparison) -> Table:
    made = table("Settings that differ", "setting", *(escape(run.label) for run in comparison.runs))
    for name, values in comparison.differing_settings().items():
        made.add_row(escape(name), *(escape(value) for value in values))
    return made
