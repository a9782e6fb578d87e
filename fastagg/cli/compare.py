"""`fastagg compare`: one table and one plot over several runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastagg.cli.failures import command
from fastagg.cli.options import Json
from fastagg.cli.printing import console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from fastagg.federated.report.compare import Comparison


@command
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN..",
            help="Run folders as `fastagg simulate` writes them, or folders of run folders.",
            show_default=False,
        ),
    ],
    plot: Annotated[
        Path,
        typer.Option("--plot", metavar="PNG", help="Where the losses of all runs are drawn."),
    ] = Path("comparison.png"),
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="HTML",
            help="Write all plots and figures as one page there, which opens without a server.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Put several runs side by side: losses, scores, bytes, seconds, and settings that differ.

    Reads their folders alone. The files of --plot and --report are replaced.
    """
    from fastagg.federated.report.compare import compare as compared

    comparison = compared(runs)
    written = [plot] if comparison.write_plot(plot) else []
    if report is not None:
        from fastagg.federated.report.html_report import report as page
        from fastagg.whole_file import write_whole

        write_whole(report, page(comparison))
        written.append(report)
    if json_output:
        print_json(
            {
                "runs": [dataclasses.asdict(summary) for summary in comparison.summaries],
                "settings": comparison.differing_settings(),
                "notes": {run.label: run.notes for run in comparison.runs if run.notes},
            }
        )
        return
    screen = console()
    screen.print(_runs_table(comparison))
    if comparison.differing_settings():
        screen.print(_settings_table(comparison))
    for run in comparison.runs:
        for note in run.notes:
            screen.print(f"{run.label}: {note}", markup=False)
    for path in written:
        screen.print(f"written: {path}", markup=False)


def _runs_table(comparison: Comparison) -> Table:
    from rich.markup import escape

    from fastagg.cli.tables import table
    from fastagg.federated.report.run_summary import columns_for

    columns = columns_for(comparison.summaries)
    made = table(
        "Runs (held-out losses in nats a token; the least is bold)",
        *(column.heading for column in columns),
        right=[column.heading for column in columns if column.numeric],
    )
    for summary in comparison.summaries:
        best = summary is comparison.best
        made.add_row(
            *(escape(column.text(summary)) for column in columns), style="bold" if best else None
        )
    return made


def _settings_table(comparison: Comparison) -> Table:
    from rich.markup import escape

    from fastagg.cli.tables import table

    made = table("Settings that differ", "setting", *(escape(run.label) for run in comparison.runs))
    for name, values in comparison.differing_settings().items():
        made.add_row(escape(name), *(escape(value) for value in values))
    return made


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)
