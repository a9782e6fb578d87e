"""`fastagg demo`: the federated loop on an embedded default."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import typer

from fastagg.cli.failures import INTERRUPTED, command, say
from fastagg.cli.options import Json
from fastagg.cli.printing import console, print_json


@command
def demo(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where the settings, the runs and the report go; an earlier demo there is replaced, "
            "anything else is refused.",
            show_default=False,
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of weights, texts and training.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A smaller model, three clients, seconds instead of minutes."),
    ] = False,
    json_output: Json = False,
) -> None:
    """Train ten clients of different ranks for two rounds by each of four methods, and compare.

    Needs neither a network nor a GPU.
    """
    from rich.console import Console

    from fastagg.demo.run import SETTINGS, run_demo
    from fastagg.federated.simulation.quiet import quiet_libraries

    quiet_libraries()
    screen = Console(stderr=True) if json_output else console()
    try:
        outcome = run_demo(out, seed=seed, quick=quick, console=screen)
    except KeyboardInterrupt:
        again = f"fastagg simulate {shlex.quote(str(out / SETTINGS))} --resume"
        say(f"interrupted; `{again}` goes on after the last complete round, a new demo starts over")
        raise typer.Exit(INTERRUPTED) from None
    if json_output:
        print_json(dataclasses.asdict(outcome))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(demo)
