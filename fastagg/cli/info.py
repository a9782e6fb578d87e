"""`fastagg info`: the environment, for bug reports."""

from __future__ import annotations

import typer

from fastagg.cli.failures import command
from fastagg.cli.options import Json
from fastagg.cli.printing import console, print_json


@command
def info(json_output: Json = False) -> None:
    """Tell what is installed, how it was built, and which kernels run: paste it into a bug report.

    Works where the compiled libraries do not load, and says why they do not.
    """
    from fastagg.info import environment

    report = environment()
    if json_output:
        print_json(report)
        return
    from fastagg.cli.tables import info_tables

    console().print(*info_tables(report), sep="\n")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(info)
