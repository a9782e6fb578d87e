"""`fastagg compare`: one table and one plot over several runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastagg.cli.failures import command
from fastagg.cli.options import Json
from fastagg.cli.printing import console, print_json


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
    from fastagg.cli.comparison_tables import print_comparison

    screen = console()
    print_comparison(comparison, screen)
    for path in written:
        screen.print(f"written: {path}", markup=False)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)
