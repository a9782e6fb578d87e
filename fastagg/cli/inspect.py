"""`fastagg inspect`: what is in an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from fastagg.cli.failures import command
from fastagg.cli.options import Folders, Json
from fastagg.cli.printing import console, print_json, progress_bar


@command
def inspect(
    folders: Folders,
    spectrum: Annotated[
        bool,
        typer.Option(
            "--spectrum",
            help="Also the singular values of each module's delta weight, and its effective rank.",
        ),
    ] = False,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Show each module whose name matches, as a shell would match: '*q_proj'.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Show ranks, scalings, norms of the delta weights, dtypes and sizes of adapters.

    A line per adapter; with --spectrum or --module a table of its modules. No delta weight is formed.
    Adapters with NaN or infinity are shown, with how many there are.
    """
    import dataclasses

    from fastagg.adapter import Adapter
    from fastagg.folders.inspection import measure
    from fastagg.folders.rounds import client_folders

    measured = []
    with progress_bar(wanted=len(folders) > 1 or spectrum) as progress:
        for done, (client, folder) in enumerate(client_folders(folders).items()):
            progress(done, len(folders), client)
            found = measure(Adapter.load(folder), spectrum=spectrum, pattern=module)
            measured.append(dataclasses.replace(found, name=client))
    if json_output:
        print_json({"adapters": [item.to_dict() for item in measured]})
        return
    from fastagg.cli.tables import adapters_table, modules_table

    screen = console()
    screen.print(adapters_table(measured))
    if spectrum or module is not None:
        for item in measured:
            screen.print(modules_table(item))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(inspect)
