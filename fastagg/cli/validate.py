"""`fastagg validate`: whether folders are adapters, and can be aggregated."""

from __future__ import annotations

import typer

from fastagg.cli.failures import BAD_INPUT, command
from fastagg.cli.options import Folders, Json
from fastagg.cli.printing import console, print_json, progress_bar


@command
def validate(folders: Folders, json_output: Json = False) -> None:
    """Check adapters: each alone (files, configuration, names, shapes, ranks, NaN and infinity), and
    whether all can be aggregated together (base model, shapes, kinds of modules).

    Exit code 1 where any is invalid or they do not fit together.
    """
    from fastagg.folders.validation import validate_folders

    with progress_bar() as progress:
        validation = validate_folders(folders, progress=progress)
    if json_output:
        print_json(validation.to_dict())
    else:
        from fastagg.cli.tables import validation_table

        console().print(validation_table(validation))
    if not validation.together:
        raise typer.Exit(BAD_INPUT)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(validate)
