"""`fastagg demo`: the main job on an embedded default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastagg.cli.failures import command
from fastagg.cli.options import Json
from fastagg.cli.printing import print_json


@command
def demo(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="Where the base model, the clients and the aggregates go; an earlier demo there is "
            "replaced, anything else is refused.",
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
    """Train ten clients' adapters of different ranks, aggregate them by each method, and compare.

    Needs PEFT and transformers, and neither a network nor a GPU.
    """
    from rich.console import Console

    from fastagg.demo.run import run_demo

    outcome = run_demo(out, seed=seed, quick=quick, console=Console(stderr=json_output))
    if json_output:
        print_json(dataclasses.asdict(outcome))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(demo)
